"""Many on the same budgets, and holders that are killed: what is on its way counts once, and nothing is overspent."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import perf_counter
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from polar_billing.budgets.budget import Budget, Level
from polar_billing.budgets.enforcement import HOLD_LIFETIME, Budgets
from polar_billing.budgets.settlement import settle
from polar_billing.ledger.records import Entry, Selection
from polar_billing.prices.rating import rate
from polar_billing.statements.retention import prune
from polar_billing.testing import usage_record
from polar_sdk.usage import FlopUsage
from tests.billing.storing import CU, DOLLARS, NOON, ONE_DOLLAR_PER_CU, bound_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sqlalchemy import Connection

    from polar_billing.ledger.append import Settle
    from polar_billing.ledger.ledger import Ledger

COMMON = """
import os, random, signal, sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_sdk.errors import BudgetExceededError
from polar_sdk.usage import FlopUsage, Offer, UsageBound
url, prices, worker = sys.argv[1], sys.argv[2], int(sys.argv[3])
meter = Meter(url, prices=prices)
AT, CU = datetime(2026, 11, 15, 12, tzinfo=UTC), 10**12

def reserve(name, flops, tags):
    offers = (Offer(tier="standard", program="0-5", flops_bound=flops),)
    meter.reserve(UsageBound(request_id=name, tenant="acme", tags=tags, tokens_input=10, tokens_output_max=10,
                             offers=offers, at=AT, id_is_new=True))

def emit(name, flops, tags):
    meter.emit(usage_record(name, tags=tags, started_at=AT, flops=FlopUsage(head=flops, total=flops)))
"""
RACE = (
    COMMON
    + """
THREADS, RESERVATIONS = map(int, sys.argv[4:])

