"""Speed and memory of the engine beside Hugging Face `generate` and llama.cpp, and beside itself at full depth.

    python -m benchmarks.engine [--model NAME] [--gguf FILE] [--device cuda] [--rounds 5] [--only decode,prefill]

All systems run in turn, round by round, so that a slow moment of the machine meets all of them; a ratio is the median
over the rounds. Prompts are new in every round, so that no prefix cache helps. Prints a Markdown table, and as the last
line one JSON object. llama.cpp needs `pip install --group bench`; without it, or off the CPU, its ratio is null.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.peers import HuggingFace, LlamaCpp, apart, timed
from polar_sdk import PolarModel, Program
from polar_sdk.engine.scoring import Question, score_questions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polar_sdk.request.generation import Generation

SPIN = "600"
"""Turns that a waiting OpenMP thread makes before it sleeps (GOMP_SPINCOUNT); `benchmarks/RESULTS.md` says why 600."""
NEW, PREFILL, ROWS, ROW_NEW, QUESTIONS = 64, 512, 16, 48, 16
LEAN, MEAN = 0.6, 0.7
Result = dict[str, float | None]


def main() -> None:
    args = _arguments()
    bench = Bench(args)
    names = args.only.split(",") if args.only else list(MEASURES)
    facts: Result = {}
    print(f"{bench.model('bf16').name}, {bench.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| what | ours | peer | ratio |\n|---|---|---|---|", flush=True)
    for name in names:
        facts |= MEASURES[name](bench)
    print("\n" + json.dumps(facts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp; fetched for the default model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help=f"some of: {','.join(MEASURES)}")
    return parser.parse_args()


class Bench:
    """The systems, loaded when first asked for, and prompts without end."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: str = args.device
        self._random = random.Random(0)
        self._models: dict[str, PolarModel] = {}

    def model(self, precision: str) -> PolarModel:
        """The engine's model in this precision, compiled."""
        if precision not in self._models:
            self._models[precision] = apart(
                lambda: PolarModel.from_pretrained(
                    self.args.model, precision=precision, device=self.device, compile=True, ledger=None
                )
            )
        return self._models[precision]

    @cached_property
    def hugging_face(self) -> HuggingFace:
        """The same weights in transformers."""
        return apart(lambda: HuggingFace(self.model("bf16").loaded.path, "bfloat16", self.device))

    @cached_property
    def llama(self) -> LlamaCpp | None:
        """The same model in llama.cpp; None where it cannot run."""
        gguf = self.args.gguf or _fetch_gguf(self.args.model)
        try:
            return None if self.device != "cpu" or gguf is None else LlamaCpp(gguf, torch.get_num_threads())
        except ImportError:
            return None

    @cached_property
    def _words(self) -> list[str]:
        """Words that are one token each."""
        words = "light sea stone letter house old storm ship road river night tree voice door winter paper hand moon"
        return [f" {word}" for word in words.split() if len(self.model("bf16").encode(f" {word}")) == 1]

    def prompt(self, tokens: int) -> str:
        """A text of that many tokens that has not been used before."""
        return "".join(self._random.choices(self._words, k=tokens))

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a text."""
        return self.model("bf16").encode(prompt)

    def answer(self, precision: str, prompt: str, new: int, program: Program | None = None) -> float:
        """Seconds that the engine takes for one request."""
        model = self.model(precision)
        chosen = program or Program.identity(model.depth)
        return timed(lambda: model.generate(prompt, template="raw", max_tokens=new, program=chosen))

    def alternate(self, *runs: Callable[[], float]) -> list[list[float]]:
        """What each run returns, round by round, after one round to warm up; nobody's threads are left from before."""
        results: list[list[float]] = [[] for _ in runs]
        for number in range(self.args.rounds + 1):
            for result, run in zip(results, runs, strict=True):
                _rest()
                value = run()
                if number:
                    result.append(value)
        return results


def _rest() -> None:
    """Wait until the engine's thread has ended, and with it its pool of OpenMP threads."""
    while any(thread.name == "polar-engine" for thread in threading.enumerate()):
        time.sleep(0.05)


