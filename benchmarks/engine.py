"""Speed and memory of the engine compared with Hugging Face `generate`, llama.cpp, and itself at full depth.

    python -m benchmarks.engine [--model NAME] [--gguf FILE] [--device cuda] [--rounds 5] [--only decode,prefill]

All systems run in turn, round by round, so that a slow moment of the machine affects all of them; a ratio is the median
over the rounds. Every prompt is run from its beginning: no starts are shared. Prints a Markdown table and writes the
figures to `--results`. llama.cpp needs `pip install --group bench`; without it, or on a GPU, it is left out.
"""

from __future__ import annotations

import itertools
import random
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import drafts as drafting
from benchmarks.memory import prompt_growth
from benchmarks.peers import HuggingFace, LlamaCpp, alternate, apart, plain_folder, quantized, timed
from benchmarks.results import Machine, Recorder, arguments
from benchmarks.router_texts import filling
from polar_sdk import PolarModel, Policy, Program
from polar_sdk.engine.pack import Question
from polar_sdk.engine.scoring import score_questions
from polar_sdk.serving.places import Limits
from polar_sdk.testing import random_fill

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from polar_sdk.request.generation import Generation

NEW, PREFILL, ROWS, ROW_NEW, QUESTIONS = 64, 512, 16, 48, 16
LEAN, MEAN = 0.6, 0.7
STARTS = 8
"""Questions of a round whose start is shared."""
LONG_PROMPTS = (2048, 8000)
"""Prompts of more than one page of text, in tokens."""
LONG, CUTS = 1000, (0.9, 0.8, 0.733, 0.667, 0.6)
"""A prompt with notes, in tokens, and the shares of the layers from which on it is filled where no router serves."""


def main() -> None:
    args = _arguments()
    bench = Bench(args)
    names = args.only.split(",") if args.only else list(MEASURES)
    print(f"{bench.model('bf16').name}, {bench.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for name in names:
        MEASURES[name](bench)
    print(f"\nwrote {bench.recorder.path}")


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp; fetched for the default model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help=f"some of: {','.join(MEASURES)}")
    return parser.parse_args()


class Bench:
    """The systems, loaded on first use, and an endless supply of prompts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: str = args.device
        kernels = Machine.here().kernels if self.device == "cpu" else ""
        self.recorder = Recorder("engine", args.results, model=args.model, device=self.device, kernels=kernels)
        self._random = random.Random(0)
        self._models: dict[str, PolarModel] = {}

    def model(self, precision: str) -> PolarModel:
        """The engine's model in this precision."""
        if precision not in self._models:
            model = self._models[precision] = apart(
                lambda: PolarModel.from_pretrained(
                    self.args.model,
                    precision=precision,
                    device=self.device,
                    ledger=None,
                    speculate="off",  # what a pass takes is compared, except by `drafts`
                )
            )
            model.scheduler.limits = Limits(prefix_share=0)  # except by `starts`
        return self._models[precision]

    @cached_property
    def hugging_face(self) -> HuggingFace:
        """The same weights in transformers."""
        return apart(lambda: HuggingFace(plain_folder(self.model("bf16")), "bfloat16", self.device))

    @cached_property
    def llama(self) -> dict[str, LlamaCpp]:
        """The same model in llama.cpp by its kind of numbers, those of `INTEGERS`; empty where it cannot run."""
        gguf = self.args.gguf or _fetch_gguf(self.args.model)
        kinds = [kind for each in INTEGERS.values() for kind in each]
        try:
            if self.device != "cpu" or gguf is None:
                return {}
            return {kind: LlamaCpp(quantized(gguf, kind), torch.get_num_threads()) for kind in kinds}
        except ImportError:
            return {}

    @cached_property
    def _words(self) -> list[str]:
        """Words that are one token each."""
        words = "light sea stone letter house old storm ship road river night tree voice door winter paper hand moon"
        return [f" {word}" for word in words.split() if len(self.model("bf16").encode(f" {word}")) == 1]

    def prompt(self, tokens: int) -> str:
        """A new text of that many tokens."""
        return "".join(self._random.choices(self._words, k=tokens))

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a text."""
        return self.model("bf16").encode(prompt)

    def answer(self, precision: str, prompt: str, new: int, program: Program | None = None) -> float:
        """Seconds that the engine takes for one request."""
        model = self.model(precision)
        chosen = program or Program.identity(model.depth)
        return timed(lambda: model.generate(prompt, template="raw", max_tokens=new, program=chosen))

    def decode(self, precision: str) -> float:
        """Tokens per second of one request in the engine, after the first token."""
        return decode_speed(lambda text, new: self.answer(precision, text, new), self.prompt(40))

    def decode_hf(self) -> float:
        """The same in transformers."""
        return decode_speed(lambda text, new: self.hugging_face.generate([self.ids(text)], new), self.prompt(40))

    def prefill(self, precision: str, tokens: int = PREFILL) -> float:
        """Tokens of a prompt per second in the engine."""
        return tokens / self.answer(precision, self.prompt(tokens), 1)

    def prefill_hf(self, tokens: int = PREFILL) -> float:
        """The same in transformers."""
        return tokens / self.hugging_face.generate([self.ids(self.prompt(tokens))], 1)

    def compare(
        self, name: str, results: Sequence[Sequence[float]], peer: str, *, unit: str = "tokens/s", **facts: Any
    ) -> float:
        """Record our results and the peer's, per round; returns the median ratio."""
        ours, theirs = results
        return self.recorder.compare(name, ours, theirs, unit, peer=peer, **facts)

    def alternate(self, *runs: Callable[[], float]) -> list[list[float]]:
        """See `peers.alternate`; no threads are left over between runs."""
        return alternate(self.args.rounds, *runs, before=_rest)


