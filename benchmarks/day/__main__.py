"""A day of a messaging service, faster than the clock: full depth beside routed; or day after day, routed, as a soak.

    python -m benchmarks.day [--requests 300] [--seeds 3] [--load 0.7 | --factor X] [--soak MINUTES] [--tiny]

The day runs so fast that its busiest moment brings `--load` of the requests per second that this machine answers at
full depth, which is measured first; `--factor` states the speed instead. Each seed is a day of its own, served in both
ways: of even seeds full depth goes first, of odd ones routed. `--soak` keeps the load up, watches memory, and compares
requests with records at the end. Figures go to `--results`, the mean of the seeds and their range; ledgers go to
`--ledgers`, where the commands of `polar` read them. `docs/results.md` states what is assumed.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING, Final

import psutil

from benchmarks.day.arrivals import DAY, PEAK_TO_MEAN, arrivals_of
from benchmarks.day.trial import FULL_DEPTH, Trial, compute_needed, metered, run_trial
from benchmarks.results import Recorder, arguments
from polar_billing import PriceBook
from polar_sdk import PolarModel
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from benchmarks.day.arrivals import Arrival

CALLERS: Final = 32
"""Requests at a time while capacity is measured: as many as the engine runs together."""
STEADY: Final = 128
"""Requests timed while all callers are busy; as many as there are callers go before them, and after."""
MEMORY_SAMPLES: Final = 600
DRIFT_MAX: Final = 5.0
"""Maximum growth of memory in a soak. Unit: percent."""


def main() -> None:
    """Run it; exits with 1 where a ledger is not as it must be."""
    args = _arguments()
    name = "tiny" if args.tiny else args.model
    model = tiny_model(context_window=1024) if args.tiny else PolarModel.from_pretrained(name, ledger=None)
    recorder = Recorder("soak" if args.soak else "day", args.results, model=name)
    with tempfile.TemporaryDirectory(prefix="polar-day-") as temporary:
        folder = args.ledgers or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        seconds = DAY / args.factor if args.factor else day_seconds(model, args.requests, args.load)
        print(f"a day of {args.requests:,} requests takes {seconds:,.0f} s", flush=True)
        warm_up(model)
        if args.soak:
            trials = [soak(model, folder, args.requests, seconds, args.soak, recorder)]
        else:
            pairs = [compare(model, folder, args.requests, seconds, seed) for seed in range(args.seeds)]
            record_comparison(recorder, pairs)
            trials = [trial for pair in pairs for trial in pair]
    for trial in trials:
        state = "; ".join(trial.faults) or "sound"
        print(f"{dict(trial.ends)}; ledger {state}, {trial.links:,} links, {trial.total.requests:,} records")
    print(f"wrote {recorder.path}")
    sys.exit(any(trial.faults for trial in trials))


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--tiny", action="store_true", help="the tiny model of polar_sdk.testing")
    parser.add_argument("--requests", type=int, default=300, help="requests of a day")
    parser.add_argument("--seeds", type=int, default=3, help="days to serve in both ways")
    parser.add_argument("--load", type=float, default=0.7, help="load in the busiest moment, as a share of capacity")
    parser.add_argument("--factor", type=float, help="how many times as fast as the clock a day runs")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="keep the load up for so long, routed")
    parser.add_argument("--ledgers", type=Path, help="new folder for the ledgers; default: they are not kept")
    return parser.parse_args()


def warm_up(model: PolarModel) -> None:
    """Answer some messages on every tier, unmetered, so that no trial pays for what is done once."""
    unmetered = PolarModel(model.loaded, policy=model.policy, router=model.router, ledger=None)
    arrivals = arrivals_of(CALLERS, -1)
    for tiers in ([arrival.tier for arrival in arrivals], [FULL_DEPTH] * (CALLERS // 2)):
        asked = list(zip(arrivals, tiers, strict=False))
        unmetered.generate_batch(
            [arrival.prompt for arrival, _ in asked],
            each=[{"compute": tier, "max_tokens": arrival.max_tokens} for arrival, tier in asked],
        )


def day_seconds(model: PolarModel, requests: int, load: float) -> float:
    """Length of a day whose busiest moment brings a share of what the machine answers at full depth."""
    arrivals = arrivals_of(STEADY + 2 * CALLERS, -1)
    ended: list[float] = []

    def ask(model: PolarModel, arrival: Arrival) -> None:
        model.generate(arrival.prompt, compute=FULL_DEPTH, max_tokens=arrival.max_tokens)
        ended.append(time.monotonic())

    with (
        tempfile.TemporaryDirectory(prefix="polar-capacity-") as folder,
        metered(model, Path(folder) / "capacity.sqlite3", {}) as metered_model,
        ThreadPoolExecutor(CALLERS) as pool,
    ):
        for answered in [pool.submit(ask, metered_model, arrival) for arrival in arrivals]:
            answered.result()
    ended.sort()
    capacity = STEADY / max(ended[CALLERS + STEADY - 1] - ended[CALLERS - 1], 1e-9)
    print(f"{capacity:.2f} requests/s at full depth, {CALLERS} callers at a time", flush=True)
    return requests * PEAK_TO_MEAN / (load * capacity)


def compare(model: PolarModel, folder: Path, requests: int, seconds: float, seed: int) -> tuple[Trial, Trial]:
    """Serve a day at full depth and routed: the same prompts at the same times."""
    arrivals = arrivals_of(requests, seed)
    needed = compute_needed(model, arrivals)
    due = [(arrival.second / DAY * seconds, arrival) for arrival in arrivals]
    trials = {}
    for tier in (None, FULL_DEPTH) if seed % 2 else (FULL_DEPTH, None):
        path = folder / f"{'full-depth' if tier else 'routed'}-seed-{seed}.sqlite3"
        trials[tier] = run_trial(model, path, due, needed, tier=tier)
    return trials[FULL_DEPTH], trials[None]


def record_comparison(recorder: Recorder, pairs: Sequence[tuple[Trial, Trial]]) -> None:
    """Record both ways of all seeds."""

    def add(name: str, values: Sequence[float], unit: str) -> None:
        if len(values) > 1:
            low, high = (float(f"{one:.4g}") for one in (min(values), max(values)))
            recorder.add(name, fmean(values), unit, low=low, high=high, interval="seeds")
        elif values:
            recorder.add(name, values[0], unit)

    unit = f"m{PriceBook.load().currency}"
    for way, trials in zip(("full depth", "routed"), zip(*pairs, strict=True), strict=True):
        recorder.add(f"requests, all seeds: {way}", sum(trial.ends.total() for trial in trials), "requests")
        add(f"refused by a budget: {way}", [trial.ends["refused"] for trial in trials], "requests")
        cuts = [quantiles(trial.latencies, n=100, method="inclusive") for trial in trials]
        for percent in (50, 95, 99):
            add(f"latency p{percent}, s: {way}", [cut[percent - 1] for cut in cuts], "s")
        totals = [trial.total for trial in trials]
        add(f"GFLOP per request: {way}", [total.flops / total.requests / 1e9 for total in totals], "GFLOP")
        add(f"FLOPs saved against full depth: {way}", [100 * total.saved for total in totals], "%")
        costs = [float(total.cost) / total.requests * 1e6 for total in totals]
        add(f"{unit} per 1,000 requests: {way}", costs, unit)
    add("same answers as at full depth: routed", [100 * same_answers(*pair) for pair in pairs], "%")
    for tier in ("economy", "standard", "premium", FULL_DEPTH):
        shares = [routed.tiers[tier] for _, routed in pairs if tier in routed.tiers]
        add(f"FLOPs saved against full depth, {tier}: routed", [100 * share.saved for share in shares], "%")
        same = [100 * same_answers(full, routed, tier) for full, routed in pairs if tier in routed.tiers]
        add(f"same answers as at full depth, {tier}: routed", same, "%")


def same_answers(full: Trial, routed: Trial, tier: str | None = None) -> float:
    """Share of the requests answered in both ways, on one tier or any, that have the same tokens."""
    pairs = [
        (full.answers[number][1], answer)
        for number, (own, answer) in routed.answers.items()
        if number in full.answers and tier in (None, own)
    ]
    return fmean(one == other for one, other in pairs) if pairs else 0.0


def soak(model: PolarModel, folder: Path, requests: int, seconds: float, minutes: float, recorder: Recorder) -> Trial:
    """Serve one day after another, routed, and record memory, and requests beside records."""
    days = int(60 * minutes / seconds) + 1
    needed = {tenant: days * compute for tenant, compute in compute_needed(model, arrivals_of(requests, 0)).items()}
    begun = time.monotonic()
    with _memory_watched(60 * minutes / MEMORY_SAMPLES) as memory:
        trial = run_trial(model, folder / "soak.sqlite3", _days(requests, seconds, 60 * minutes), needed)
    lasted = time.monotonic() - begun
    recorder.add("length", lasted / 60, "minutes")
    recorder.add("requests sent", trial.ends.total(), "requests")
    base = [size for second, size in memory if 0.2 * lasted <= second <= 0.4 * lasted]  # before, caches fill
    end = [size for second, size in memory if second >= 0.8 * lasted]
    if base and end:
        drift = 100 * (median(end) / median(base) - 1)
        note = "medians of the last fifth and of the second fifth; the goal holds in both directions"
        recorder.add("memory at the end against the beginning", drift, "%", goal=DRIFT_MAX, better="lower", note=note)
    lost = len(trial.answers) + len(trial.failed) - trial.total.requests
    note = f"{len(trial.answers):,} answered, {trial.ends['refused']:,} refused by budgets"
    recorder.add("requests admitted and not stored", lost, "requests", goal=0, better="lower", note=note)
    recorder.add("faults that verification found", len(trial.faults), "", goal=0, better="lower")
    return trial


def _days(requests: int, seconds: float, until: float) -> Iterator[tuple[float, Arrival]]:
    """Requests of one day after another, each with the next seed, until the time is over; numbers go on."""
    for day in itertools.count():
        for arrival in arrivals_of(requests, day):
            due = (day + arrival.second / DAY) * seconds
            if due > until:
                return
            yield due, replace(arrival, number=day * requests + arrival.number)


@contextmanager
def _memory_watched(every: float) -> Iterator[list[tuple[float, int]]]:
    """Samples of this process's resident memory while the block runs: (seconds since its start, bytes)."""
    samples: list[tuple[float, int]] = []
    process, begun, ended = psutil.Process(), time.monotonic(), threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            samples.append((time.monotonic() - begun, process.memory_info().rss))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        ended.set()
        watcher.join()


if __name__ == "__main__":
    main()
