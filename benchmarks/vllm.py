"""Programs inside vLLM (`polar_vllm`): are tokens and bills right, and what do they save?

    python -m benchmarks.vllm --env .vllm [--parts tokens,speed,schedules,bills] [--fills FOLDER]

`make vllm-env` makes the environment. The model is the default one, exported, in float32, with the fills that ship for
it or with others of the same segments. Ends with a line of JSON, in shares of 1:

    identity_equal       answers at full depth, in a batch with filled ones, that are those of vLLM without programs
    filled_equal         tokens of filled answers that are those of our engine on the same folder, up to the first other
    prompt_gain_of_promise   what a prompt of 1,000 tokens gains by cut 20 of 30, over what its FLOPs promise
    decode_vs_stock      speed of a batch at full depth that mostly decodes, over vLLM without programs
    schedules_equal      random batches with few blocks, a prefix cache, second turns and answers that are cut, in which
                         all tokens are as alone, and the worker counts what the formula needs
    cross_program_hits   cached tokens of a prompt that only another program had run (a number)
    billed_equal         records of the gateway with the FLOPs that our engine executes for as many tokens
    audit_closes         tokens by layers that were billed, over those that the workers executed for the first time
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.chaos import free_port
from benchmarks.results import Recorder, arguments
from benchmarks.servers import Running, is_found, served
from polar_sdk import ListSink, PolarModel, Program
from polar_sdk.engine.maps import Fill
from polar_sdk.lab.items import builtin_items
from polar_sdk.programs.cost import layer_tokens
from polar_sdk.programs.policy import Policy
from polar_sdk.router.map_set import MapFacts, MapRecord, MapSet, stored
from polar_sdk.serving.prefixes import common_start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk import UsageRecord
    from polar_sdk.programs.cost import Segment

FILLS: Final = Path(__file__).parents[1] / "polar_sdk/shipped/routers/smollm2-135m-instruct/fills"
STOCK: Final = Path("/dev/null")
"""In place of maps: vLLM as it comes."""
LIGHT: Final = "0-22 (23-29:16)"
DEEP: Final = "0-11 (12-15:16) 16-17 (18-21:16) 22 (23-29:16)"
CUT: Final = "0-19 (20-29:16)"
WORKER: Final = "polar_vllm.worker.Worker"
START_S: Final = 1200
_SPACE: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}
_GOALS: Final = {
    "identity_equal": 1.0,
    "filled_equal": 0.995,
    "prompt_gain_of_promise": 0.85,
    "decode_vs_stock": 0.97,
    "schedules_equal": 1.0,
    "cross_program_hits": 0.0,
    "billed_equal": 1.0,
    "audit_closes": 1.0,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--env", type=Path, required=True, help="environment with vLLM and polar-llm")
    parser.add_argument("--parts", default="tokens,speed,schedules,bills")
    parser.add_argument("--fills", type=Path, default=FILLS, help="folder of the model's maps")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2, help="of the schedules")
    args = parser.parse_args()
    recorder = Recorder("vllm", args.results)
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args.env.absolute(), Path(work), fills=args.fills.absolute())
        parts = {
            "tokens": lambda: bench.tokens(args.prompts),
            "speed": bench.speed,
            "schedules": lambda: bench.schedules(args.schedules, args.seed),
            "bills": bench.bills,
        }
        found: dict[str, float] = {}
        for part in args.parts.split(","):
            for name, value in parts[part]().items():
                found[name] = value
                better: Any = "lower" if name == "cross_program_hits" else "higher"
                recorder.add(name.replace("_", " "), value, "", goal=_GOALS[name], better=better)
    print(json.dumps(found))


class Bench:
    """vLLM in an environment of its own, beside our engine.

    Args:
        env: The environment.
        work: An empty folder.
        folder: A model; None = the default one, exported.
        fills: Its maps.
    """

    def __init__(self, env: Path, work: Path, folder: Path | None = None, fills: Path = FILLS) -> None:
        self.env, self.work, self.fills = env, work, fills
        self.model = PolarModel.from_pretrained(folder, precision="fp32", ledger=None)
        self.folder = folder or self.model.export(f"0-{self.model.depth - 1}", work / "model")
        self.model.use_maps(fills)

    def ask(self, rounds: list[dict[str, Any]], fills: Path | None = None, **options: Any) -> dict[str, Any]:
        """Have vLLM run rounds of requests, with these maps or those of the model; `STOCK`: as it comes."""
        fills = fills or self.fills
        options = {
            "model": str(self.folder),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            **options,
        }
        options |= {"seed": 0, "kv_cache_memory_bytes": 2**30, "disable_log_stats": True}
        if fills is not STOCK:
            options |= {"worker_cls": WORKER, "additional_config": {"polar": {"fills": [str(fills)]}}}
        job, out = self.work / "job.json", self.work / "out.json"
        job.write_text(json.dumps({"options": options, "rounds": rounds}))
        command = [str(self.env / "bin/python"), "-m", "benchmarks.vllm_side", str(job), str(out)]
        ended = subprocess.run(command, env={**os.environ, **_SPACE}, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(f"error: vLLM failed:\n{ended.stderr[-4000:]}")
        answered: dict[str, Any] = json.loads(out.read_text())
        return answered

    def tokens(self, count: int) -> dict[str, float]:
        """The same prompts in vLLM as it comes, in a batch half of which is filled, and in our engine."""
        prompts = texts(self.model, count, 60, 1000, 1)
        chosen = [program for _, program in zip(prompts, cycle((None, LIGHT, None, DEEP)), strict=False)]
        requests = [
            {"ids": self.model.request(text).tokens, "tokens": 24, "ends": True, "program": program}
            for text, program in zip(prompts, chosen, strict=True)
        ]
        whole = [{**request, "program": None} for request in requests if request["program"] is None]
        options: dict[str, Any] = {"max_num_batched_tokens": 256, "enable_prefix_caching": False, "max_num_seqs": 32}
        stock = answers(self.ask([{"requests": whole}], STOCK, **options))
        mixed = answers(self.ask([{"requests": requests}], **options))
        at_full = [answer for answer, program in zip(mixed, chosen, strict=True) if program is None]
        kept, total = self._kept(prompts, chosen, mixed)
        return {
            "identity_equal": fmean(one == other for one, other in zip(stock, at_full, strict=True)),
            "filled_equal": kept / total,
        }

    def _kept(self, prompts: list[str], chosen: list[str | None], theirs: list[list[int]]) -> tuple[int, int]:
        """Tokens of filled answers as in our engine on the folder that vLLM has, and of how many."""
        engine = PolarModel.from_pretrained(self.folder, precision="fp32", ledger=None)
        maps = MapSet.load(self.fills)
        engine.use_maps(replace(maps, facts=maps.facts.model_copy(update={"fingerprint": engine.fingerprint})))
        ends, kept, total = set(engine.loaded.end_tokens), 0, 0
        for program in (LIGHT, DEEP):
            rows = [row for row, own in enumerate(chosen) if own == program]
            for row, one in zip(
                rows, engine.generate_batch([prompts[row] for row in rows], program=program, max_tokens=24), strict=True
            ):
                ours = [token for token in one.token_ids if token not in ends]
                kept += common_start(ours, [token for token in theirs[row] if token not in ends])
                total += len(ours)
        return kept, total

    def speed(self) -> dict[str, float]:
        """Prompts under a cut and at full depth; and a batch at full depth, with our worker and without."""
        fills = some_fill(self.model, self.work / "cut")
        draw = random.Random(0)
        prompts = [[draw.randrange(5, 49_000) for _ in range(1000)] for _ in range(12)]
        rounds = [
            {"requests": [{"ids": ids, "tokens": 1, "program": program}]} for ids in prompts for program in (None, CUT)
        ]
        options: dict[str, Any] = {"enable_prefix_caching": False, "max_num_batched_tokens": 2048}
        seconds = [one["seconds"] for one in self.ask(rounds, fills, **options)["rounds"]][2:]
        self.model.use_maps(fills)
        full, cut = (
            self.model.decoder.cost.request(Program.parse(program), 1000, 1).total for program in ("0-29", CUT)
        )
        gain = median(seconds[::2]) / median(seconds[1::2])
        batch = [{"requests": [{"ids": ids[:150], "tokens": 48} for ids in prompts[:8]]}] * 5
        ratios = []
        for _ in range(2):
            stock, ours = (
                median(one["seconds"] for one in self.ask(batch, each, **options)["rounds"][1:])
                for each in (STOCK, None)
            )
            ratios.append(stock / ours)
        return {"prompt_gain_of_promise": gain / (full / cut), "decode_vs_stock": fmean(ratios)}

    def schedules(self, count: int, seed: int = 2) -> dict[str, float]:
        """Random batches beside each request alone; then one prompt under several programs."""
        draw = random.Random(seed)
        pool: list[dict[str, Any]] = [
            {"ids": self.model.request(text).tokens, "tokens": 12, "program": program}
            for text, program in zip(texts(self.model, 20, 30, 130, 3), cycle((None, LIGHT, DEEP)), strict=False)
        ]
        # Second turns: the prompt, what stood after it in other prompts, and more.
        pool += [{**one, "ids": [*one["ids"], *other["ids"][:40]]} for one, other in zip(pool, pool[7:], strict=False)]
        cold = [{"requests": [one], "cold": True} for one in pool]
        chosen = [draw.sample(range(len(pool)), draw.randint(4, 7)) for _ in range(count)]
        mixed = [{"requests": [cut(pool[each], draw) for each in rows], "cold": draw.random() < 0.1} for rows in chosen]
        once = [{"requests": [{**pool[-1], "tokens": 1, "program": None}], "cold": True}]
        again = [
            {"requests": [{**pool[-1], "tokens": 1, "program": each}]} for each in (LIGHT, DEEP, LIGHT, DEEP, None)
        ]
        found = self.ask(
            [*cold, *mixed, *once, *again],
            block_size=32,
            num_gpu_blocks_override=18,
            max_num_batched_tokens=96,
            max_num_seqs=8,
            max_model_len=512,
        )
        alone = [one["answers"][0]["ids"] for one in found["rounds"][: len(pool)]]
        batches = found["rounds"][len(pool) : len(pool) + count]
        counts = [one["counted"][0] for one in found["rounds"][len(pool) - 1 : len(pool) + count]]
        equal = [
            is_as_alone(asked, batch, [alone[each] for each in rows]) and closes(asked, batch, before, after)
            for asked, batch, rows, (before, after) in zip(mixed, batches, chosen, pairwise(counts), strict=True)
        ]
        hits = [one["answers"][0]["cached"] for one in found["rounds"][len(pool) + count :]]
        cached = sum(answer["cached"] for batch in batches for answer in batch["answers"])
        kinds = {kind: counts[-1][kind] - counts[0][kind] for kind in counts[0]}
        print(f"{found['preempted']} preempted, {cached} tokens cached; one prompt under full, light, deep, …: {hits}")
        seconds = sum(batch["seconds"] for batch in batches)
        print(f"tokens by layers: {kinds}; {seconds / count:.2f} s a batch")
        return {"schedules_equal": fmean(equal), "cross_program_hits": float(sum(hits[:3]))}

    def bills(self) -> dict[str, float]:
        """A vLLM behind a server of ours: the records beside our engine's, and beside what the worker counted."""
        tiers = {"economy": {"program": DEEP}, "standard": {"program": LIGHT}, "exact": {"program": "0-29"}}
        policy = Policy.model_validate({"protected": [], "default_tier": "exact", "tiers": tiers})
        sink, own = ListSink(), ListSink()
        model = PolarModel(self.model.loaded, policy=policy, sink=sink)
        with self.served() as url:
            front = Running(model, backends={tier: [f"programs+{url}"] for tier in tiers})
            asked: list[dict[str, Any]] = [
                {"model": f"bench:{tier}", "messages": [{"role": "user", "content": text}], "max_tokens": 8 + turn % 9}
                for turn, (text, tier) in enumerate(zip(texts(model, 24, 60, 700, 4) * 2, cycle(tiers), strict=False))
            ]
            try:
                with ThreadPoolExecutor(6) as threads:
                    list(threads.map(lambda body: front.post({**body, "temperature": 0, "ignore_eos": True}), asked))
            finally:
                front.close()
            with urllib.request.urlopen(f"{url}/v1/polar/metrics", timeout=30) as answer:
                sums = {kind: int(value) for kind, value in re.findall(r'kind="(\w+)"} (\d+)', answer.read().decode())}
        engine = PolarModel(self.model.loaded, policy=policy, sink=own)
        for body in asked[: len(tiers)]:  # as executed: `flops` of our engine's records is what ran
            text, tier = body["messages"][0]["content"], body["model"].partition(":")[2]
            engine.generate(text, compute=tier, max_tokens=body["max_tokens"], ignore_eos=True, speculate="off")
        right = [
            record.flops.total == self._formula(record) and (not same or same[0].flops.total == record.flops.total)
            for record in sink.records
            for same in [[one for one in own.records if alike(one, record)]]
        ]
        print(f"{sums}; {sum(record.tokens.cached for record in sink.records)} tokens cached")
        return {
            "billed_equal": fmean(right),
            "audit_closes": sum(map(needed, sink.records)) / useful(sums),
        }

    def _formula(self, record: UsageRecord) -> int:
        tokens, cost = record.tokens, self.model.decoder.cost
        return cost.request(Program.parse(record.program), tokens.input, tokens.output, cached=tokens.cached).total

    @contextmanager
    def served(self) -> Iterator[str]:
        """The URL of a vLLM that runs programs."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        config = json.dumps({"polar": {"fills": [str(self.fills)]}})
        words = f"serve {self.folder} --port {port} --dtype float32 --enforce-eager --max-model-len 2048"
        words += f" --worker-cls {WORKER} --enable-prompt-tokens-details --kv-cache-memory-bytes 1073741824"
        words += " --additional-config"
        command = [
            "env",
            "VLLM_PLUGINS=polar",
            "VLLM_NO_USAGE_STATS=1",
            str(self.env / "bin/vllm"),
            *words.split(),
            config,
        ]
        with served(command, lambda: is_found(f"{url}/v1/polar/digests"), START_S, sys.stderr) as starts:
            if not starts:
                sys.exit("error: vLLM does not start; see what it printed.")
            yield url


def answers(found: dict[str, Any]) -> list[list[int]]:
    """Tokens of the first round's answers."""
    return [answer["ids"] for answer in found["rounds"][0]["answers"]]