def decode_speed(answer: Callable[[str, int], float], prompt: str) -> float:
    """Tokens per second after the first token."""
    first = answer(prompt, 1)
    return (NEW - 1) / (answer(prompt, NEW) - first)


def _rest() -> None:
    """Wait until the engine's thread has ended, and with it its pool of OpenMP threads."""
    while any(thread.name == "polar-engine" for thread in threading.enumerate()):
        time.sleep(0.05)


def _fetch_gguf(model: str | None) -> Path | None:
    if model is not None:
        return None
    from polar_sdk.models.aliases import ALIASES
    from polar_sdk.models.find import obtain

    return obtain(ALIASES[0]).weights[0]


PLAIN = "the same without drafts"
SLOWEST_OF = 40
"""Prompts, of which the one that gains least by drafts is shown."""
HF, HF_BATCH = "Hugging Face `generate`, bf16", "Hugging Face `generate`, one batch of 16, bf16"
IDENTITY = "the same at full depth"
INTEGERS = {"int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1", "IQ4_NL")}
"""Kinds of numbers that llama.cpp stores the weights in, to be compared with each precision; the fastest counts."""


def decode(bench: Bench) -> None:
    """One row that decodes, in bf16."""
    speeds = bench.alternate(partial(bench.decode, "bf16"), bench.decode_hf)
    bench.compare("decode, batch 1, bf16", speeds, HF, goal=3)


def decode_integers(bench: Bench) -> None:
    """One row that decodes with integer weights, beside llama.cpp's best kind of the same size."""
    peers = bench.llama
    if not peers:
        print("llama.cpp is not available", flush=True)
        return

    def peer(llama: LlamaCpp) -> Callable[[], float]:
        return lambda: decode_speed(lambda text, new: llama.generate(bench.ids(text), new), bench.prompt(40))

    ours = [partial(bench.decode, precision) for precision in INTEGERS]
    speeds = bench.alternate(*ours, *map(peer, peers.values()))
    theirs = dict(zip(peers, speeds[len(ours) :], strict=True))
    for precision, own, goal in zip(INTEGERS, speeds, (1.15, 1.5), strict=False):
        best = max(INTEGERS[precision], key=lambda kind: statistics.median(theirs[kind]))
        bench.compare(f"decode, batch 1, {precision}", [own, theirs[best]], f"llama.cpp, {best}", goal=goal)


def prefill(bench: Bench) -> None:
    """A prompt of 512 tokens."""
    precisions = {"bf16": 1.5, "int8": None, "int4": None}
    *ours, theirs = bench.alternate(*(partial(bench.prefill, one) for one in precisions), bench.prefill_hf)
    for (precision, goal), own in zip(precisions.items(), ours, strict=True):
        bench.compare(f"prefill of 512 tokens, {precision}", [own, theirs], HF, goal=goal)


