"""The soak: one day after another, routed, for a stated time, with an eye on memory, and on the ledger at the end.

Knows no output.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import psutil

from polar_sdk.show.progress import silent
from polar_simulate.audit import audit
from polar_simulate.capacity import unshared_starts, warm_up
from polar_simulate.day import DAY, Day
from polar_simulate.load import Load
from polar_simulate.tally import Sent, Tally
from polar_simulate.trial import Trial, compute_needed, metered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from polar_sdk import PolarModel
    from polar_sdk.show.progress import Progress
    from polar_simulate.capacity import Speed
    from polar_simulate.day import Arrival
    from polar_simulate.prompt_file import FilePrompt

SAMPLES: Final = 600
"""Of memory, over the whole soak."""
WARM_UP, BASE = 0.2, 0.4
"""Memory at the beginning is that between these shares of the time: before, caches and allocators fill."""
END: Final = 0.8
"""Memory at the end is that after this share of the time."""
DRIFT_MAX: Final = 0.05
"""How far memory may move and be called flat, in both directions."""


@dataclass(frozen=True)
class Soaked:
    """What came of a soak."""

    speed: Speed
    trial: Trial
    minutes: float
    """As asked for."""
    memory: Sequence[tuple[float, int]]
    """Resident memory of this process: (seconds since the start, bytes)."""

    @property
    def drift(self) -> float | None:
        """Memory at the end over that at the beginning, less 1, both medians; None of a soak cut too short."""
        last = self.memory[-1][0] if self.memory else 0.0
        base = [size for second, size in self.memory if WARM_UP * last <= second <= BASE * last]
        end = [size for second, size in self.memory if second >= END * last]
        return median(end) / median(base) - 1 if base and end else None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.trial.interrupted

    @property
    def faults(self) -> list[str]:
        """What is amiss in the ledger."""
        return self.trial.faults

    @property
    def flat(self) -> bool:
        """Whether memory stayed within `DRIFT_MAX`."""
        return self.drift is not None and abs(self.drift) <= DRIFT_MAX

    def as_json(self) -> dict[str, Any]:
        """All figures, samples of memory included."""
        return {
            "minutes": self.minutes,
            "factor": self.speed.factor,
            "peak_requests_per_second": self.speed.peak,
            "capacity_requests_per_second": self.speed.capacity,
            **self.trial.as_json(),
            "memory_drift": self.drift,
            "memory_flat": self.flat,
            "memory": [{"second": round(second, 1), "bytes": size} for second, size in self.memory],
        }


def soak(
    model: PolarModel,
    folder: Path,
    speed: Speed,
    minutes: float,
    progress: Progress = silent,
    *,
    seed: int = 0,
    prompts: Sequence[FilePrompt] = (),
) -> Soaked:
    """Keep the load up.

    Args:
        model: What answers; its own sink is not used.
        folder: Where the ledger goes, `soak.sqlite3`; one that is there is replaced.
        speed: How fast, and how many requests each day has.
        minutes: How long requests are sent.
        progress: Is told the seconds that have passed.
        seed: Of the first day; those after it have the next ones.
        prompts: The user's own, instead of generated messages.

    Returns:
        The soak; after Ctrl-C what there was.
    """
    seconds = 60 * minutes
    days = max(1, math.ceil(seconds / speed.seconds))
    first = Day(speed.requests, seed, prompts).arrivals
    needed = {tenant: days * compute for tenant, compute in compute_needed(model, first).items()}
    path, tally = folder / "soak.sqlite3", Tally(keep_answers=False)
    warm_up(model, prompts)
    with unshared_starts(model), metered(model, path, needed) as (metered_model, meter):
        begun, interrupted = time.monotonic(), False

        def note(one: Sent) -> None:
            tally.add(one)
            progress("soak, seconds", min(int(time.monotonic() - begun), int(seconds)), int(seconds))

        load = Load(metered_model, tier=None, prefix="soak", on_end=note)
        with _memory_watched(seconds / SAMPLES) as memory:
            try:
                load.run(_days(speed, seed, prompts), until=seconds)
            except KeyboardInterrupt:
                interrupted = True
        lasted = time.monotonic() - begun
        book = meter.price_book
    trial = Trial(
        seed=seed,
        arrivals=tally.sent,
        tally=tally,
        audit=audit(path, tally, load.id_of, book),
        seconds=lasted,
        book=book,
        ledger=path,
        interrupted=interrupted,
    )
    return Soaked(speed, trial, minutes, memory)


def _days(speed: Speed, seed: int, prompts: Sequence[FilePrompt]) -> Iterator[tuple[float, Arrival]]:
    """One day after another, without end; numbers go on."""
    day = 0
    while True:
        for arrival in Day(speed.requests, seed + day, prompts).arrivals:
            due = (day * DAY + arrival.second) / speed.factor
            yield due, replace(arrival, number=day * speed.requests + arrival.number)
        day += 1


@contextmanager
def _memory_watched(every: float) -> Iterator[list[tuple[float, int]]]:
    """Samples of this process's resident memory while the block runs."""
    samples: list[tuple[float, int]] = []
    process, begun, ended = psutil.Process(), time.monotonic(), threading.Event()

    def watch() -> None:
        while True:
            samples.append((time.monotonic() - begun, process.memory_info().rss))
            if ended.wait(every):
                return

    watcher = threading.Thread(target=watch, name="polar-memory", daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        ended.set()
        watcher.join()
