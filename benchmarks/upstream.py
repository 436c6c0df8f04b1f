"""A tier that another server computes, such as a vLLM: are its tokens, FLOPs and bills those of our own engine?

    python -m benchmarks.upstream --serve 'vllm serve {folder} --port {port} --dtype float32'

For each program: export it, start the server on it, put it behind a tier of ours, send every prompt through, and cut
streams off. The same prompts run in our engine under the same program, in float32. Figures:

    tokens_equal     share of the answers' tokens that are the same as ours, greedily, up to the first that differs
    answers_equal    share of the answers that are the same to the last token
    flops_equal      share of the records with the FLOPs of a record of our engine that has as many tokens
    cut_exact        share of the streams that were left early, complete by then or not, whose one record has the FLOPs
                     of its tokens

`make bench-upstream` runs this with vLLM's command, which wants an environment of its own.
"""

from __future__ import annotations

import http.client
import json
import random
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from benchmarks.chaos import free_port
from benchmarks.results import Recorder, arguments
from benchmarks.servers import Running, is_found, served
from polar_sdk import ListSink, PolarModel, Program
from polar_sdk.lab.items import builtin_items
from polar_sdk.programs.policy import Policy
from polar_sdk.serving.prefixes import common_start
from polar_server.upstream.remote import MEASURED_TAG

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_sdk import UsageRecord

TIER: Final = "economy"
TOKENS: Final = 48
THREADS: Final = 8
START_SECONDS: Final = 300
_ROWS: Final = {
    "tokens_equal": ("tokens as in our engine, greedily", 99.0),
    "answers_equal": ("answers that are the same to the last token", None),
    "flops_equal": ("records with the FLOPs of our engine's", 100.0),
    "cut_exact": ("cut streams billed to the FLOP", 100.0),
}
"""Names of the shares in the results, and their goals. Unit: percent."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--serve", required=True, help="command that serves {folder} on {port}, in float32")
    parser.add_argument("--programs", default="0-29;0-15 18-29", help="separated by ;")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--cuts", type=int, default=24, help="streams to cut off, per program")
    parser.add_argument("--model")
    args = parser.parse_args()
    model = PolarModel.from_pretrained(args.model, precision="fp32", ledger=None)
    recorder = Recorder("upstream", args.results, model=args.model)
    prompts = [item.prompt for item in builtin_items() if hasattr(item, "prompt")]
    prompts = random.Random(0).sample(prompts, min(args.prompts, len(prompts)))
    shares: dict[str, list[float]] = {name: [] for name in _ROWS}
    for text in args.programs.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            exported = model.export(text, Path(folder) / TIER)
            with _served(args.serve, exported) as url:
                measured = _Tier(model, Program.parse(text), url).measure(prompts, args.cuts)
        print(f"{text}: {measured}", flush=True)
        for name, value in measured.items():
            shares[name].append(value)
    for name, (row, goal) in _ROWS.items():
        recorder.add(row, 100 * fmean(shares[name]), "%", goal=goal)


class _Tier:
    """A tier of ours that runs one program on another server."""

    def __init__(self, model: PolarModel, program: Program, url: str) -> None:
        self.program, self.sink = program, ListSink()
        tiers = {TIER: {"program": program.text}, "exact": {"program": f"0-{model.depth - 1}"}}
        policy = Policy.model_validate({"protected": [], "default_tier": "exact", "tiers": tiers})
        self.model = PolarModel(model.loaded, policy=policy, sink=self.sink)
        self.url = url

    def measure(self, prompts: Sequence[str], cuts: int) -> dict[str, float]:
        """The figures, as shares."""
        front = Running(self.model, backends={TIER: [self.url]})
        try:
            with ThreadPoolExecutor(THREADS) as threads:
                theirs = list(threads.map(lambda prompt: _answer(front, prompt), prompts))
            records = list(self.sink.records)
            cut = [_is_cut_exact(front, self, prompt, count % 16 + 1) for count, prompt in enumerate(prompts[:cuts])]
        finally:
            front.close()
        ours = [one.text for one in self.model.generate_batch(prompts, program=self.program, max_tokens=TOKENS)]
        pairs = [(self.model.encode(one), self.model.encode(other)) for one, other in zip(ours, theirs, strict=True)]
        return {
            "tokens_equal": sum(common_start(*pair) for pair in pairs) / sum(len(one) for one, _ in pairs),
            "answers_equal": fmean(one == other for one, other in pairs),
            "flops_equal": fmean(self.is_right(record) for record in records),
            "cut_exact": fmean(cut),
        }

    def is_right(self, record: UsageRecord) -> bool:
        """Whether a record says what our engine would have executed for its tokens."""
        tokens = record.tokens
        cost = self.model.decoder.cost.request(self.program, tokens.input, tokens.output, cached=tokens.cached)
        return record.flops.total == cost.total and record.tags[MEASURED_TAG] in ("upstream", "relay")


def _body(prompt: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": f"bench:{TIER}", "messages": messages, "max_tokens": TOKENS, "temperature": 0}


def _answer(front: Running, prompt: str) -> str:
    return str(json.loads(front.post(_body(prompt)))["choices"][0]["message"]["content"])


def _is_cut_exact(front: Running, tier: _Tier, prompt: str, events: int) -> bool:
    """Read some events of a stream and leave; whether it has one record, right to the FLOP."""
    before = len(tier.sink.records)
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=60)
    body = json.dumps({**_body(prompt), "stream": True, "max_tokens": 400})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    for _ in range(2 * events):  # each is a line and an empty one
        answer.readline()
    answer.close()
    connection.close()
    until = time.monotonic() + 30
    while len(tier.sink.records) == before and time.monotonic() < until:
        time.sleep(0.02)
    records = tier.sink.records[before:]
    return len(records) == 1 and records[0].outcome in ("cancelled", "completed") and tier.is_right(records[0])


@contextmanager
def _served(command: str, folder: Path) -> Iterator[str]:
    """The other server, from when it answers until the block ends."""
    port = free_port()
    words = [word.format(folder=folder, port=port) for word in shlex.split(command)]
    url = f"http://127.0.0.1:{port}"
    with served(words, lambda: is_found(f"{url}/v1/models"), START_SECONDS, sys.stderr) as starts:
        if not starts:
            sys.exit(f"error: {words[0]} does not serve on {url}; see what it printed.")
        yield url


if __name__ == "__main__":
    main()