def long_prompts(bench: Bench) -> None:
    """Prompts of a long text: tokens per second, and how much memory each takes at its peak."""
    for tokens in LONG_PROMPTS:
        speeds = bench.alternate(partial(bench.prefill, "bf16", tokens), partial(bench.prefill_hf, tokens))
        goal = 1.5 if tokens == LONG_PROMPTS[0] else None
        bench.compare(f"prefill of {tokens:,} tokens, bf16", speeds, HF, goal=goal)
        if bench.device != "cpu":
            continue
        grown, theirs = (prompt_growth(bench.args.model, tokens, system) for system in ("ours", "hf"))
        bench.recorder.add(
            f"memory of a prompt of {tokens:,} tokens", grown, "MiB",
            peer=HF, peer_value=theirs, ratio=grown / theirs, better="lower",
        )  # fmt: skip


def lean_program(bench: Bench) -> None:
    """Time of a program with fewer FLOPs, over its share of them."""
    model = bench.model("bf16")
    identity, lean = Program.identity(model.depth), _programs(model, 1, LEAN, PREFILL, 1)[0]
    for name, prompt, new in (("prefill", PREFILL, 1), ("decode", 40, NEW)):

        def seconds(program: Program, prompt: int = prompt, new: int = new) -> float:
            text = bench.prompt(prompt)
            first = bench.answer("bf16", text, 1, program) if new > 1 else 0.0
            return bench.answer("bf16", text, new, program) - first

        def flops(program: Program, prompt: int = prompt, new: int = new) -> float:
            first = model.cost(program, prompt=prompt, output=1).total if new > 1 else 0
            return model.cost(program, prompt=prompt, output=new).total - first

        share = flops(lean) / flops(identity)
        times = bench.alternate(partial(seconds, lean), partial(seconds, identity))
        note = f"program with {share:.0%} of the FLOPs"
        ratio = bench.compare(f"{name}, time of a shorter program", times, IDENTITY, unit="s", note=note)
        bench.recorder.add(f"{name}, time ÷ FLOPs", ratio / share, "", goal=1.05, better="lower", note=note)


def fills(bench: Bench) -> None:
    """Does a prompt of which layers are filled take proportionally less time to its first token?

    By the programs of the router that serves. Without one by cuts with random maps: what a fill writes does not change
    how long it takes. No two prompts are of one length, since what is made ready for a length takes time as well.
    """
    lengths = iter(range(LONG, 0, -1))
    served = bench.model("bf16")
    decoder, depth = served.decoder, served.depth
    identity = Program.identity(depth)
    programs = filling(served.router)
    if not programs:
        segments = [(round(share * depth), depth - 1) for share in CUTS]
        decoder.set_fills({**decoder.fills, **{segment: random_fill(decoder, segment) for segment in segments}})
        programs = [Program.filling(depth, [segment]) for segment in segments]
    model = PolarModel(served.loaded, policy=Policy.permissive(), ledger=None)

    def seconds(program: Program) -> float:
        prompt = bench.prompt(next(lengths))
        return timed(lambda: model.generate(prompt, template="raw", max_tokens=1, program=program))

    for program in programs:
        share = decoder.cost.prefill(program, LONG) / decoder.cost.prefill(identity, LONG)
        times = bench.alternate(partial(seconds, program), partial(seconds, identity))
        name, note = f"first token of {LONG} tokens, {program.text}", f"{share:.0%} of the prompt's FLOPs"
        note += "; from that length down, no two alike"
        ratio = bench.compare(name, times, IDENTITY, unit="s", note=note)
        bench.recorder.add(f"{name}, time ÷ FLOPs", ratio / share, "", goal=1.08, better="lower", note=note)


def _programs(model: PolarModel, count: int, share: float, prompt: int, output: int) -> list[Program]:
    """Random programs of about that share of identity's FLOPs, all different, without repeated layers."""
    chooser = random.Random(1)
    full = model.cost(prompt=prompt, output=output).total
    programs: list[Program] = []
    while len(programs) < count:
        layers = list(range(model.depth))
        while model.cost(_program(layers), prompt=prompt, output=output).total > share * full:
            layers.remove(chooser.choice(layers[2:-1]))
        if (program := _program(layers)) not in programs:
            programs.append(program)
    return programs


