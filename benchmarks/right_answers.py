"""Whether tiers find what full depth finds, where the right answer is known: questions about notes, and facts by depth.

    python -m benchmarks.right_answers [--prompts 400] [--per-depth 60]

Notes are made from the grammar of `lab.notes`, with seeds that nothing was fitted, tuned or calibrated on. Answers are
greedy; F1 is that of the words of the right answer, and the drop against full depth is paired, prompt by prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

from benchmarks.results import RESULTS, Recorder
from benchmarks.router_texts import by_tier, record_depths, record_drop, written_answers
from polar_sdk import PolarModel
from polar_sdk.lab.evaluation.texts import f1
from polar_sdk.lab.notes import notes
from polar_sdk.router.store import router_folders

if TYPE_CHECKING:
    from polar_sdk.router.base import Router

_SEED: Final = 29


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400, help="questions about notes of 8 to 24 facts")
    parser.add_argument(
        "--per-depth", type=int, default=60, help="questions at each of five depths of notes of 34 facts"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = PolarModel.from_pretrained(ledger=None)
    certified = by_tier(model, next(router_folders(model.fingerprint)))
    tiers = {
        tier: router for tier, router in certified.items() if tier != "premium"
    }  # which runs such prompts as exact
    recorder = Recorder("right-answers", args.results)
    _record_f1(recorder, model, tiers, args.prompts)
    record_depths(recorder, model, tiers, args.per_depth, seed=_SEED)
    for figure in recorder.run.figures:
        bounds = "" if figure.low is None else f" ({figure.low:.2f} to {figure.high:.2f})"
        print(f"{figure.name}: {figure.value:.2f} {figure.unit}{bounds}")
    print(f"\nwrote {recorder.path}")


def _record_f1(recorder: Recorder, model: PolarModel, tiers: dict[str, Router], count: int) -> None:
    asked = notes(count, seed=_SEED)
    scores: dict[str, list[float]] = {}
    for tier, router in tiers.items():
        written = written_answers(model, [text.prompt for text in asked], router)
        scores[tier] = [f1(text, right.answer) for text, right in zip(written, asked, strict=True)]
        recorder.add(f"{tier}: F1 to the right answer", 100 * fmean(scores[tier]), "%", note=f"{count} prompts")
    for tier, own in scores.items():
        if tier != "exact":
            record_drop(recorder, f"{tier}: drop of F1 against exact", scores["exact"], own)


if __name__ == "__main__":
    main()
