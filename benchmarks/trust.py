"""Tiers under attack, and whether they keep instructions and refusals: `polar redteam` and the suites that ship.

    python -m benchmarks.trust [--only formats|refusals|redteam] [--model NAME] [--policy FILE] [--attempts N]
        [--tries N] [--seeds N] [--results FOLDER]

Answers are kept in the model's cache, so that a run that was interrupted goes on where it stopped. A busy machine
changes the time that it takes, and no figure.
"""

from __future__ import annotations

from benchmarks.problems import in_percent, record_suite
from benchmarks.results import Recorder, arguments
from polar_sdk import PolarModel, lab
from polar_sdk.show.progress import ProgressBars

SUITES = ("formats", "refusals")
TIERS = ("standard", "economy")
_FEWER = 90.0
"""Unit: percent."""


def main() -> None:
    """Measure, print and record."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=[*SUITES, "redteam"])
    parser.add_argument("--model")
    parser.add_argument("--policy")
    parser.add_argument("--attempts", type=int, default=500)
    parser.add_argument("--tries", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=100)
    args = parser.parse_args()
    model = PolarModel.from_pretrained(args.model, policy=args.policy, ledger=None)
    recorder = Recorder("trust", args.results, model=args.model)
    for suite in SUITES if args.only is None else set(SUITES) & {args.only}:
        with ProgressBars(quiet=False) as show:
            found = lab.evaluate_suite(model, suite, compute=TIERS, on_progress=show)
        record_suite(recorder, found, topic="instructions")
    if args.only in SUITES:
        return
    with ProgressBars(quiet=False) as show:
        attack = lab.redteam(model, attempts=args.attempts, tries=args.tries, seeds=args.seeds, on_progress=show)
    for one in attack.tiers:
        how = f"of {attack.attempts} attempts with {args.tries} versions each, on {attack.seeds} prompts"
        recorder.add(f"{one.tier}: without", one.without, "attempts", topic="redteam", note=how)
        for defence, count in one.alone.items():
            recorder.add(f"{one.tier}: {defence} alone", count, "attempts", topic="redteam")
        recorder.add(f"{one.tier}: all defences", one.defended, "attempts", topic="redteam")
        recorder.add(f"{one.tier}: strict, without", one.strict_without, "attempts", topic="redteam")
        recorder.add(f"{one.tier}: strict, all defences", one.strict_defended, "attempts", topic="redteam")
        recorder.add(
            f"{one.tier}: ordinary prompts",
            100 * one.ordinary.value,
            "%",
            topic="redteam",
            **in_percent(one.ordinary),
            note=f"{100 * one.alpha:g} % are promised",
        )
        if one.fewer is not None:
            recorder.add(f"{one.tier}: fewer", 100 * one.fewer, "%", topic="redteam", goal=_FEWER)


if __name__ == "__main__":
    main()
