"""SIGKILL at every point of writing: nothing is lost, nothing is stored twice, the ledger sums to zero.

A worker meters requests and books a transaction beside each; it tells on standard output what was acknowledged. It is
killed after a number of lines of Python executed inside the code that writes, a different number each time, so the
kills sweep over every write point; then the next worker goes on with the same ledger, repeating what the killed one
may not have finished. A few are killed by default; many are `long`.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.postings import Account, balances
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.metering.spool import recover_abandoned
from polar_billing.proof.verify import verify_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NURSERY = """
import json, os, signal, sys, threading
from datetime import UTC, datetime
from decimal import Decimal
from polar_billing.ledger.ledger import Ledger
from polar_billing.metering.meter import Meter
from polar_billing.ledger.postings import Account, Line, post
from polar_billing.testing import usage_record

WRITERS = "append books canonical chain connection ledger meter postings records rollups spool spool_file writer"
FILES = {f"{name}.py" for name in WRITERS.split()}
passed = 0

def work(url, durability, name_of_round, until):
    def trace(frame, event, argument):
        global passed
        if os.path.basename(frame.f_code.co_filename) not in FILES:
            return None
        passed += 1
        if passed == until:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    ledger = Ledger(url)
    meter = Meter(ledger, durability=durability)
    threading.settrace(trace)
    sys.settrace(trace)
    for n in range(3):
        name = f"{name_of_round}-{n}"
        meter.check()
        at = datetime(2026, 11, 1, n, tzinfo=UTC)
        meter.emit(usage_record(name, tenant=("acme", "globex")[n % 2], started_at=at))
        os.write(out, f"used {name}\\n".encode())
        with ledger.transaction() as connection:
            lines = [Line(Account.CASH, Decimal("0.01"), "USD"), Line(Account.RECEIVABLE, Decimal("-0.01"), "USD")]
            post(connection, "acme", "payment", name, lines, at)
        os.write(out, f"paid {name}\\n".encode())
    meter.close()
    sys.settrace(None)
    os.write(out, f"passed {passed}\\n".encode())

for line in sys.stdin:  # each a child of its own, without importing everything anew
    back, out = os.pipe()
    if os.fork() == 0:
        work(*json.loads(line))
        os._exit(0)
    os.close(out)
    told = open(back).read()
    print(json.dumps([told.splitlines(), os.wait()[1]]), flush=True)
"""


class Nursery:
    """Makes workers that can be killed."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", NURSERY]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, url: str, durability: str, name: str, until: int = 0) -> tuple[list[str], bool]:
        """Run a worker up to its `until`th line; what it acknowledged, and whether it was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([url, durability, name, until]), file=self._process.stdin, flush=True)
        lines, status = json.loads(self._process.stdout.readline())
        assert status in {0, signal.SIGKILL}
        return lines, status != 0

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("POLAR_SPOOL", str(tmp_path / "spool"))
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'killed.sqlite3'}"
    make: Callable[[], str] = request.getfixturevalue("new_postgres")
    return make()


@pytest.mark.parametrize("rounds", [3, pytest.param(56, marks=pytest.mark.long)])
@pytest.mark.parametrize("durability", ["commit", "spool"])
def test_kills_at_every_write_point(url: str, durability: str, rounds: int, nursery: Nursery) -> None:
    made, _ = nursery.run(url, durability, "first")  # which also makes the tables, and so passes more lines
    lines, _ = nursery.run(url, durability, "second")
    *acknowledged, last = made + lines
    points = int(0.9 * int(last.removeprefix("passed ")))  # runs differ a little; every one is to be killed
    assert points > 1_000
    chosen = random.Random(f"{durability} {rounds}")
    kills = 0
    for round_ in range(rounds):
        until = 1 + int(points * (round_ + chosen.random()) / rounds)
        lines, killed = nursery.run(url, durability, f"round-{round_}", until)
        kills += killed
        acknowledged += lines
        if killed:  # who asked tries again, with the same ids
            again, killed = nursery.run(url, durability, f"round-{round_}")
            assert not killed
            acknowledged += again
    assert kills >= rounds * 0.9
    told = {line for line in acknowledged if not line.startswith("passed ")}
    with Meter(url) as meter:
        meter.recover()
        assert isinstance(meter.ledger, Ledger)
        stored = [one.record.request_id for one in meter.ledger.read(Selection(ALL_TENANTS))]
        assert len(stored) == len(set(stored)) == (rounds + 2) * 3
        assert {f"used {name}" for name in stored} == {line for line in told if line.startswith("used ")}
        with meter.ledger.snapshot() as connection:
            assert verify_in(connection).findings == []
            books = balances(connection, "acme")
        assert sum(books.values()) == 0
        assert books[Account.CASH, "USD"] * 100 == sum(line.startswith("paid ") for line in told) == len(stored)


def test_what_was_acknowledged_survives_without_another_try(url: str) -> None:
    """Killed right after an answer, before anything was committed: the next reader finds it."""
    script = """
import os, signal, sys, threading
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_billing.metering.writer import Writer
Writer._store = lambda self, tickets, segment: threading.Event().wait()  # the commit never comes
meter = Meter(sys.argv[1], durability="spool")
for n in range(5):
    meter.emit(usage_record(f"last-{n}"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, url], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    with Ledger(url) as ledger:
        recover_abandoned(ledger)
        found = [one.record.request_id for one in ledger.read(Selection(ALL_TENANTS))]
        assert sorted(found) == [f"last-{n}" for n in range(5)]