def _fetch_gguf(model: str | None) -> Path | None:
    if model is not None:
        return None
    from polar_sdk.models.aliases import ALIASES
    from polar_sdk.models.fetch import get_gguf

    return get_gguf(ALIASES[0], Path(tempfile.mkdtemp(prefix="polar-bench-")))


def _row(what: str, results: Sequence[Sequence[float]], unit: str = "tokens/s") -> float:
    """Print a line of the table from our results and a peer's, per round; returns the median ratio."""
    ours, peer = results
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    cells = [f"{statistics.median(one):.3g} ({min(one):.3g} to {max(one):.3g}) {unit}" for one in (ours, peer)]
    print(f"| {what} | {cells[0]} | {cells[1]} | **{ratio:.2f}** |", flush=True)
    return round(ratio, 3)


def _decode_speed(answer: Callable[[str, int], float], prompt: str) -> float:
    """Tokens per second after the first token."""
    first = answer(prompt, 1)
    return (NEW - 1) / (answer(prompt, NEW) - first)


def decode(bench: Bench) -> Result:
    def ours(precision: str) -> Callable[[], float]:
        return lambda: _decode_speed(lambda text, new: bench.answer(precision, text, new), bench.prompt(40))

    def hugging_face() -> float:
        return _decode_speed(lambda text, new: bench.hugging_face.generate([bench.ids(text)], new), bench.prompt(40))

    speeds = bench.alternate(ours("bf16"), hugging_face)
    return {"decode_vs_hf": _row("decode, batch 1, bf16; Hugging Face bf16", speeds)}


def decode_integers(bench: Bench) -> Result:
    llama = bench.llama
    if llama is None:
        return {"decode_vs_llamacpp": None}

    def ours(precision: str) -> Callable[[], float]:
        return lambda: _decode_speed(lambda text, new: bench.answer(precision, text, new), bench.prompt(40))

    def peer() -> float:
        return _decode_speed(lambda text, new: llama.generate(bench.ids(text), new), bench.prompt(40))

    int4, int8, theirs = bench.alternate(ours("int4"), ours("int8"), peer)
    _row("decode, batch 1, int8; llama.cpp Q4_1", [int8, theirs])
    return {"decode_vs_llamacpp": _row("decode, batch 1, int4; llama.cpp Q4_1", [int4, theirs])}


def prefill(bench: Bench) -> Result:
    def ours(precision: str) -> Callable[[], float]:
        return lambda: PREFILL / bench.answer(precision, bench.prompt(PREFILL), 1)

    def hugging_face() -> float:
        return PREFILL / bench.hugging_face.generate([bench.ids(bench.prompt(PREFILL))], 1)

    bf16, int8, int4, theirs = bench.alternate(ours("bf16"), ours("int8"), ours("int4"), hugging_face)
    _row("prefill 512, int8; Hugging Face bf16", [int8, theirs])
    _row("prefill 512, int4; Hugging Face bf16", [int4, theirs])
    return {"prefill_vs_hf": _row("prefill 512, bf16; Hugging Face bf16", [bf16, theirs])}


def lean_program(bench: Bench) -> Result:
    """Does a program with fewer FLOPs take as much less time?"""
    model = bench.model("bf16")
    identity, lean = Program.identity(model.depth), _programs(model, 1, LEAN, PREFILL, 1)[0]
    facts: Result = {}
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
        ratio = _row(f"{name}, time of a program with {share:.0%} of the FLOPs; identity", times, unit="s")
        facts[f"time_over_flops_{name}"] = round(ratio / share, 3)
    return facts


def _programs(model: PolarModel, count: int, share: float, prompt: int, output: int) -> list[Program]:
    """Random programs of about that share of identity's FLOPs, all different, without repeated layers."""
    chooser = random.Random(1)
    full = model.cost(prompt=prompt, output=output).total
    found: list[Program] = []
    while len(found) < count:
        layers = list(range(model.depth))
        while model.cost(_program(layers), prompt=prompt, output=output).total > share * full:
            layers.remove(chooser.choice(layers[2:-1]))
        if (program := _program(layers)) not in found:
            found.append(program)
    return found


def _program(layers: Sequence[int]) -> Program:
    return Program.parse(" ".join(map(str, layers)))