def run(thread):
    chance, served, refused, wrongly = random.Random(f"{worker} {thread}"), 0, 0, 0
    for n in range(RESERVATIONS):
        name, most = f"{worker}-{thread}-{n}", chance.randint(CU // 2, CU)
        tags = {"user": chance.choice(["ann", "bob"]), "key": f"k{worker % 3}"}
        try:
            reserve(name, most, tags)
        except BudgetExceededError as error:
            refused += 1
            wrongly += Decimal(error.needed) <= Decimal(error.remaining)
            continue
        if chance.random() < 0.1:
            meter.release("acme", name)
            continue
        emit(name, chance.randint(most // 4, most), tags)
        served += 1
    return served, refused, wrongly

with ThreadPoolExecutor(THREADS) as pool:
    counts = list(pool.map(run, range(THREADS)))
meter.close()
print(*map(sum, zip(*counts)))
"""
)
HOLDER = (
    COMMON
    + """
reserve("finished", CU, {"user": "ann"})
emit("finished", CU // 2, {"user": "ann"})
reserve("killed", 3 * CU, {"user": "ann"})
meter.watch("acme", "killed", print)
os.kill(os.getpid(), signal.SIGKILL)
"""
)


def worker(code: str, store: Ledger, prices: Path, *numbers: int) -> subprocess.Popen[str]:
    url = store.url.render_as_string(hide_password=False)
    arguments = [sys.executable, "-c", code, url, str(prices), *map(str, numbers)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    file = tmp_path / "prices.toml"
    file.write_text(ONE_DOLLAR_PER_CU, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("processes", "threads", "reservations"), [(3, 3, 8), pytest.param(4, 16, 200, marks=pytest.mark.long)]
)
@pytest.mark.timeout(3_600)
def test_processes_race_three_levels_of_budgets(
    store: Ledger, prices: Path, processes: int, threads: int, reservations: int
) -> None:
    demand = processes * threads * reservations  # each up to 1 CU, so that less than half of it can be served
    budgets = Budgets(store)
    for budget in (
        Budget("acme", Decimal(demand) / 4, "USD"),
        Budget("acme", Decimal(demand) / 8, "CU", Level.USER, "ann"),
        Budget("acme", Decimal(demand) / 10, "USD", Level.KEY, "k0"),
    ):
        budgets.set(budget)
    begin = perf_counter()
    workers = [worker(RACE, store, prices, number, threads, reservations) for number in range(processes)]
    served = refused = wrongly = 0
    for process in workers:
        out, errors = process.communicate(timeout=3_000)
        assert process.returncode == 0, errors
        counts = [int(count) for count in out.split()]
        served, refused, wrongly = served + counts[0], refused + counts[1], wrongly + counts[2]
    per_second = demand / (perf_counter() - begin)
    standings = budgets.standings("acme", NOON)
    overspent = sum(standing.left < 0 for standing in standings)
    # `make bench-serving` reads these figures.
    print(f"{store.url.get_backend_name()}: {demand} reservations, {per_second:.0f}/s")
    print(f"{overspent} budgets overspent, {wrongly} refused wrongly")
    assert (overspent, wrongly) == (0, 0)
    assert [standing.held for standing in standings] == [0, 0, 0]
    assert budgets.holds("acme") == []
    assert budgets.recheck("acme") == []
    assert refused > 0
    usage = list(store.read(Selection("acme")))
    assert len(usage) == served
    assert sum(stored.record.flops.total for stored in usage) == standings[0].spent
    assert sum(one.record.flops.total for one in usage if one.record.tags["user"] == "ann") == standings[1].spent


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_what_a_killed_process_held_expires(store: Ledger, prices: Path) -> None:
    later = datetime.now(UTC)
    budgets = Budgets(store, clock=lambda: later)
    budgets.set(Budget("acme", Decimal(4), "USD"))
    budgets.set(Budget("acme", Decimal(4), "CU", Level.USER, "ann"))
    holder = worker(HOLDER, store, prices, 0)
    _, errors = holder.communicate(timeout=120)
    assert holder.returncode == -signal.SIGKILL, errors
    (hold,) = budgets.holds("acme")
    assert hold.request_id == "killed"
    assert [(standing.spent, standing.held) for standing in budgets.standings("acme", NOON)] == [(CU // 2, 3 * CU)] * 2
    assert budgets.expire() == 0  # not yet
    later = hold.expires_at - timedelta(microseconds=1)
    assert budgets.expire() == 0
    later = hold.expires_at
    assert hold.expires_at - hold.held_at == HOLD_LIFETIME
    assert budgets.expire() == 1
    assert budgets.holds("acme") == []
    assert [(standing.spent, standing.held) for standing in budgets.standings("acme", NOON)] == [(CU // 2, 0)] * 2
    assert budgets.recheck("acme") == []


PATIENCE_S = 30

on_postgres = pytest.mark.parametrize("store", ["postgresql"], indirect=True)
"""Each test stops one transaction halfway and lets another one run, or wait for it."""


@pytest.fixture
def budgets(store: Ledger) -> Budgets:
    budgets = Budgets(store)
    budgets.set(Budget("acme", Decimal(10), "USD"), DOLLARS)
    budgets.set(Budget("acme", Decimal(10), "CU"), DOLLARS)
    return budgets


def reserve(budgets: Budgets, request_id: str) -> None:
    budgets.reserve(bound_of(request_id, 2 * CU), DOLLARS, source="polar")


def use(ledger: Ledger, request_id: str, *settling: Settle) -> None:
    record = usage_record(request_id, tenant="acme", started_at=NOON, flops=FlopUsage(head=CU, total=CU))

    def settle_all(connection: Connection, entries: Sequence[Entry]) -> None:
        for one in settling or [settle]:
            one(connection, entries)

    ledger.append_many([Entry(record, "polar", DOLLARS, rate(record, DOLLARS).cost)], settle_all)


@contextmanager
def beside(act: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run something in another thread, and see it end."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


class Stop:
    """Stops whoever stores usage, in the transaction that does."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, connection: Connection, entries: Sequence[Entry]) -> None:
        self.reached.set()
        assert self.go_on.wait(PATIENCE_S)


def wait_until_another_waits(ledger: Ledger) -> None:
    """Until a transaction waits for the lock on a tenant's counts."""
    waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    for _ in range(PATIENCE_S * 100):
        with ledger._database.reading() as connection:
            if connection.execute(waiting).scalar_one():
                return
        threading.Event().wait(0.01)
    raise AssertionError("nobody waits")


def standing(budgets: Budgets) -> list[tuple[int, int]]:
    """Spent and held of both budgets, which are what usage and holds add up to."""
    assert budgets.recheck("acme") == []
    return [(one.spent // CU, one.held // CU) for one in budgets.standings("acme", NOON)]


@on_postgres
def test_others_decide_while_usage_is_written(budgets: Budgets) -> None:
    stop = Stop()
    with beside(lambda: use(budgets.ledger, "stored", stop, settle)):  # before what it counts is settled
        assert stop.reached.wait(PATIENCE_S)
        reserve(budgets, "decided meanwhile")  # the first one: its counters are computed without what is on its way
        stop.go_on.set()
    assert standing(budgets) == [(1, 2), (1, 2)]


@on_postgres
def test_others_wait_once_it_is_settled(budgets: Budgets) -> None:
    stop = Stop()
    with beside(lambda: use(budgets.ledger, "stored", settle, stop)):
        assert stop.reached.wait(PATIENCE_S)
        with beside(lambda: reserve(budgets, "decided after it")):
            wait_until_another_waits(budgets.ledger)
            stop.go_on.set()
    assert standing(budgets) == [(1, 2), (1, 2)]


@on_postgres
def test_a_first_budget_waits_for_usage_that_knows_of_none(store: Ledger) -> None:
    stop, budgets = Stop(), Budgets(store)
    with beside(lambda: use(store, "stored", settle, stop)):
        assert stop.reached.wait(PATIENCE_S)
        with beside(lambda: budgets.set(Budget("acme", Decimal(10), "USD"), DOLLARS)) as setting:
            setting.join(0.2)
            assert setting.is_alive()  # it waits for the tenant's chain
            stop.go_on.set()
    reserve(budgets, "first")
    assert standing(budgets) == [(1, 2)]


@on_postgres
def test_others_wait_while_usage_is_pruned(budgets: Budgets) -> None:
    reserve(budgets, "old")
    use(budgets.ledger, "old")
    budgets.set(Budget("acme", Decimal(11), "USD"), DOLLARS)  # another limit: its counter is to be computed again
    with budgets.ledger.transaction() as connection:
        assert prune(connection, "acme", NOON + timedelta(days=1)) == 1
        deciding = threading.Thread(target=reserve, args=(budgets, "new"))
        deciding.start()
        wait_until_another_waits(budgets.ledger)
    deciding.join(PATIENCE_S)
    assert standing(budgets) == [(1, 2), (1, 2)]
