"""Holds and counters are checked against the usage that they stand for: spent money is not given back unseen."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from polar_billing.budgets import counters
from polar_billing.budgets.budget import Budget, Level
from polar_billing.budgets.counters import Scope
from polar_billing.budgets.enforcement import Budgets
from polar_billing.budgets.holds import write_budget
from polar_billing.budgets.settlement import settle
from polar_billing.ledger import chain
from polar_billing.ledger.records import ALL_TENANTS, Entry
from polar_billing.prices.rating import rate
from polar_billing.proof.verify import verify_ledger
from polar_billing.statements.retention import prune
from polar_billing.testing import usage_record
from polar_sdk.errors import BudgetExceededError
from polar_sdk.usage import FlopUsage
from tests.billing.storing import CU, DOLLARS, NOON, bound_of, unguarded, use

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger

ANN = {"user": "ann"}


def reserve(budgets: Budgets, request_id: str, flops: int) -> int:
    return budgets.reserve(bound_of(request_id, flops, tags=ANN), DOLLARS, source="polar")


@pytest.fixture
def spent(store: Ledger) -> Budgets:
    """Budgets of 1 CU and 1 USD of which 0.9 are spent: 0.5 with a hold, 0.4 without."""
    budgets = Budgets(store)
    for budget in (Budget("acme", Decimal(1)), Budget("acme", Decimal(1), "USD", Level.USER, "ann")):
        budgets.set(budget, DOLLARS)
    reserve(budgets, "held", CU * 6 // 10)
    use(store, "held", CU // 2, tags=ANN)
    use(store, "not held", CU * 4 // 10, tags=ANN)
    assert verify_ledger(store).sound
    return budgets


def change_past(ledger: Ledger, *statements: str) -> None:
    """Change holds and counters as somebody who knows SQL does."""
    with ledger.transaction() as connection, unguarded(connection):
        for statement in statements:
            assert connection.exec_driver_sql(statement).rowcount


def findings(ledger: Ledger) -> list[str]:
    return [str(finding) for finding in verify_ledger(ledger).findings]


def test_money_that_was_spent_is_not_given_back(spent: Budgets) -> None:
    change_past(spent.ledger, "UPDATE polar_hold SET cost = 0, flops = 0", "DELETE FROM polar_budget_counter")
    for standing in spent.standings("acme", NOON):
        assert standing.spent == CU * 9 // 10  # summed from usage and receipts
    with pytest.raises(BudgetExceededError, match=r"0\.1 CU"):
        reserve(spent, "more", CU * 9 // 10)
    said = [str(wrong) for wrong in spent.recheck_holds(ALL_TENANTS)]
    assert said == [
        "hold 1 of request 'held' says a cost of 0, and its receipt makes it 500000000000 (10^-12 USD).",
        "hold 1 of request 'held' says 0 FLOPs, and its usage 500000000000.",
    ]
    assert [finding.removeprefix("tenant 'acme': ") for finding in findings(spent.ledger)] == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("currency = 'EUR'", "hold 1 of request 'held' is in EUR, and its receipt in USD."),
        ("at = at + 86400000000 * 30", "hold 1 of request 'held' counts at another time than that of its usage."),
        ("user_name = 'bob'", "hold 1 of request 'held' counts for the user 'bob', and its usage for 'ann'."),
        ("user_name = NULL", "hold 1 of request 'held' counts for the user None, and its usage for 'ann'."),
        ("key_name = 'k'", "hold 1 of request 'held' counts for the key 'k', and its usage for None."),
        ("request_id = 'another'", "hold 1 of request 'another' is settled, but the ledger holds no such request."),
        ("source = 'another'", "hold 1 of request 'held' is settled, but the ledger holds no such request."),
    ],
)
def test_a_settled_hold_says_what_its_usage_says(spent: Budgets, change: str, said: str) -> None:
    change_past(spent.ledger, f"UPDATE polar_hold SET {change}", "DELETE FROM polar_budget_counter")
    assert said in [str(wrong) for wrong in spent.recheck_holds("acme")]
    assert f"tenant 'acme': {said}" in findings(spent.ledger)
    assert all(standing.spent >= CU * 9 // 10 for standing in spent.standings("acme", NOON))


@pytest.mark.parametrize("gone", ["DELETE FROM polar_hold", "UPDATE polar_hold SET state = 'expired'"])
def test_without_its_hold_usage_counts_all_the_same(spent: Budgets, gone: str) -> None:
    change_past(spent.ledger, gone, "DELETE FROM polar_budget_counter")
    assert [standing.spent for standing in spent.standings("acme", NOON)] == [CU * 9 // 10] * 2


def test_a_second_settled_hold_of_a_request_is_named(spent: Budgets) -> None:
    names = (
        "tenant, source, request_id, project, user_name, key_name, at, fingerprint, offer, currency, cost_bound, "
        "flops_bound, held_at, expires_at, state, resolved_at, cost, flops"
    )
    copy = f"INSERT INTO polar_hold (attempt, {names}) SELECT 2, {names} FROM polar_hold"
    change_past(spent.ledger, copy, "DELETE FROM polar_budget_counter")
    assert any("so is an earlier hold of the same request" in finding for finding in findings(spent.ledger))
    assert [standing.spent for standing in spent.standings("acme", NOON)] == [CU * 9 // 10] * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("spent = 0", "spent 0 CU, should be 0.9 CU"),
        ("held = 7", "held 0.000000000007 CU, should be 0 CU"),
        ("ends = starts + 1", "Its window or its decimals are not those of the budget."),
        ("decimals = 3", "Its window or its decimals are not those of the budget."),
    ],
)
def test_verify_finds_a_counter_that_is_wrong(spent: Budgets, change: str, said: str) -> None:
    change_past(spent.ledger, f"UPDATE polar_budget_counter SET {change} WHERE unit = 'CU'")
    (finding,) = findings(spent.ledger)
    assert finding.startswith("tenant 'acme': tenant 'acme', 2026-11")
    assert said in finding
    (difference,) = spent.recheck("acme", repair=True)
    assert said in str(difference)
    assert findings(spent.ledger) == []
    assert [standing.spent for standing in spent.standings("acme", NOON)] == [CU * 9 // 10] * 2


def test_a_pruned_request_counts_by_its_hold(spent: Budgets) -> None:
    with spent.ledger.transaction() as connection:
        assert prune(connection, "acme", NOON + timedelta(days=1)) == 2
    assert findings(spent.ledger) == []
    assert spent.recheck("acme") == []  # the counters know more than is left to add up
    assert spent.recheck_holds("acme") == []
    change_past(spent.ledger, "UPDATE polar_hold SET cost = 0, flops = 0")
    (finding, *_) = findings(spent.ledger)
    assert "says a cost of 0, and its receipt makes it 500000000000" in finding


def test_what_was_held_for_a_request_without_a_price_is_what_it_cost(store: Ledger) -> None:
    budgets = Budgets(store)
    budgets.set(Budget("acme", Decimal(1), "USD"), DOLLARS)
    reserve(budgets, "unrated", CU // 2)
    use(store, "unrated", CU // 4, tags=ANN, tier="gold")
    assert findings(store) == []
    assert [standing.spent for standing in budgets.standings("acme", NOON)] == [CU // 2]
    change_past(store, "DELETE FROM polar_budget_counter")
    assert [standing.spent for standing in budgets.standings("acme", NOON)] == [CU // 2]
    change_past(store, "UPDATE polar_hold SET cost = 1")
    assert "says a cost of 1, and its receipt makes it 500000000000" in findings(store)[0]


def test_thousands_of_counters_are_rechecked_in_a_few_queries(store: Ledger) -> None:
    """One query each took minutes; each must be right, too, beside the others."""
    budgets = Budgets(store)
    users = [f"user {n}" for n in range(600)]  # more names than one query takes
    with store.transaction() as connection:
        chain.lock_heads(connection, {"acme"})
        for user in users:
            write_budget(connection, Budget("acme", Decimal(9), "CU", Level.USER, user), closed=False, now=NOON)
    budgets.set(Budget("acme", Decimal(9_000)), DOLLARS)
    entries = []
    for n, user in enumerate(users):
        work = FlopUsage(head=n, total=n)
        record = usage_record(f"r{n}", tags={"user": user}, started_at=NOON, flops=work)
        entries.append(Entry(record, "polar", DOLLARS, rate(record, DOLLARS).cost))
    store.append_many(entries, settle)
    budgets.reserve(bound_of("open", 5, tags={"user": users[7]}), DOLLARS, source="polar")
    queries: list[str] = []
    engine = store._database.engine
    event.listen(engine, "before_cursor_execute", lambda _c, _u, statement, *_: queries.append(statement))
    standings = budgets.standings("acme", NOON)
    assert [(standing.spent, standing.held) for standing in standings] == [
        *((n, 5 * (n == 7)) for n in range(600)),
        (sum(range(600)), 5),
    ]
    assert len(queries) < 20
    with store.transaction() as connection:
        for standing in standings:
            counters.standings(connection, [(standing.budget, standing.period)], [scope_of(standing.budget)])
    queries.clear()
    assert budgets.recheck("acme") == []
    assert len(queries) < 20
    change_past(store, "UPDATE polar_budget_counter SET spent = spent + 1 WHERE name = 'user 11'")
    (difference,) = budgets.recheck("acme", repair=True)
    assert (difference.counted.budget.name, difference.computed.spent) == ("user 11", 11)
    assert budgets.recheck("acme") == []


def scope_of(budget: Budget) -> Scope:
    return Scope.of("acme", {} if budget.name is None else {"user": budget.name}, NOON, "USD")


def test_a_request_that_is_tried_again_later_settles_the_hold_of_the_first_attempt(store: Ledger) -> None:
    """The answer of `reserve` was lost: the second attempt is served at a time of its own."""
    budgets = Budgets(store)
    budgets.set(Budget("acme", Decimal(1)))
    reserve(budgets, "again", CU // 2)
    budgets._unanswered.add(("acme", "polar", "again"))  # as if the answer had been lost
    reserve(budgets, "again", CU // 2)
    use(store, "again", CU // 4, tags=ANN, started_at=NOON + timedelta(minutes=5))
    assert budgets.recheck_holds(ALL_TENANTS) == []
    assert verify_ledger(store).sound
