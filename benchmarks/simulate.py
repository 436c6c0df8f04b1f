"""The messaging case of `polar simulate` as figures: full depth beside routed, or memory and ledger of a long soak.

    python -m benchmarks.simulate [--requests 300] [--seeds 3] [--load 0.7] [--factor X] [--soak MINUTES] [--tiny]

Prints what the command prints, and writes the figures to `--results`: the mean of the seeds and their range. `--tiny`
runs the tiny model of `polar_sdk.testing`. What a simulation assumes is in the package `polar_simulate`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import RESULTS, Recorder
from polar_billing import PriceBook
from polar_billing.cli.options import show
from polar_sdk import PolarModel
from polar_sdk.show.progress import ProgressBars
from polar_sdk.testing import tiny_model
from polar_simulate.assumptions import assumptions, busy_before
from polar_simulate.capacity import Speed, measure_capacity, unshared_starts
from polar_simulate.comparison import compare
from polar_simulate.day import Day
from polar_simulate.soak import soak
from polar_simulate.views import view_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_simulate.comparison import Comparison
    from polar_simulate.soak import Soaked
    from polar_simulate.trial import Trial

DRIFT_GOAL = 5.0
"""Of memory in a soak. Unit: percent."""


def main() -> None:
    args = _arguments()
    busy = busy_before()
    recorder = Recorder("soak" if args.soak else "simulate", args.results, model="tiny" if args.tiny else args.model)
    model = (
        tiny_model(context_window=1024)
        if args.tiny
        else PolarModel.from_pretrained(args.model, ledger=None, compile="stored")
    )
    with tempfile.TemporaryDirectory(prefix="polar-simulate-") as folder, ProgressBars(quiet=not args.bars) as bars:
        if args.factor is not None:
            speed = Speed.given(args.factor, args.requests)
        else:
            with unshared_starts(model):
                speed = Speed.of_load(args.load, args.requests, measure_capacity(model))
        result: Comparison | Soaked
        if args.soak:
            result = soak(model, Path(folder), speed, args.soak, bars)
            _record_soak(recorder, result)
        else:
            result = compare(model, Path(folder), speed, range(args.seeds), bars)
            _record(recorder, result)
    show(view_of(result, assumptions(model, speed, Day(args.requests), PriceBook.load(), busy)))
    print(f"\nwrote {recorder.path}")
    sys.exit(1 if result.faults else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tiny", action="store_true", help="the tiny model of polar_sdk.testing")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--factor", type=float)
    parser.add_argument("--soak", type=float, help="minutes")
    parser.add_argument("--bars", action="store_true", help="show progress")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file of figures")
    return parser.parse_args()


def _record(recorder: Recorder, comparison: Comparison) -> None:
    for way, trials in (("full depth", comparison.full), ("routed", comparison.routed)):

        def add(row: str, values: Sequence[float], unit: str, way: str = way) -> None:
            _add(recorder, f"{row}: {way}", values, unit)

        add("requests, all seeds", [sum(trial.tally.sent for trial in trials)], "requests")
        add("refused by a budget", [trial.tally.ends["refused"] for trial in trials], "requests")
        for percent in (50, 95, 99):
            latencies = [trial.audit.figures.latency(percent) for trial in trials]
            add(f"latency p{percent}, s", [latency for latency in latencies if latency is not None], "s")
        add("GFLOP per request", [(trial.audit.figures.flops_per_request or 0) / 1e9 for trial in trials], "GFLOP")
        add("FLOPs saved against full depth", [100 * trial.audit.figures.saved for trial in trials], "%")
        currency = trials[0].book.currency
        for row, costs in (
            (f"m{currency} per 1,000 requests", [trial.audit.figures.cost_per_1000 for trial in trials]),
            ("the same at one price", [trial.audit.figures.cost_one_price_per_1000 for trial in trials]),
        ):
            add(row, [float(1_000 * cost) for cost in costs if cost is not None], f"m{currency}")
    _add(recorder, "same answers as at full depth: routed", [100 * one for one in comparison.same_answers()], "%")
    for tier in ("economy", "standard", "premium", "exact"):
        saved = [100 * t.audit.by_tier[tier].saved for t in comparison.routed if tier in t.audit.by_tier]
        _add(recorder, f"FLOPs saved against full depth, {tier}: routed", saved, "%")
        same = [100 * one for one in comparison.same_answers(tier)]
        _add(recorder, f"same answers as at full depth, {tier}: routed", same, "%")


def _add(recorder: Recorder, name: str, values: Sequence[float], unit: str) -> None:
    if len(values) > 1:
        mean, low, high = (float(f"{one:.4g}") for one in (sum(values) / len(values), min(values), max(values)))
        recorder.add(name, mean, unit, low=low, high=high, interval="seeds")
    elif values:
        recorder.add(name, values[0], unit)


def _record_soak(recorder: Recorder, soaked: Soaked) -> None:
    trial: Trial = soaked.trial
    recorder.add("length", trial.seconds / 60, "minutes")
    recorder.add("requests sent", trial.tally.sent, "requests")
    if soaked.drift is not None:
        drift = 100 * soaked.drift
        note = "medians of the last fifth and of the second fifth; the goal holds in both directions"
        recorder.add("memory at the end against the beginning", drift, "%", goal=DRIFT_GOAL, better="lower", note=note)
    lost = len(trial.tally.admitted) + len(trial.tally.failed) - trial.audit.figures.requests
    note = f"{len(trial.tally.admitted):,} admitted, {trial.tally.ends['refused']:,} refused by budgets"
    recorder.add("requests admitted and not stored", lost, "requests", goal=0, better="lower", note=note)
    recorder.add("faults that verification found", len(trial.audit.faults), "", goal=0, better="lower")


if __name__ == "__main__":
    main()
