"""Statements under pressure: issued by many at once, after pruning, tampered with, and by another tenant's name."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select, text

from polar_billing.errors import PeriodError, PriceBookError
from polar_billing.ledger.books import add_book
from polar_billing.ledger.retention import prune
from polar_billing.ledger.schema import statement_table, transaction_table
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.proof.verify import verify_ledger
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import issue_statement, issued_statements
from polar_billing.statements.tracing import recheck, usage_of_line
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.statements.issued import IssuedStatement

NOVEMBER, DECEMBER = Period.month("2026-11"), Period.month("2026-12")
END, LATER = datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
PLANS = PriceBook.example(EXAMPLE_PLANS)


@pytest.fixture
def put(put: Callable[..., int]) -> Callable[..., int]:
    """As for all statements, with 1,000 CU."""
    return partial(put, units=1_000)


def in_threads(work: Callable[[], object], count: int) -> list[BaseException]:
    """Run the same work several times at once; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_many_who_issue_the_same_statement_get_one(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "r")
    issued: list[IssuedStatement] = []
    assert in_threads(lambda: issued.append(issue_statement(store, "someone", NOVEMBER, now=LATER)), 6) == []
    assert len({entry.number for entry in issued}) == 1
    with store.snapshot() as connection:
        assert connection.execute(select(func.count()).select_from(statement_table)).scalar() == 1
        assert connection.execute(select(func.count()).select_from(transaction_table)).scalar() == 1


def test_two_periods_issued_at_once_charge_late_usage_once(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "november")
    issue_statement(store, "someone", NOVEMBER, now=END)
    put(store, "late")
    periods = [Period.month("2026-12"), Period.month("2027-01"), Period.month("2027-02")]
    waiting = iter(periods)
    after = datetime(2027, 3, 1, tzinfo=UTC)
    assert in_threads(lambda: issue_statement(store, "someone", next(waiting), now=after), 3) == []
    issued = issued_statements(store, "someone")
    assert len(issued) == 4
    assert sum(entry.statement.requests_late for entry in issued) == 1
    assert [difference for entry in issued for difference in recheck(store, entry)] == []


def test_usage_stored_while_a_statement_is_issued_is_on_it_or_late_never_lost(
    store: Ledger, put: Callable[..., int]
) -> None:
    put(store, "first")
    numbers = iter(range(1_000))

    def meter() -> None:
        for _ in range(10):
            put(store, f"r{next(numbers)}")

    work = iter([meter, lambda: issue_statement(store, "someone", NOVEMBER, now=END), meter])
    assert in_threads(lambda: next(work)(), 3) == []  # noqa: PLW0108  (each takes its own)
    (november,) = issued_statements(store, "someone")
    december = issue_statement(store, "someone", DECEMBER, now=LATER)
    assert november.statement.requests + december.statement.requests_late == 21
    on_lines = [
        number for entry in (november, december) for number in usage_of_line(store, entry, entry.statement.lines[0])
    ]
    assert sorted(on_lines) == sorted(set(on_lines))
    assert len(on_lines) == 21


def test_verify_makes_every_statement_again(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "r", tenant="globex")
    issue_statement(ledger, "globex", NOVEMBER, now=END)
    assert verify_ledger(ledger).sound
    with ledger.transaction() as connection:
        connection.execute(text("DROP TRIGGER polar_usage_no_update"))
        connection.execute(text("UPDATE polar_usage SET tier = 'economy'"))
    findings = " ".join(str(finding) for finding in verify_ledger(ledger).findings)
    assert "and the usage makes it" in findings


def test_pruned_usage_is_never_missing_from_a_statement_in_silence(store: Ledger, put: Callable[..., int]) -> None:
    put(store, "r")
    issued = issue_statement(store, "someone", NOVEMBER, now=END)
    put(store, "december", started_at=END)
    with store.transaction() as connection:
        prune(connection, "someone", LATER)
    assert recheck(store, issued) == []  # its sums and bookings; the chain stands for the rest
    assert issue_statement(store, "someone", NOVEMBER, now=LATER) == issued
    with pytest.raises(PeriodError):
        draft_statement(store, "someone", DECEMBER)
    with pytest.raises(PeriodError):
        issue_statement(store, "someone", DECEMBER, now=LATER)
    assert verify_ledger(store).sound


def test_a_plan_in_another_book_than_the_receipts_is_not_passed_over(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "r", tenant="acme", book=PriceBook.example())
    assert draft_statement(ledger, "acme", NOVEMBER).price_book == "polar-example"
    add_book(ledger, PLANS)
    with pytest.raises(PriceBookError, match="'polar-example' and 'polar-example-plans'"):
        draft_statement(ledger, "acme", NOVEMBER)
    assert [line.kind for line in draft_statement(ledger, "acme", NOVEMBER, book=PLANS).lines][-1] == "fee"
