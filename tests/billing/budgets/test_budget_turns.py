"""Who decides while others store or prune on PostgreSQL: what is on its way counts once, and nobody counts half of it.

Each test stops one transaction halfway and lets another one run, or wait for it.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.budgets.settlement import settle
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import Entry
from polar_billing.ledger.retention import prune
from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import rate
from polar_billing.testing import usage_record
from polar_sdk.usage import FlopUsage, Offer, UsageBound
from tests.billing.conftest import ONE_DOLLAR_PER_CU

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Connection

    from polar_billing.ledger.append import Settle

CU = 10**12
NOON = datetime(2026, 11, 15, 12, tzinfo=UTC)
BOOK = PriceBook.from_toml(ONE_DOLLAR_PER_CU)
PATIENCE_S = 30

pytestmark = pytest.mark.parametrize("store", ["postgresql"], indirect=True)


@pytest.fixture
def budgets(store: Ledger) -> Budgets:
    assert isinstance(store, Ledger)
    budgets = Budgets(store)
    budgets.set(Budget("acme", Decimal(10), "USD"), BOOK)
    budgets.set(Budget("acme", Decimal(10), "CU"), BOOK)
    return budgets


def reserve(budgets: Budgets, request_id: str) -> None:
    offers = (Offer(tier="standard", program="0-5", flops_bound=2 * CU),)
    bound = UsageBound(
        request_id=request_id, tenant="acme", tokens_input=1, tokens_output_max=1, offers=offers, at=NOON
    )
    budgets.reserve(bound, BOOK, source="polar")


def use(ledger: Ledger, request_id: str, *settling: Settle) -> None:
    record = usage_record(request_id, tenant="acme", started_at=NOON, flops=FlopUsage(head=CU, total=CU))

    def settle_all(connection: Connection, entries: Sequence[Entry]) -> None:
        for one in settling or [settle]:
            one(connection, entries)

    ledger.append_many([Entry(record, "polar", BOOK, rate(record, BOOK).cost)], settle_all)


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


def test_others_decide_while_usage_is_written(budgets: Budgets) -> None:
    stop = Stop()
    with beside(lambda: use(budgets.ledger, "stored", stop, settle)):  # before what it counts is settled
        assert stop.reached.wait(PATIENCE_S)
        reserve(budgets, "decided meanwhile")  # the first one: its counters are computed without what is on its way
        stop.go_on.set()
    assert standing(budgets) == [(1, 2), (1, 2)]


def test_others_wait_once_it_is_settled(budgets: Budgets) -> None:
    stop = Stop()
    with beside(lambda: use(budgets.ledger, "stored", settle, stop)):
        assert stop.reached.wait(PATIENCE_S)
        with beside(lambda: reserve(budgets, "decided after it")):
            wait_until_another_waits(budgets.ledger)
            stop.go_on.set()
    assert standing(budgets) == [(1, 2), (1, 2)]


def test_a_first_budget_waits_for_usage_that_knows_of_none(store: Ledger) -> None:
    stop, budgets = Stop(), Budgets(store)
    with beside(lambda: use(store, "stored", settle, stop)):
        assert stop.reached.wait(PATIENCE_S)
        with beside(lambda: budgets.set(Budget("acme", Decimal(10), "USD"), BOOK)) as setting:
            setting.join(0.2)
            assert setting.is_alive()  # it waits for the tenant's chain
            stop.go_on.set()
    reserve(budgets, "first")
    assert standing(budgets) == [(1, 2)]


def test_others_wait_while_usage_is_pruned(budgets: Budgets) -> None:
    reserve(budgets, "old")
    use(budgets.ledger, "old")
    budgets.set(Budget("acme", Decimal(11), "USD"), BOOK)  # another limit: its counter is to be computed again
    with budgets.ledger.transaction() as connection:
        assert prune(connection, "acme", NOON + timedelta(days=1)) == 1
        deciding = threading.Thread(target=reserve, args=(budgets, "new"))
        deciding.start()
        wait_until_another_waits(budgets.ledger)
    deciding.join(PATIENCE_S)
    assert standing(budgets) == [(1, 2), (1, 2)]