def _program(layers: Sequence[int]) -> Program:
    return Program.parse(" ".join(map(str, layers)))


def mixed_programs(bench: Bench) -> None:
    model = bench.model("bf16")
    mixed = _programs(model, ROWS, MEAN, 64, ROW_NEW)
    same = [Program.identity(model.depth)] * ROWS

    def run(programs: Sequence[Program]) -> float:
        prompts = [bench.prompt(48 + 2 * row) for row in range(ROWS)]
        begin = time.perf_counter()
        answers = model.generate_batch(
            prompts, each=[{"program": program} for program in programs], template="raw", max_tokens=ROW_NEW
        )
        return _new_tokens(answers) / (time.perf_counter() - begin)

    speeds = bench.alternate(lambda: run(mixed), lambda: run(same))
    name = "16 requests at once, 16 programs at 70% of the FLOPs"
    bench.compare(name, speeds, IDENTITY, goal=1.35)


def _new_tokens(answers: Sequence[Generation]) -> int:
    return sum(len(answer.token_ids) for answer in answers)


def concurrent(bench: Bench) -> None:
    model = bench.model("bf16")
    identity = Program.identity(model.depth)

    def ours(**options: Any) -> float:
        prompts = [bench.prompt(48 + 2 * row) for row in range(ROWS)]
        options |= {"template": "raw", "max_tokens": ROW_NEW, "program": identity}
        with ThreadPoolExecutor(ROWS) as callers:
            begin = time.perf_counter()
            answers = list(callers.map(lambda text: model.generate(text, **options), prompts))
            return _new_tokens(answers) / (time.perf_counter() - begin)

    def hugging_face() -> float:
        prompts = [bench.ids(bench.prompt(48 + 2 * row)) for row in range(ROWS)]
        return ROWS * ROW_NEW / bench.hugging_face.generate(prompts, ROW_NEW)

    speeds = bench.alternate(ours, hugging_face)
    bench.compare("16 requests at once, bf16", speeds, HF_BATCH, goal=2.5)
    for name, sampling in (
        ("top-p 0.95", {"temperature": 1.0, "top_p": 0.95}),
        ("temperature 0.8", {"temperature": 0.8}),
    ):
        speeds = bench.alternate(partial(ours, **sampling), ours)
        bench.compare(f"16 sampled requests at once, {name}, bf16", speeds, "the same, greedy", goal=0.85)


def constrained(bench: Bench) -> None:
    """Tokens per second of answers by a JSON schema, beside free ones of the same length, both without drafts."""
    model = bench.model("bf16")
    identity = Program.identity(model.depth)
    item = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}
    schema = {"type": "array", "items": {**item, "required": ["name", "n"], "additionalProperties": False}}

    def run(rows: int, **options: Any) -> float:
        prompts = [bench.prompt(48) for _ in range(rows)]
        options |= {"template": "raw", "program": identity, "temperature": 1.0, "top_k": 50, "max_tokens": 2 * NEW}
        options |= {"speculate": "off"}  # how much they bring depends on what is said
        each: Any = [{"seed": row} for row in range(rows)]
        answers = model.generate_batch(prompts, each=each, **options)
        longest = max(answers, key=lambda answer: len(answer.token_ids))
        return (len(longest.token_ids) - 1) / longest.usage.decode_ns * 1e9 * rows

    for rows in (1, ROWS):
        speeds = bench.alternate(partial(run, rows, schema={**schema, "minItems": 6}), partial(run, rows))
        bench.compare(f"decode by a JSON schema, {rows} rows, bf16", speeds, "the same without", goal=0.95)


def scoring(bench: Bench) -> None:
    model = bench.model("bf16")
    identity = Program.identity(model.depth)

    def questions() -> list[tuple[list[int], list[list[int]]]]:
        sizes = [(36 + index % 9, 3 + index % 5) for index in range(QUESTIONS)]
        return [
            (bench.ids(bench.prompt(prompt)), [bench.ids(bench.prompt(choice)) for _ in range(4)])
            for prompt, choice in sizes
        ]

    def ours() -> float:
        batch = [Question(tuple(prompt), tuple(map(tuple, choices))) for prompt, choices in questions()]
        return QUESTIONS / apart(lambda: timed(lambda: score_questions(model.loaded.decoder, batch, identity)))

    def hugging_face() -> float:
        return QUESTIONS / bench.hugging_face.score(questions())

    speeds = bench.alternate(ours, hugging_face)
    peer = "Hugging Face, one padded pass per choice"
    bench.compare("questions with 4 choices, bf16", speeds, peer, goal=6, unit="questions/s")


