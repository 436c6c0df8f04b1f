"""Budgets as values, the choice of an offer, and what counts in which window."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from polar_billing.budgets import counters, enforcement
from polar_billing.budgets.budget import MAX_COUNT, Budget, Level, OverBudget, to_count
from polar_billing.budgets.counters import FULL
from polar_billing.budgets.enforcement import Budgets
from polar_billing.budgets.offers import Cost, Refusal, Standing, choose
from polar_billing.errors import BudgetError, CurrencyMixError, PeriodError, StoreError
from polar_billing.ledger.records import ALL_TENANTS
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period, Window
from polar_sdk.errors import BudgetExceededError, SinkError
from polar_sdk.usage import FlopUsage
from tests.billing.storing import CU, DOLLARS, NOON, bound_of, use

if TYPE_CHECKING:
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger


MONTH = Period.containing(NOON, Window.MONTH)


def book_in(currency: str, per_compute_unit: str = "1") -> PriceBook:
    return PriceBook.from_toml(
        f"""
        id = "in {currency}"
        currency = "{currency}"
        [[prices]]
        effective_from = 2024-01-01
        per_compute_unit = {per_compute_unit}
        tiers = {{standard = 1}}
        """
    )


@pytest.fixture
def budgets(store: Ledger) -> Budgets:
    return Budgets(store)


@pytest.mark.parametrize(
    "fields",
    [
        *({"limit": limit} for limit in (Decimal(-1), Decimal("NaN"), 0.1, True, "much", MAX_COUNT + 1)),
        *({"limit": limit} for limit in ("0.0000000000001", "1234567.123456789012")),
        *({"unit": "usd"}, {"level": "team"}, {"window": "year"}, {"over_budget": "ask"}, {"zone": "Mars/Olympus"}),
        *({"name": "x"}, {"level": "key", "name": " "}, {"tenant": "x" * 201}),
    ],
)
def test_a_value_that_its_field_does_not_allow_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises((BudgetError, PeriodError)) as caught:
        Budget(**{"tenant": "acme", "limit": 1, **fields})
    *_, value = fields.values()
    assert str(value)[:40].replace(str(MAX_COUNT + 1), "large") in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@given(st.decimals(min_value=0, max_value=10**6 - 1, places=12))
def test_ordinary_limits_are_kept_to_the_last_decimal(limit: Decimal) -> None:
    budget = Budget("acme", limit)
    assert budget.decimals == 12
    assert budget.amount(budget.limit_count) == limit


@given(st.integers(0, MAX_COUNT), st.integers(0, 10**18))
def test_large_limits_are_exact_and_amounts_round_up(limit: int, amount: int) -> None:
    budget = Budget("acme", Decimal(limit), "VND")
    assert budget.amount(budget.limit_count) == limit
    assert budget.limit_count <= MAX_COUNT
    count = to_count(amount, budget.decimals)
    exact = Decimal(amount).scaleb(-12)
    assert exact <= budget.amount(count) < exact + Decimal(1).scaleb(-budget.decimals)


costs = st.builds(Cost, st.just("USD"), st.integers(0, 10 * CU) | st.none(), st.integers(0, 10 * CU))
standings = st.builds(
    lambda unit, limit, spent, held, over: Standing(
        Budget("acme", Decimal(limit), unit, over_budget=over), MONTH, spent, held
    ),
    st.sampled_from(["CU", "USD"]),
    st.integers(0, 20),
    st.integers(0, 15 * CU),
    st.integers(0, 5 * CU),
    st.sampled_from(OverBudget),
)


@given(st.lists(standings, max_size=4), st.lists(costs, min_size=1, max_size=4))
def test_what_is_chosen_fits_everywhere_and_is_the_first_that_can_be(
    standings: list[Standing], offers: list[Cost]
) -> None:
    def over(offer: Cost) -> list[Standing]:
        amounts = [(standing, offer.flops if standing.budget.unit == "CU" else offer.money) for standing in standings]
        return [
            standing
            for standing, amount in amounts
            if amount is None or standing.spent + standing.held + amount > standing.budget.limit_count
        ]

    chosen = choose(standings, offers)
    if isinstance(chosen, Refusal):
        assert chosen.standing in over(chosen.cost)
        assert str(chosen.error())
        refusing = [standing.budget.over_budget is OverBudget.REFUSE for standing in over(chosen.cost)]
        assert any(refusing) or all(over(offer) for offer in offers)
        return
    assert over(offers[chosen]) == []
    for skipped in offers[:chosen]:
        assert over(skipped)
        assert all(standing.budget.over_budget is OverBudget.SHALLOWER for standing in over(skipped))


def test_a_budget_is_superseded_not_edited(budgets: Budgets) -> None:
    first = Budget("acme", Decimal(10))
    budgets.set(first)
    budgets.set(first)  # the same again says nothing new
    budgets.set(replace(first, limit=Decimal(20), zone="Asia/Tokyo"))
    assert budgets.in_force("acme") == [Budget("acme", Decimal(20), zone="Asia/Tokyo")]
    with budgets.ledger.snapshot() as connection:
        rows = connection.execute(text("SELECT limit_count, zone FROM polar_budget ORDER BY seq")).all()
        links = connection.execute(text("SELECT count(*) FROM polar_chain_link WHERE subject = 'budget'")).scalar()
    assert [tuple(row) for row in rows] == [(10 * CU, "UTC"), (20 * CU, "Asia/Tokyo")]
    assert links == 2
    for change in ("UPDATE polar_budget SET limit_count = 1", "DELETE FROM polar_budget"):
        with pytest.raises(Exception, match="append-only"), budgets.ledger.transaction() as connection:
            connection.execute(text(change))


def test_a_closed_budget_no_longer_counts(budgets: Budgets) -> None:
    budgets.set(Budget("acme", Decimal(0)))
    with pytest.raises(BudgetExceededError):
        budgets.reserve(bound_of("a", CU), DOLLARS, source="polar")
    closed = budgets.close("acme", level="tenant", unit="CU", window="month")
    assert closed.limit == 0
    assert budgets.in_force("acme") == []
    assert budgets.reserve(bound_of("a", CU), DOLLARS, source="polar") == 0
    assert budgets.holds("acme") == []
    with pytest.raises(BudgetError, match="acme"):
        budgets.close("acme", level="tenant", unit="CU", window="month")
    with pytest.raises(BudgetError, match="ann"):
        budgets.close("acme", level="user", unit="CU", window="month", name="ann")


def test_usage_before_the_first_budget_counts(budgets: Budgets) -> None:
    use(budgets.ledger, "before", 3 * CU, tags={"user": "ann"})
    use(budgets.ledger, "of bob", CU, tags={"user": "bob"})
    use(budgets.ledger, "last month", CU, started_at=NOON - timedelta(days=30), tags={"user": "ann"})
    use(budgets.ledger, "other tenant", CU, tenant="globex", tags={"user": "ann"})
    use(budgets.ledger, "in yen", CU, book=book_in("JPY"))
    budgets.set(Budget("acme", Decimal(10), "USD"))
    budgets.set(Budget("acme", Decimal(10), "CU"))
    budgets.set(Budget("acme", Decimal(4), "CU", Level.USER, "ann"))
    expected = [4 * CU, 5 * CU, 3 * CU]
    assert [standing.spent for standing in budgets.standings("acme", NOON)] == expected  # computed
    with pytest.raises(BudgetExceededError, match="1 CU"):
        budgets.reserve(bound_of("a", CU + 1, tags={"user": "ann"}), DOLLARS, source="polar")
    assert [standing.spent for standing in budgets.standings("acme", NOON)] == expected  # and counted
    use(budgets.ledger, "without a hold", CU, tags={"user": "ann"})
    assert [standing.spent for standing in budgets.standings("acme", NOON)] == [5 * CU, 6 * CU, 4 * CU]
    assert budgets.recheck("acme") == []


def test_a_limit_changed_within_a_window_keeps_what_was_spent(budgets: Budgets) -> None:
    budgets.set(Budget("acme", Decimal(10)))
    budgets.reserve(bound_of("a", 4 * CU), DOLLARS, source="polar")
    budgets.reserve(bound_of("b", 4 * CU), DOLLARS, source="polar")
    use(budgets.ledger, "a", 2 * CU)
    for limit, left in ((5, -1), (2_000_000, 1_999_994), (10, 4)):
        budgets.set(Budget("acme", Decimal(limit)))
        (standing,) = budgets.standings("acme", NOON)
        assert standing.budget.amount(standing.left) == left
        if left < 1:
            with pytest.raises(BudgetExceededError, match="-1 CU"):
                budgets.reserve(bound_of("c", 1), DOLLARS, source="polar")
    use(budgets.ledger, "b", CU)
    assert [(standing.spent, standing.held) for standing in budgets.standings("acme", NOON)] == [(3 * CU, 0)]


def test_each_window_of_the_zone_begins_anew(budgets: Budgets) -> None:
    """The day on which clocks go forward in Berlin has 23 hours, the next 24."""
    budgets.set(Budget("acme", Decimal(1), window=Window.DAY, zone="Europe/Berlin"))
    borders = [datetime(2026, 3, 28, 23, tzinfo=UTC), datetime(2026, 3, 29, 22, tzinfo=UTC)]
    tick = timedelta(microseconds=1)
    for number, at in enumerate(moment + shift for moment in borders for shift in (-tick, timedelta())):
        if number % 4 in {0, 1, 3}:
            assert budgets.reserve(bound_of(f"r{number}", CU, at=at), DOLLARS, source="polar") == 0
        else:
            with pytest.raises(BudgetExceededError) as caught:
                budgets.reserve(bound_of(f"r{number}", CU, at=at), DOLLARS, source="polar")
            assert caught.value.resets_at == borders[1]
            assert caught.value.resets_at.isoformat() == "2026-03-30T00:00:00+02:00"
    assert len(budgets.holds("acme")) == 3


def test_a_currency_that_nothing_is_charged_in_is_refused(budgets: Budgets) -> None:
    with pytest.raises(CurrencyMixError, match=r"EUR.*USD"):
        budgets.set(Budget("acme", Decimal(1), "EUR"), DOLLARS)
    budgets.set(Budget("acme", Decimal(1), "EUR"))  # no book at hand to compare with
    with pytest.raises(CurrencyMixError, match=r"EUR.*USD"):
        budgets.reserve(bound_of("a", 1), DOLLARS, source="polar")
    assert budgets.reserve(bound_of("a", 1), book_in("EUR"), source="polar") == 0
    with pytest.raises(CurrencyMixError, match=r"EUR.*USD"):
        budgets.reserve(bound_of("b", 1), DOLLARS, source="polar")


def test_enormous_use_stops_no_record(budgets: Budgets) -> None:
    """9 million CU at a limit of one: the counter is full, and stays full, but nothing is lost."""
    budgets.set(Budget("acme", Decimal(1)))
    budgets.reserve(bound_of("a", 1), DOLLARS, source="polar")
    for number in range(3):
        use(budgets.ledger, f"r{number}", 2**62 + 5)
    use(budgets.ledger, "a", 2**62)
    (standing,) = budgets.standings("acme", NOON)
    assert (standing.spent, standing.held) == (FULL, 0)
    assert budgets.recheck("acme") == []
    with pytest.raises(BudgetExceededError):
        budgets.reserve(bound_of("b", 0), DOLLARS, source="polar")


def test_a_hold_is_never_taken_past_the_limit_even_by_a_writer_that_forgot_to_lock(budgets: Budgets) -> None:
    budgets.set(Budget("acme", Decimal(10)))
    budgets.reserve(bound_of("a", 9 * CU), DOLLARS, source="polar")
    with budgets.ledger.transaction() as connection:
        scope = counters.Scope.of("acme", {}, NOON, "USD")
        ((seq, standing),) = counters.standings(connection, [(Budget("acme", Decimal(10)), MONTH)], [scope]).values()
        assert standing.held == 9 * CU
        for amount in (CU + 1, 10 * CU, 10 * CU + 1, FULL):
            assert not counters.raise_held(connection, {seq: (amount, 10 * CU)})
        assert counters.raise_held(connection, {seq: (CU, 10 * CU)})
        assert not counters.raise_held(connection, {seq: (1, 10 * CU)})
        assert counters.raise_held(connection, {seq: (0, 10 * CU)})
        assert not counters.raise_held(connection, {seq: (0, 10 * CU), seq + 1: (0, 10 * CU)})  # no such counter


def test_a_tenant_without_budgets_costs_no_transaction(budgets: Budgets, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets.set(Budget("globex", Decimal(1)))
    assert budgets.reserve(bound_of("a", CU), DOLLARS, source="polar") == 0

    def away(**_: object) -> None:
        raise StoreError("the ledger is away.")

    monkeypatch.setattr(budgets.ledger, "transaction", away)
    monkeypatch.setattr(budgets.ledger, "snapshot", away)
    assert budgets.reserve(bound_of("b", CU), DOLLARS, source="polar") == 0
    assert budgets.release("acme", "b", source="polar") is False
    with pytest.raises(SinkError):  # fail closed
        budgets.reserve(bound_of("c", CU, tenant="globex"), DOLLARS, source="polar")
    monkeypatch.setattr(enforcement, "SEEN_WITHIN_S", -1.0)  # it is time to look again
    assert budgets.reserve(bound_of("d", CU), DOLLARS, source="polar") == 0
    with pytest.raises(SinkError):
        budgets.reserve(bound_of("e", CU, tenant="globex"), DOLLARS, source="polar")
    fresh = Budgets(budgets.ledger)
    with pytest.raises(SinkError):  # never looked: nobody is known to be free
        fresh.reserve(bound_of("f", CU), DOLLARS, source="polar")


def test_a_record_on_its_way_frees_what_it_did_not_use(tmp_path: Path) -> None:
    """It waits in the spool, and its caller goes on; it is stored before a request is refused for lack of room."""
    with Meter(str(tmp_path / "ledger.sqlite3"), prices=DOLLARS, durability="spool") as meter:
        Budgets(meter.ledger).set(Budget("acme", Decimal(10), "USD"), DOLLARS)
        for number in range(9):
            meter.reserve(bound_of(f"r{number}", 2 * CU))
            assert meter._writer is not None
            meter._writer._gather_s = 0.1  # as where the thread that stores has no turn for long
            meter.emit(usage_record(f"r{number}", started_at=NOON, flops=FlopUsage(head=CU, total=CU)))
        with pytest.raises(BudgetExceededError):
            meter.reserve(bound_of("one too many", 2 * CU))


def test_another_process_sees_a_first_budget_before_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Budgets(str(tmp_path / "shared.sqlite3"))
    assert here.reserve(bound_of("a", CU), DOLLARS, source="polar") == 0
    script = "import sys; from polar_billing import Budget, Budgets; Budgets(sys.argv[1]).set(Budget('acme', '0'))"
    subprocess.run([sys.executable, "-c", script, here.ledger.location], check=True, timeout=60)
    monkeypatch.setattr(enforcement, "SEEN_WITHIN_S", -1.0)  # as after five seconds
    with pytest.raises(BudgetExceededError):
        here.reserve(bound_of("b", CU), DOLLARS, source="polar")


def test_this_process_sees_a_first_budget_at_once(store: Ledger) -> None:
    first, another = Budgets(store), Budgets(store)
    assert first.reserve(bound_of("a", CU), DOLLARS, source="polar") == 0
    another.set(Budget("acme", Decimal(0)))
    with pytest.raises(BudgetExceededError, match="tenant 'acme'"):
        first.reserve(bound_of("b", CU), DOLLARS, source="polar")


def test_the_meter_reserves_settles_and_releases(store: Ledger) -> None:
    meter, budgets = Meter(store, prices=DOLLARS), Budgets(store)
    budgets.set(Budget("acme", Decimal(3), "USD"), DOLLARS)
    assert meter.reserve(bound_of("a", 2 * CU)) == 0
    with pytest.raises(BudgetExceededError):
        meter.reserve(bound_of("b", 2 * CU))
    meter.emit(usage_record("a", started_at=NOON, flops=FlopUsage(head=CU, total=CU)))
    assert meter.reserve(bound_of("b", 2 * CU)) == 0
    meter.release("acme", "b")
    meter.release("acme", "b")
    assert [(standing.spent, standing.held) for standing in budgets.standings("acme", NOON)] == [(CU, 0)]
    meter.close()


@pytest.mark.parametrize("name", [" acme", "ac\nme"])
def test_a_budget_is_not_set_for_a_name_that_no_request_can_have(ledger: Ledger, name: str) -> None:
    budgets = Budgets(ledger)
    with pytest.raises(BudgetError):
        budgets.set(Budget(name, Decimal(1)))
    with pytest.raises(BudgetError):
        budgets.set(Budget("acme", Decimal(1), level=Level.USER, name=name))
    assert budgets.in_force(ALL_TENANTS) == []
