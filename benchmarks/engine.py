"""Decode and prefill speed beside Hugging Face `generate`, in one run: same weights, dtype, prompt and greedy decoding.

    python benchmarks/engine.py [--model NAME] [--dtype bfloat16] [--rounds 5] [--tokens 64]

Systems run in turn, round by round, so that a slow moment of the machine meets all of them; medians are printed as
Markdown, and the last line is one JSON object. Ratios are what to quote.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from polar_sdk import PolarModel, Program
from polar_sdk.cost import NOMINAL_OUTPUT, NOMINAL_PROMPT
from polar_sdk.engine.forward import Row, next_logits

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "Write a long story about a lighthouse keeper who finds a letter in a bottle. "
PREFILL_TOKENS = 512


def main() -> None:
    args = _arguments()
    engine = PolarModel.from_pretrained(args.model, dtype=args.dtype, ledger=None)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        engine.loaded.path, dtype=getattr(torch, engine.dtype), local_files_only=True
    )
    programs = {"identity": Program.identity(engine.depth)}
    programs |= {name: tier.program for name, tier in engine.policy.tiers.items() if name in ("economy", "standard")}
    decode = _decode_runs(engine, reference, programs, args.tokens)
    prefill = _prefill_runs(engine, reference, programs)
    speeds = {"decode": _alternate(decode, args.rounds), "prefill": _alternate(prefill, args.rounds)}
    _print(engine, programs, speeds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    return parser.parse_args()


def _decode_runs(
    engine: PolarModel, reference: Any, programs: dict[str, Program], tokens: int
) -> dict[str, Callable[[], float]]:
    """Name to a run that returns decoded tokens per second; the prefill's time is taken out of all of them alike."""
    prompt = engine.encode(PROMPT)
    ids = torch.tensor([prompt], device=engine.device)

    def hugging_face() -> float:
        def timed(new: int) -> float:
            begin = time.perf_counter()
            out = reference.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            assert out.shape[1] == len(prompt) + new
            return time.perf_counter() - begin

        return (tokens - 1) / (timed(tokens) - timed(1))

    def ours(program: Program) -> float:
        row = Row(engine.loaded.decoder, program, len(prompt) + tokens)
        with torch.inference_mode():
            token = int(next_logits(engine.loaded.decoder, [row], [prompt])[0].argmax())
            begin = time.perf_counter()
            for _ in range(tokens - 1):
                token = int(next_logits(engine.loaded.decoder, [row], [[token]])[0].argmax())
        return (tokens - 1) / (time.perf_counter() - begin)

    return {"hugging face": hugging_face} | {name: _bind(ours, program) for name, program in programs.items()}


def _prefill_runs(engine: PolarModel, reference: Any, programs: dict[str, Program]) -> dict[str, Callable[[], float]]:
    """Name to a run that returns prefilled tokens per second."""
    prompt = (engine.encode(PROMPT) * PREFILL_TOKENS)[:PREFILL_TOKENS]
    ids = torch.tensor([prompt], device=engine.device)

    def hugging_face() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            reference(ids, logits_to_keep=1, use_cache=True)
        return PREFILL_TOKENS / (time.perf_counter() - begin)

    def ours(program: Program) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            next_logits(engine.loaded.decoder, [Row(engine.loaded.decoder, program, PREFILL_TOKENS)], [prompt])
        return PREFILL_TOKENS / (time.perf_counter() - begin)

    return {"hugging face": hugging_face} | {name: _bind(ours, program) for name, program in programs.items()}


def _bind(run: Callable[[Program], float], program: Program) -> Callable[[], float]:
    return lambda: run(program)


def _alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every run, round by round after one warm-up."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            speed = run()
            if number:
                speeds[name].append(speed)
    return speeds


def _print(engine: PolarModel, programs: dict[str, Program], speeds: dict[str, dict[str, list[float]]]) -> None:
    print(
        f"{engine.name}, {engine.dtype}, {engine.device}, {torch.get_num_threads()} threads, torch {torch.__version__},"
    )
    print(f"{platform.machine()}; tokens per second, median (least to most), and median ratio to Hugging Face\n")
    print("| system | program | FLOPs | decode, batch 1 | ratio | prefill 512 | ratio |")
    print("|---|---|---|---|---|---|---|")
    facts: dict[str, float] = {}
    for name in speeds["decode"]:
        program = programs.get(name)
        share = 1.0 if program is None else _share(engine, program)
        cells = [name, "all layers" if program is None else program.text, f"{share:.1%}"]
        for kind, by_name in speeds.items():
            ratio = statistics.median(a / b for a, b in zip(by_name[name], by_name["hugging face"], strict=True))
            values = by_name[name]
            cells += [f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})", f"{ratio:.2f}"]
            facts[f"{kind}_{name.replace(' ', '_')}_vs_hf"] = round(ratio, 3)
        print("| " + " | ".join(cells) + " |")
    print("\n" + json.dumps(facts))


def _share(engine: PolarModel, program: Program) -> float:
    full = engine.cost(prompt=NOMINAL_PROMPT, output=NOMINAL_OUTPUT).total
    return engine.cost(program, prompt=NOMINAL_PROMPT, output=NOMINAL_OUTPUT).total / full


if __name__ == "__main__":
    main()
