"""Distance of each family from the untouched Hugging Face model; figures go to `--results`.

    python -m benchmarks.parity [--seeds 10]

Uses the tiny random models in float32 and the comparisons of the tests (`tests/sdk`); a number is the largest
difference of a logit divided by the largest logit. The tests allow 1e-5.
"""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import Recorder, arguments
from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.row import Row
from polar_sdk.programs.program import Program

TESTS = Path(__file__).parents[1] / "tests" / "sdk"
NAMES = {
    "llama": "Llama",
    "mistral": "Mistral (sliding window)",
    "qwen2": "Qwen 2 and 2.5",
    "qwen3": "Qwen 3 (normed heads)",
    "gemma2": "Gemma 2 (soft caps, local and global layers)",
    "gemma3_text": "Gemma 3 (two rotary tables, local and global layers)",
    "phi3": "Phi-3 (rotary turn of a part)",
    "gpt2": "GPT-2 (learned positions)",
    "gpt_neox": "GPT-NeoX, Pythia (parallel halves)",
    "opt": "OPT (learned positions, ReLU)",
    "mixtral": "Mixtral (mixture of experts)",
    "qwen2_moe": "Qwen 2 MoE (mixture of experts, one shared)",
}
COLUMNS = ("identity", "layers skipped and looped", "cached decoding", "mixed batch")
GAP = "largest difference of a logit ÷ largest logit"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="random programs per family and comparison")
    args = parser.parse_args()
    seeds, recorder = args.seeds, Recorder("parity", args.results)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tests = runpy.run_path(str(TESTS / "engine" / "test_parity.py")) | runpy.run_path(str(TESTS / "conftest.py"))
    for family in tests["FAMILIES"]:
        model = tests["build_family"](family)
        gaps = [
            _identity(tests, model),
            _programs(tests, model),
            _decoding(tests, model, seeds, same=True),
            _decoding(tests, model, seeds, same=False),
        ]
        label = f"{NAMES[family]}, `{family}`"
        for column, gap in zip(COLUMNS, gaps, strict=True):
            recorder.add(f"{label}: {column}", gap, GAP, goal=1e-5, better="lower")
        recorder.add(f"{label}: FLOPs off", _flops(tests, model), "FLOPs", goal=0, better="lower")


def _gap(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0))


def _identity(tests: dict[str, Any], model: Any) -> float:
    tokens = tests["random_tokens"](random.Random(1), 90)
    ours = tests["all_logits"](build_decoder(model), Program.identity(tests["DEPTH"]), tokens)
    return _gap(ours, tests["reference_logits"](model, tokens))


def _programs(tests: dict[str, Any], model: Any) -> float:
    decoder, tokens, worst = build_decoder(model), tests["random_tokens"](random.Random(2), 40), 0.0
    for text in tests["PROGRAMS"]:
        program = Program.parse(text)
        reference = tests["reference_logits"](tests["reference_model"](model, program), tokens)
        worst = max(worst, _gap(tests["all_logits"](decoder, program, tokens), reference))
    return worst


def _decoding(tests: dict[str, Any], model: Any, seeds: int, *, same: bool) -> float:
    """Prefill and decode steps of three ragged rows, of one program or of three, against each row recomputed alone."""
    worst = 0.0
    for seed in range(seeds):
        rng, decoder = random.Random(seed), build_decoder(model)
        programs = [tests["random_program"](rng)] * 3 if same else [tests["random_program"](rng) for _ in range(3)]
        for program, tokens, steps in zip(programs, *tests["decode"](decoder, programs, rng), strict=True):
            whole = tests["all_logits"](decoder, program, tokens)
            worst = max(worst, _gap(torch.stack(steps), whole[-len(steps) :]))
    return worst


def _flops(tests: dict[str, Any], model: Any) -> int:
    """Error of the metered FLOPs: prefill of a ragged batch of different programs, and a decode step of each row.

    Rows that decode together are padded, and padding is metered for nobody.
    """
    decoder = build_decoder(model)
    rows = [Row(decoder, Program.parse(text)) for text in tests["PROGRAMS"]]
    with FlopCounterMode(display=False) as counter:
        next_logits(decoder, rows, [[3] * (5 + 4 * index) for index in range(len(rows))])
        for row in rows:
            next_logits(decoder, [row], [[4]])
    return abs(int(sum(row.work.flops().total for row in rows) - counter.get_total_flops()))


if __name__ == "__main__":
    main()