def starts(bench: Bench) -> None:
    """Time to a question's first token where the chat template before it has run for another one."""
    model = bench.model("bf16")
    identity = Program.identity(model.depth)
    questions = itertools.cycle(drafting.chat_questions())
    flops: dict[float, list[int]] = {0.0: [], Limits().prefix_share: []}

    def seconds(share: float) -> float:
        model.scheduler.limits = Limits(prefix_share=share)
        times = []
        for _ in range(STARTS):
            question = next(questions)
            begin = time.perf_counter()
            answer = model.generate(question, max_tokens=1, program=identity, tenant=f"starts {share}")
            times.append(time.perf_counter() - begin)
            flops[share].append(answer.usage.flops.layers_prefill)
        return statistics.median(times)

    try:
        speeds = bench.alternate(*(partial(seconds, share) for share in reversed(flops)))
    finally:
        model.scheduler.limits = Limits(prefix_share=0)
    alone, shared = (statistics.fmean(values) for values in flops.values())
    note = f"{shared / alone:.0%} of the prompt's FLOPs"
    peer = "the same from the beginning"
    bench.compare("first token of a chat question, bf16", speeds, peer, unit="s", better="lower", note=note)


def drafts(bench: Bench) -> None:
    """Speed of answers with drafts beside those without."""
    model = bench.model("bf16")
    measured: dict[str, tuple[float | None, list[drafting.Pair]]] = {
        kind: (goal, drafting.measure(model, kind, bench.args.rounds, "auto"))
        for kind, (goal, _) in drafting.KINDS.items()
    }
    measured["chat_questions"] = None, drafting.measure_questions(model, "auto", after_others=False)
    measured["chat_after_others"] = None, drafting.measure_questions(model, "auto", after_others=True)
    for kind, (goal, pairs) in measured.items():
        passes = statistics.mean(pair.tokens_per_pass for pair in pairs)
        same = sum(pair.same for pair in pairs)
        note = f"{passes:.2f} tokens per pass; {same} of {len(pairs)} answers with the same tokens"
        speeds = [[pair.drafted for pair in pairs], [pair.plain for pair in pairs]]
        name = f"{kind.replace('_', ' ')} with drafts, bf16"
        bench.compare(name, speeds, PLAIN, goal=goal, note=note)


def drafts_slowest(bench: Bench) -> None:
    """The prompt that gains least by drafts."""
    rounds = bench.args.rounds
    slowest = drafting.measure_slowest(bench.model("bf16"), SLOWEST_OF, rounds, "auto")
    note = (
        f"the prompt that gains least of {SLOWEST_OF}, {rounds} rounds each; {slowest.below} under {drafting.LEAST}; "
        f"two answers without drafts, likewise: {slowest.chance:.3f}"
    )
    speeds = [slowest.drafted, slowest.plain]
    bench.compare("slowest prompt with drafts, bf16", speeds, PLAIN, goal=drafting.LEAST, note=note)


def memory(bench: Bench) -> None:
    """Memory of a process of its own, since a peak never falls again; it writes its own file."""
    folder, model = str(bench.recorder.path.parent), bench.args.model
    command = [sys.executable, "-m", "benchmarks.memory", "--device", bench.device, "--results", folder]
    ended = subprocess.run(
        [*command, *(["--model", model] if model else [])], check=True, stdout=subprocess.PIPE, text=True
    )
    print(ended.stdout, end="", flush=True)


MEASURES: dict[str, Callable[[Bench], None]] = {
    "decode": decode,
    "decode_integers": decode_integers,
    "prefill": prefill,
    "long_prompts": long_prompts,
    "lean_program": lean_program,
    "fills": fills,
    "mixed_programs": mixed_programs,
    "concurrent": concurrent,
    "constrained": constrained,
    "starts": starts,
    "drafts": drafts,
    "drafts_slowest": drafts_slowest,
    "scoring": scoring,
    "memory": memory,
}

if __name__ == "__main__":
    main()