def needed(record: UsageRecord) -> int:
    """Tokens by layers that a record's program runs."""
    tokens = record.tokens
    return layer_tokens(Program.parse(record.program), tokens.input, tokens.output, cached=tokens.cached)


def cut(request: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The request, or one time in five one that is cut while it waits, is read or is answered."""
    return {**request, "passes": draw.randint(1, 20)} if draw.random() < 0.2 else request


def is_as_alone(asked: dict[str, Any], batch: dict[str, Any], alone: list[list[int]]) -> bool:
    """Whether answers are those of the requests alone, as far as they were not cut."""
    rows = zip(asked["requests"], batch["answers"], alone, strict=True)
    return all(
        answer["ids"] == (one[: len(answer["ids"])] if "passes" in request else one) for request, answer, one in rows
    )


def closes(
    asked: dict[str, Any], batch: dict[str, Any], before: dict[str, int], after: dict[str, int], whole: str = "0-29"
) -> bool:
    """Whether a worker counted for a batch what the formula needs for its answers; `whole` is full depth."""
    formula = [
        layer_tokens(Program.parse(request["program"] or whole), len(request["ids"]), len(ids), cached=answer["cached"])
        for request, answer in zip(asked["requests"], batch["answers"], strict=True)
        if (ids := answer["ids"])
    ]
    return useful(after) - useful(before) == sum(formula)


def useful(sums: dict[str, int]) -> int:
    """Tokens by layers that a worker ran and did not waste."""
    return sums["executed"] - sum(sums[kind] for kind in ("replayed", "rejected", "unread", "late"))


def alike(one: UsageRecord, other: UsageRecord) -> bool:
    """Whether two records are of the same program and as many tokens."""
    return (one.program, one.tokens.input, one.tokens.cached, one.tokens.output) == (
        other.program, other.tokens.input, other.tokens.cached, other.tokens.output,
    )  # fmt: skip


def texts(model: PolarModel, count: int, least: int, most: int, seed: int) -> list[str]:
    """Prompts of some `least` to some `most` tokens, made of the ones that come with the package."""
    draw = random.Random(seed)
    words = [item.prompt for item in builtin_items() if hasattr(item, "prompt")]
    made = []
    for number in range(count):
        wanted, text = least + (most - least) * number // max(count - 1, 1), ""
        while len(model.encode(text)) < wanted:
            text += f"{draw.choice(words)}\n"
        made.append(text[: int(len(text) * min(1.0, wanted / len(model.encode(text))))])
    return made


def some_fill(model: PolarModel, folder: Path, segment: Segment = (20, 29), spread: float = 0.01) -> Path:
    """A map of random numbers: how long it takes does not depend on them. The default is the one that the cut needs."""
    family, layers = model.decoder.family, segment[1] - segment[0] + 1
    numbers = torch.Generator().manual_seed(0)
    shape = layers, 2, family.kv_heads, family.head_dim
    weight = torch.randn(family.hidden, torch.Size(shape).numel(), generator=numbers) * spread
    maps = {segment: Fill((weight,), torch.zeros(shape))}
    facts = MapFacts(
        kind="fill", model=model.name, fingerprint=model.fingerprint, dtype="float32", storage="exact",
        segments=(MapRecord.of(segment, maps[segment], None),), data="", training={},
    )  # fmt: skip
    return MapSet(facts, stored(maps, "exact")).save(folder)


if __name__ == "__main__":
    main()
