"""Run schedules, the short and the long run, and one again.

    python -m tests.simulation [--schedules N] [--seed N] [--world NAME] [--jobs N] [--until-broken]
    python -m tests.simulation --mutate [NAME …]
    python -m tests.simulation --repeat WORLD:SEED[:LEFT,OUT] [--trace]

A schedule that breaks an invariant is shrunk: elements of its plan are left out as long as it stays broken. What to
type to repeat it goes to standard error; the last line of standard output is JSON. Set PYTHONHASHSEED=0, as `make
simulate` does: the order of sets is part of a schedule.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Protocol

from polar_sdk.show.progress import ProgressBars
from tests.simulation.world import Broken

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


CHUNK: Final = 50
"""Schedules that a process runs before it reports."""


class Simulation(Protocol):
    """A kind of world."""

    def elements(self, seed: int) -> int:
        """How many elements the plan of a seed has."""

    def run(self, seed: int, left_out: frozenset[int], trace: list[str] | None) -> None:
        """Run one schedule; raises if an invariant is broken."""


@dataclass(frozen=True)
class Schedule:
    """Names one schedule."""

    world: str
    seed: int
    left_out: frozenset[int] = frozenset()

    def __str__(self) -> str:
        rest = ":" + ",".join(map(str, sorted(self.left_out))) if self.left_out else ""
        return f"{self.world}:{self.seed}{rest}"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read what `str` writes."""
        world, seed, *rest = text.split(":")
        return cls(world, int(seed), frozenset(int(number) for part in rest for number in part.split(",")))


WORLDS: Final = {"ledger": ("ledger_world.Ledgers", 3), "serving": ("serving_world.Servings", 1)}
"""Its simulation, imported where it is run, and how many parts of the schedules it gets."""

_simulations: dict[str, Simulation] = {}
_folder = Path()


def simulation(world: str) -> Simulation:
    """A kind of world, prepared once per process."""
    if world not in _simulations:
        made = resolve_name(f"tests.simulation.{WORLDS[world][0]}")
        _simulations[world] = made(_folder / f"{world}-{os.getpid()}")
    return _simulations[world]


def run(schedule: Schedule, trace: list[str] | None = None) -> BaseException | None:
    """Run one schedule; returns what broke."""
    try:
        simulation(schedule.world).run(schedule.seed, schedule.left_out, trace)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # whatever the product raised where it promises not to
        return problem
    return None


def shrink(schedule: Schedule) -> Schedule:
    """Leave out elements of a broken schedule as long as it stays broken."""
    for element in range(simulation(schedule.world).elements(schedule.seed)):
        smaller = Schedule(schedule.world, schedule.seed, schedule.left_out | {element})
        if run(smaller) is not None:
            schedule = smaller
    return schedule


@dataclass(frozen=True)
class Defect:
    """A schedule that broke an invariant, shrunk, and how."""

    found: str
    schedule: str
    what: str


def run_chunk(world: str, seeds: Sequence[int]) -> tuple[str, int, list[Defect]]:
    """Run schedules in this process."""
    defects = []
    for seed in seeds:
        schedule = Schedule(world, seed)
        if run(schedule) is not None:
            smallest = shrink(schedule)
            problem = run(smallest)
            defects.append(Defect(str(schedule), str(smallest), _in_words(problem)))
    gc.collect()
    return world, len(seeds), defects


def _in_words(problem: BaseException | None) -> str:
    if problem is None:
        return "the same schedule does not break it every time"
    text = str(problem) if isinstance(problem, Broken) else f"{type(problem).__name__}: {problem}"
    return " ".join(text.split())[:500]


def _prepare(folder: str) -> None:
    global _folder  # noqa: PLW0603  (of a process of its own)
    _folder = Path(folder)
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None  # a broken schedule leaves finalisers behind
    gc.disable()  # it would run finalisers where no seed says


