"""The messaging case of `polar simulate` as figures: full depth beside routed, or memory and ledger of a long soak.

    python -m benchmarks.simulate [--requests 300] [--seeds 3] [--load 0.7] [--factor X] [--soak MINUTES] [--tiny]
    python -m benchmarks.simulate --from FOLDER/simulate.json … [--only latency] [--note TEXT]

Prints what the command prints, and writes the figures to `--results`: the mean of the seeds and their range. `--from`
takes them from what `polar simulate --output FOLDER` wrote on this machine and commit, one file or several of different
seeds, for machines that are quiet for minutes only; `--only` keeps the rows whose name has this text. `--tiny` runs the
tiny model of `polar_sdk.testing`. What a simulation assumes is in the package `polar_simulate`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    recorder = Recorder("soak" if args.soak else "simulate", args.results, model="tiny" if args.tiny else args.model)
    recorder.run = recorder.run.model_copy(update={"note": args.note})
    if args.files:
        _record(recorder, [json.loads(path.read_text(encoding="utf-8")) for path in args.files], args.only)
        faults: Sequence[str] = ()
    else:
        faults = _simulate(args, recorder)
    print(f"\nwrote {recorder.path}")
    sys.exit(1 if faults else 0)


def _simulate(args: argparse.Namespace, recorder: Recorder) -> Sequence[str]:
    """Run it; returns what is amiss in its ledgers."""
    busy = busy_before()
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
            _record(recorder, [result.as_json()], args.only)
    show(view_of(result, assumptions(model, speed, Day(args.requests), PriceBook.load(), busy)))
    return result.faults


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tiny", action="store_true", help="the tiny model of polar_sdk.testing")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--factor", type=float)
    parser.add_argument("--soak", type=float, help="minutes")
    parser.add_argument("--from", dest="files", type=Path, nargs="+", metavar="FILE", help="simulate.json of runs")
    parser.add_argument("--only", default="", help="record only rows whose name has this text")
    parser.add_argument("--note", help="what to say of the run beside its command")
    parser.add_argument("--bars", action="store_true", help="show progress")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file of figures")
    return parser.parse_args()


def _record(recorder: Recorder, runs: Sequence[dict[str, Any]], only: str) -> None:
    """Record the figures of comparisons, as `Comparison.as_json` gives them."""

    def add(row: str, way: str, values: Sequence[float], unit: str) -> None:
        if only in row:
            _add(recorder, f"{row}: {way}", values, unit)

    for way, key in (("full depth", "full_depth"), ("routed", "routed")):
        trials = [trial for run in runs for trial in run[key]]
        add("requests, all seeds", way, [sum(trial["sent"] for trial in trials)], "requests")
        add("refused by a budget", way, [trial["ends"].get("refused", 0) for trial in trials], "requests")
        for name in ("p50", "p95", "p99"):
            latencies = [trial["latency_seconds"][name] for trial in trials]
            add(f"latency {name}, s", way, [latency for latency in latencies if latency is not None], "s")
        answered = [trial["ends"].get("answered", 0) for trial in trials]
        add("answers whose latency was measured, all seeds", way, [sum(answered)], "requests")
        add("GFLOP per request", way, [trial["flops"] / trial["requests"] / 1e9 for trial in trials], "GFLOP")
        add("FLOPs saved against full depth", way, [100 * trial["saved"] for trial in trials], "%")
        unit = f"m{trials[0]['currency']}"
        for row, cost in (
            ("cost_per_1000", "per 1,000 requests"),
            ("cost_one_price_per_1000", "the same at one price"),
        ):
            costs = [1_000 * float(trial[row]) for trial in trials if trial[row] is not None]
            add(f"{unit} {cost}" if row == "cost_per_1000" else cost, way, costs, unit)
    add("same answers as at full depth", "routed", [100 * one for run in runs for one in run["same_answers"]], "%")
    for tier in ("economy", "standard", "premium", "exact"):
        shares = [trial["by_tier"][tier] for run in runs for trial in run["routed"] if tier in trial["by_tier"]]
        add(f"FLOPs saved against full depth, {tier}", "routed", [100 * share["saved"] for share in shares], "%")
        same = [100 * one for run in runs for one in run.get("same_answers_by_tier", {}).get(tier, [])]
        add(f"same answers as at full depth, {tier}", "routed", same, "%")


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
