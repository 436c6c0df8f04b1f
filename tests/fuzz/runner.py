"""Feed every reader hostile inputs, and say what came of it in one line of JSON.

    python -m tests.fuzz [--inputs N] [--seed N] [--reader NAME] [--jobs N]
    python -m tests.fuzz --repeat READER:SEED

Inputs are valid ones that were mutated, by seed, and, for readers of texts, those that hypothesis makes. A traceback is
whatever is neither an answer nor a `PolarError`. Time is that of the processor, and memory what an input needs beyond
what the process had. Unit: seconds, MB.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Final

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from polar_sdk.errors import PolarError
from polar_sdk.show.progress import ProgressBars
from tests.fuzz.readers import READERS, Reader, Texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


CHUNK: Final = 100
"""Inputs that a process reads before it reports."""
_HANGS_S: Final = 120.0
_BY_NAME: Final = {reader.name: reader for reader in READERS}
_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
TEXTS: Final = st.one_of(st.binary(), st.text().map(str.encode), _JSON.map(lambda value: json.dumps(value).encode()))


@dataclass
class Outcome:
    """The outcomes of some inputs."""

    reader: str
    inputs: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    """Name of the input and what it raised."""
    slowest_s: float = 0.0
    slowest: str = ""
    peak_mb: float = 0.0
    peak: str = ""

    def add(self, other: Outcome) -> None:
        """Count in others."""
        self.inputs += other.inputs
        self.refused += other.refused
        self.tracebacks += other.tracebacks
        if other.slowest_s > self.slowest_s:
            self.slowest_s, self.slowest = other.slowest_s, other.slowest
        if other.peak_mb > self.peak_mb:
            self.peak_mb, self.peak = other.peak_mb, other.peak


_readers: dict[str, Reader] = {}
_folder = Path()


def reader_of(name: str) -> Reader:
    """A reader, prepared once per process."""
    if name not in _readers:
        _readers[name] = _BY_NAME[name](_folder / f"{name.replace(' ', '-')}-{os.getpid()}")
        for number in range(3):  # what is imported at first use is no input's time and memory
            with suppress(Exception):
                _readers[name].read(Random(f"first {number}"))
    return _readers[name]


def feed(outcome: Outcome, name: str, read: Callable[[], object]) -> None:
    """Read one input."""
    before = _begin_to_measure()
    begun = time.process_time()
    faulthandler.dump_traceback_later(_HANGS_S, exit=True)
    try:
        read()
    except PolarError:
        outcome.refused += 1
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(place.filename).name}:{place.lineno})"
        )
        outcome.tracebacks.append(f"{name}: {what}")
    faulthandler.cancel_dump_traceback_later()
    one = Outcome(outcome.reader, 1, slowest_s=time.process_time() - begun, slowest=name, peak=name)
    one.peak_mb = (_status("VmHWM") - before) / 1024
    outcome.add(one)


def _begin_to_measure() -> int:
    """The memory of this process, which is from now on its peak. Unit: KiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no Linux, or not allowed
        return _status("VmHWM")
    return _status("VmRSS")


def _status(field_name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name))


def run_chunk(name: str, seeds: Sequence[int], generated: int) -> Outcome:
    """Read mutated inputs of these seeds, and some that hypothesis makes."""
    reader, outcome = reader_of(name), Outcome(name)
    for number in seeds:
        feed(outcome, f"{name}:{number}", lambda number=number: reader.read(Random(f"{name}:{number}")))  # type: ignore[misc]
    if isinstance(reader, Texts) and generated:
        _generate(reader, outcome, generated, seeds[0])
    return outcome


def _generate(reader: Texts, outcome: Outcome, count: int, first: int) -> None:
    @seeded(first)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(TEXTS)
    def read(content: bytes) -> None:
        feed(outcome, f"{reader.name}: {content[:60]!r}", lambda: reader.read_text(content))

    read()


def _jobs(options: argparse.Namespace) -> Iterator[tuple[str, range, int]]:
    names = [options.reader] if options.reader else list(_BY_NAME)
    parts = sum(_BY_NAME[name].share for name in names)
    for name in names:
        count = -(-options.inputs * _BY_NAME[name].share // parts)
        for begin in range(0, count, CHUNK):
            end = min(begin + CHUNK, count)
            generated = (end - begin) // 5 if issubclass(_BY_NAME[name], Texts) else 0
            first = options.seed + begin
            yield name, range(first, first + end - begin - generated), generated


def prepare(folder: str) -> None:
    """Begin in a process of its own."""
    global _folder  # noqa: PLW0603  (of a process of its own)
    _folder = Path(folder)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.update(HOME=folder)
    Path(folder, "here").mkdir(exist_ok=True)
    os.chdir(Path(folder, "here"))


def _run_all(options: argparse.Namespace, folder: str) -> int:
    jobs = sorted(_jobs(options), key=lambda job: job[1].start)
    total = sum(len(seeds) + generated for _, seeds, generated in jobs)
    everything = Outcome("all")
    by_reader: dict[str, int] = {}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.jobs, context, initializer=prepare, initargs=(folder,)) as pool,
        ProgressBars() as bars,
    ):
        for finished in as_completed([pool.submit(run_chunk, *job) for job in jobs]):
            outcome = finished.result()
            everything.add(outcome)
            by_reader[outcome.reader] = by_reader.get(outcome.reader, 0) + outcome.inputs
            bars("inputs", everything.inputs, total)
            for found in outcome.tracebacks:
                print(f"{found}\n  repeat it: make fuzz SEED={found.partition(': ')[0]!r}", file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "inputs": everything.inputs,
                "refused": everything.refused,
                "tracebacks": len(everything.tracebacks),
                "slowest_s": round(everything.slowest_s, 2),
                "slowest": everything.slowest,
                "peak_mb": round(everything.peak_mb, 1),
                "peak": everything.peak,
                "by_reader": by_reader,
            }
        ),
        flush=True,
    )
    return 1 if everything.tracebacks else 0


def _repeat(text: str, folder: str) -> int:
    prepare(folder)
    name, _, number = text.rpartition(":")
    outcome = Outcome(name)
    reader = reader_of(name)
    feed(outcome, text, lambda: reader.read(Random(f"{name}:{number}")))
    try:
        reader.read(Random(f"{name}:{number}"))
    except Exception:  # what a person wants to see
        traceback.print_exc()
    print(json.dumps({"inputs": 1, "tracebacks": len(outcome.tracebacks), "slowest_s": round(outcome.slowest_s, 2)}))
    return len(outcome.tracebacks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    add: Any = parser.add_argument
    add("--inputs", type=int, default=50_000, help="how many")
    add("--seed", type=int, default=0, help="the first")
    add("--reader", choices=sorted(_BY_NAME), help="only this one")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    add("--repeat", metavar="INPUT", help="read this one again and show its traceback")
    options = parser.parse_args(arguments)
    folder = mkdtemp(prefix="polar-fuzz-")
    try:
        return _repeat(options.repeat, folder) if options.repeat else _run_all(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