def _jobs(worlds: Sequence[str], schedules: int, first: int) -> Iterator[tuple[str, range]]:
    shares = {world: WORLDS[world][1] for world in worlds}
    ends = {world: first + schedules * share // sum(shares.values()) for world, share in shares.items()}
    ends[worlds[0]] += schedules - sum(end - first for end in ends.values())
    at = dict.fromkeys(worlds, first)
    while any(at[world] < ends[world] for world in worlds):
        world = min(worlds, key=lambda world: (at[world] - first) / max(ends[world] - first, 1))
        end = min(at[world] + CHUNK, ends[world])
        yield world, range(at[world], end)
        at[world] = end


def _pool(jobs: int, folder: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, initializer=_prepare, initargs=(folder,))


def _memory() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="polar-simulation-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def _run_all(options: argparse.Namespace) -> int:
    worlds = [options.world] if options.world else list(WORLDS)
    defects: list[Defect] = []
    done = dict.fromkeys(worlds, 0)
    begun = time.monotonic()
    jobs = list(_jobs(worlds, options.schedules, options.seed))
    with (
        _memory() as folder,
        _pool(options.jobs, folder) as pool,
        ProgressBars() as bars,
    ):
        for finished in as_completed([pool.submit(run_chunk, *job) for job in jobs]):
            world, count, found = finished.result()
            done[world] += count
            bars("schedules", sum(done.values()), options.schedules)
            defects += found
            for defect in found:
                print(f"{defect.found} breaks an invariant: {defect.what}", file=sys.stderr)
                print(f"  repeat it: make simulate SEED={defect.schedule}", file=sys.stderr, flush=True)
            if defects and options.until_broken:
                pool.shutdown(cancel_futures=True)
                break
    line = {
        "schedules": sum(done.values()),
        "invariants_broken": len(defects),
        "seeds": [defect.schedule for defect in defects],
        "by_world": done,
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(line), flush=True)
    return 1 if defects else 0


def _repeat(text: str, *, trace: bool) -> int:
    steps: list[str] = []
    with _memory() as folder:
        _prepare(folder)
        problem = run(Schedule.parse(text), steps)
    if trace:
        print("\n".join(steps), file=sys.stderr)
    if problem is not None:
        traceback.print_exception(problem)
    broken = [] if problem is None else [text]
    print(json.dumps({"schedules": 1, "invariants_broken": len(broken), "seeds": broken}))
    return len(broken)


def _mutate(names: Sequence[str], first: int) -> int:
    """Break the product in these ways, or in all, and count the schedules until each is found."""
    from tests.simulation.mutations import MUTATIONS, WITHIN

    tried: dict[str, int | None] = {}
    with _memory() as folder:
        _prepare(folder)
        for name in names or MUTATIONS:
            mutation = MUTATIONS[name]
            simulation(mutation.world)
            with mutation.apply():
                seeds = range(first, first + WITHIN)
                at = next((seed for seed in seeds if run(Schedule(mutation.world, seed)) is not None), None)
            tried[name] = None if at is None else at - first + 1
            print(f"{name}: {'not found' if at is None else f'found by schedule {at}'}", file=sys.stderr, flush=True)
            gc.collect()
    found = sum(at is not None for at in tried.values())
    print(json.dumps({"mutations": len(tried), "found": found, "schedules": tried}))
    return 0 if found == len(tried) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    add: Any = parser.add_argument
    add("--schedules", type=int, default=100_000, help="how many")
    add("--seed", type=int, default=0, help="the first")
    add("--world", choices=sorted(WORLDS), help="only this one")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    add("--mutate", nargs="*", metavar="NAME", help="break the product in these ways of `mutations`, or in all")
    add("--until-broken", action="store_true", help="stop at the first")
    add("--repeat", metavar="SCHEDULE", help="run this one again")
    add("--trace", action="store_true", help="print every step of it")
    options = parser.parse_args(arguments)
    if options.repeat:
        return _repeat(options.repeat, trace=options.trace)
    return _run_all(options) if options.mutate is None else _mutate(options.mutate, options.seed)