def mixed_programs(bench: Bench) -> Result:
    model = bench.model("bf16")
    mixed = _programs(model, ROWS, MEAN, 64, ROW_NEW)
    same = [Program.identity(model.depth)] * ROWS

    def run(programs: Sequence[Program]) -> float:
        prompts = [bench.prompt(48 + 2 * row) for row in range(ROWS)]
        begin = time.perf_counter()
        answers = model.generate_batch(
            prompts, each=[{"program": one} for one in programs], template="raw", max_tokens=ROW_NEW
        )
        return _new_tokens(answers) / (time.perf_counter() - begin)

    speeds = bench.alternate(lambda: run(mixed), lambda: run(same))
    what = "16 requests of 64 tokens, 48 new, 16 programs at 70 % of the FLOPs; 16 at identity"
    return {"mixed_programs_gain": _row(what, speeds)}


def _new_tokens(answers: Sequence[Generation]) -> int:
    return sum(len(one.token_ids) for one in answers)


def concurrent(bench: Bench) -> Result:
    model = bench.model("bf16")
    identity = Program.identity(model.depth)

    def ours() -> float:
        prompts = [bench.prompt(48 + 2 * row) for row in range(ROWS)]
        with ThreadPoolExecutor(ROWS) as callers:
            begin = time.perf_counter()
            answers = list(
                callers.map(
                    lambda text: model.generate(text, template="raw", max_tokens=ROW_NEW, program=identity), prompts
                )
            )
            return _new_tokens(answers) / (time.perf_counter() - begin)

    def hugging_face() -> float:
        prompts = [bench.ids(bench.prompt(48 + 2 * row)) for row in range(ROWS)]
        return ROWS * ROW_NEW / bench.hugging_face.generate(prompts, ROW_NEW)

    speeds = bench.alternate(ours, hugging_face)
    return {"concurrent_vs_hf": _row("16 concurrent requests, bf16; Hugging Face, one batch of 16", speeds)}


def scoring(bench: Bench) -> Result:
    model = bench.model("bf16")
    identity = Program.identity(model.depth)

    def questions() -> list[tuple[list[int], list[list[int]]]]:
        sizes = [(36 + number % 9, 3 + number % 5) for number in range(QUESTIONS)]
        return [
            (bench.ids(bench.prompt(prompt)), [bench.ids(bench.prompt(choice)) for _ in range(4)])
            for prompt, choice in sizes
        ]

    def ours() -> float:
        asked = [Question(tuple(prompt), tuple(map(tuple, choices))) for prompt, choices in questions()]
        return QUESTIONS / apart(lambda: timed(lambda: score_questions(model.loaded.decoder, asked, identity)))

    def hugging_face() -> float:
        return QUESTIONS / bench.hugging_face.score(questions())

    speeds = bench.alternate(ours, hugging_face)
    what = "4-choice questions; Hugging Face, one padded pass per choice"
    return {"scoring_vs_hf": _row(what, speeds, unit="questions/s")}


def memory(bench: Bench) -> Result:
    command = [sys.executable, "-m", "benchmarks.memory", "--device", bench.device]
    command += ["--model", bench.args.model] if bench.args.model else []
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    facts = json.loads(ended.stdout.splitlines()[-1])
    grown, least = facts["peak"] - facts["after_imports"], facts["weights"] + facts["keys_and_values"]
    mib = {name: f"{size / 2**20:.0f} MiB" for name, size in (facts | {"grown": grown, "least": least}).items()}
    print(
        f"| memory, 4 requests of 1,024 tokens: peak {mib['peak']}, after imports {mib['after_imports']} "
        f"| grown by {mib['grown']} | weights {mib['weights']} + KV {mib['keys_and_values']} "
        f"| **{grown / least:.2f}** |"
    )
    return {"rss_ratio": round(grown / least, 3)}


MEASURES: dict[str, Callable[[Bench], Result]] = {
    "decode": decode,
    "decode_integers": decode_integers,
    "prefill": prefill,
    "lean_program": lean_program,
    "mixed_programs": mixed_programs,
    "concurrent": concurrent,
    "scoring": scoring,
    "memory": memory,
}

if __name__ == "__main__":
    if os.environ.get("GOMP_SPINCOUNT") != SPIN:  # OpenMP reads it when torch is imported
        os.environ["GOMP_SPINCOUNT"] = SPIN
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]])
    main()
