"""Holds as a state machine: reserve, settle, release, expire, with time that moves either way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select, text, update

from polar_billing.budgets.budget import Budget, Level, OverBudget
from polar_billing.budgets.enforcement import Budgets, _Wanted
from polar_billing.budgets.holds import Ask, Granted, HoldState
from polar_billing.budgets.offers import Cost, Refusal, costs
from polar_billing.errors import ConflictError, CurrencyMixError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Identity
from polar_billing.ledger.schema import hold_table
from polar_billing.values.periods import Period, Window
from polar_sdk.errors import BudgetExceededError
from tests.billing.storing import CU, DOLLARS, NOON, bound_of, use

if TYPE_CHECKING:
    from polar_sdk.usage import UsageBound

START = datetime(2026, 3, 28, 12, tzinfo=UTC)  # the day before clocks change in Berlin
LIFETIME = timedelta(minutes=1)


def emit(ledger: Ledger, bound: UsageBound, flops: int) -> None:
    use(ledger, bound.request_id, flops, tenant=bound.tenant, tags=dict(bound.tags), started_at=bound.at)


class Wanted(NamedTuple):
    tags: dict[str, str]
    flops: int
    cheaper: list[int]

    def bound(self, request_id: str, at: datetime, tenant: str) -> UsageBound:
        offers = [one * CU - 1 for one in self.cheaper]
        return bound_of(request_id, self.flops * CU, *offers, tags=self.tags, tenant=tenant, at=at)


_WANTED = st.builds(
    Wanted,
    tags=st.fixed_dictionaries({}, optional={"user": st.sampled_from(["ann", "bob"]), "key": st.just("k1")}),
    flops=st.integers(1, 12),
    cheaper=st.lists(st.integers(1, 4), max_size=2),
)


@dataclass
class Expected:
    """One request, as it should stand."""

    bound: UsageBound
    offer: int
    held_until: datetime
    state: HoldState
    used: int = 0

    @property
    def flops(self) -> int:
        return self.bound.offers[self.offer].flops_bound


class Holds(RuleBasedStateMachine):
    """Three levels in two units and two windows, against a model in a dozen lines."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.ledger = Ledger("sqlite://")
        self.budgets = Budgets(self.ledger, lifetime=LIFETIME, clock=lambda: self.now)
        self.requests: list[Expected] = []
        self.names = (f"r{number}" for number in count())

    @initialize(shallower=st.booleans())
    def set_budgets(self, shallower: bool) -> None:
        over = OverBudget.SHALLOWER if shallower else OverBudget.REFUSE
        for budget in (
            Budget("acme", Decimal(40), "CU", window=Window.MONTH, over_budget=over),
            Budget("acme", Decimal(25), "USD", window=Window.DAY, zone="Europe/Berlin", over_budget=over),
            Budget("acme", Decimal(15), "USD", Level.USER, "ann", over_budget=over),
            Budget("acme", Decimal(12), "CU", Level.KEY, "k1", Window.WEEK, "Asia/Kolkata", over_budget=over),
            Budget("globex", Decimal(5), "CU"),
        ):
            self.budgets.set(budget, DOLLARS)
        self.limits = {budget.key: budget for budget in self.budgets.in_force(ALL_TENANTS)}

    def teardown(self) -> None:
        assert self.budgets.recheck(ALL_TENANTS) == []  # the counters are what usage and holds add up to
        self.ledger.close()

    def expected(self, budget: Budget, at: datetime) -> tuple[int, int]:
        """Spent and held, in FLOPs: a USD is a CU here."""
        period = Period.containing(at, budget.window, budget.zone)
        assert period.since is not None
        assert period.until is not None
        mine = [
            request
            for request in self.requests
            if request.bound.tenant == budget.tenant
            and budget.covers(request.bound.tags)
            and period.since <= request.bound.at < period.until
        ]
        spent = sum(request.used for request in mine)
        return spent, sum(request.flops for request in mine if request.state is HoldState.HELD)

    def expire_due(self, tenant: str) -> None:
        for request in self.requests:
            if request.bound.tenant == tenant and request.state is HoldState.HELD and request.held_until <= self.now:
                request.state = HoldState.EXPIRED

    def offer_for(self, bound: UsageBound) -> int | None:
        """The offer that a request gets, or None; if it gets one, it is held from now on."""
        self.expire_due(bound.tenant)
        mine = [one for one in self.limits.values() if one.tenant == bound.tenant and one.covers(bound.tags)]
        room = {one.key: one.limit_count - sum(self.expected(one, self.now)) for one in mine}
        shallower = mine[0].over_budget is OverBudget.SHALLOWER
        candidates = bound.offers if shallower else bound.offers[:1]
        for n, offer in enumerate(candidates):
            if all(offer.flops_bound <= left for left in room.values()):
                self.requests.append(Expected(bound, n, self.now + LIFETIME, HoldState.HELD))
                return n
        return None

    @rule(wanted=_WANTED, tenant=st.sampled_from(["acme", "acme", "acme", "globex"]))
    def reserve(self, wanted: Wanted, tenant: str) -> None:
        bound = wanted.bound(next(self.names), self.now, tenant)
        offer = self.offer_for(bound)
        if offer is None:
            with pytest.raises(BudgetExceededError) as caught:
                self.budgets.reserve(bound, DOLLARS, source="polar")
            assert Decimal(caught.value.needed or 0) > Decimal(caught.value.remaining or 0)
            assert caught.value.resets_at is not None
            assert caught.value.resets_at > self.now
        else:
            assert self.budgets.reserve(bound, DOLLARS, source="polar") == offer

    @rule(
        wanted=st.lists(_WANTED, min_size=1, max_size=6),
        tenant=st.sampled_from(["acme", "acme", "globex"]),
        data=st.data(),
    )
    def reserve_and_release_together(self, wanted: list[Wanted], tenant: str, data: st.DataObject) -> None:
        """As if they had come one after another, releases first, whatever comes twice or is in another currency."""
        mine = [request for request in self.requests if request.bound.tenant == tenant]
        back = data.draw(st.lists(st.sampled_from(mine), max_size=3)) if mine else []
        bounds = [one.bound(next(self.names), self.now, tenant) for one in wanted]
        asks = [_Wanted(Ask(bound, dict(enumerate(costs(bound, DOLLARS))), "polar"), None) for bound in bounds]
        euros = Ask(bounds[0], {0: Cost("EUR", CU, CU)}, "elsewhere")
        ids = [(tenant, "polar", request.bound.request_id) for request in back]
        calls: list[_Wanted | Identity] = [*asks, *ids, _Wanted(euros, None), asks[0]]
        came = self.budgets._run(tenant, lambda: calls)
        self.budgets._unanswered.clear()  # as every call does for its own when it has the answer
        answers, released, (foreign, twice) = came[: len(asks)], came[len(asks) : -2], came[-2:]
        assert released == [request.state is HoldState.HELD for request in back]
        for request in back:
            if request.state is HoldState.HELD:
                request.state = HoldState.RELEASED
        for bound, answer in zip(bounds, answers, strict=True):
            offer = self.offer_for(bound)
            assert (answer.offer if isinstance(answer, Granted) else None) == offer
            assert isinstance(answer, Granted | Refusal)
        in_money = any(one.unit != "CU" and one.tenant == tenant for one in self.limits.values())
        assert isinstance(foreign, CurrencyMixError) == in_money
        if isinstance(foreign, Granted):
            assert self.budgets.release(tenant, bounds[0].request_id, source="elsewhere")
        assert isinstance(twice, ConflictError)

    def some(self, data: st.DataObject, *states: HoldState) -> Expected | None:
        found = [request for request in self.requests if request.state in states]
        return data.draw(st.sampled_from(found)) if found else None

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def reserve_again(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.expire_due(request.bound.tenant)
        self.budgets.expire(request.bound.tenant)
        how = {HoldState.HELD: "is being served", HoldState.SETTLED: "was served before"}.get(request.state)
        if how is not None:
            with pytest.raises(ConflictError, match=how):
                self.budgets.reserve(request.bound, DOLLARS, source="polar")

    @rule(data=st.data(), share=st.floats(0, 1))
    def settle(self, data: st.DataObject, share: float) -> None:
        if request := self.some(data, HoldState.HELD):
            request.used = int(request.flops * share)
            emit(self.ledger, request.bound, request.used)
            request.state = HoldState.SETTLED
            emit(self.ledger, request.bound, request.used)  # a replay counts nothing

    @rule(data=st.data())
    def settle_late(self, data: st.DataObject) -> None:
        """The answer took longer than its hold: what it used counts all the same."""
        if (request := self.some(data, HoldState.EXPIRED, HoldState.RELEASED)) and not request.used:
            request.used = request.flops
            emit(self.ledger, request.bound, request.used)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if request := self.some(data, *HoldState):
            given_back = self.budgets.release(request.bound.tenant, request.bound.request_id, source="polar")
            assert given_back == (request.state is HoldState.HELD)
            if given_back:
                request.state = HoldState.RELEASED

    @rule(minutes=st.integers(1, 14 * 60))
    def time_passes(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @rule(minutes=st.integers(1, 3 * 60))
    def clock_goes_back(self, minutes: int) -> None:
        self.now -= timedelta(minutes=minutes)

    @rule()
    def expire(self) -> None:
        before = sum(request.state is HoldState.HELD for request in self.requests)
        self.expire_due("acme")
        self.expire_due("globex")
        assert self.budgets.expire() == before - sum(request.state is HoldState.HELD for request in self.requests)

    @rule(limit=st.integers(5, 60))
    def set_another_limit(self, limit: int) -> None:
        budget = replace(self.limits["acme", "tenant", "", "CU", "month"], limit=Decimal(limit))
        self.budgets.set(budget, DOLLARS)
        self.limits[budget.key] = budget

    @invariant()
    def counters_are_what_was_reserved_and_used(self) -> None:
        if not hasattr(self, "limits"):
            return
        for standing in self.budgets.standings(ALL_TENANTS, self.now):
            assert (standing.spent, standing.held) == self.expected(standing.budget, self.now)
        held = [request.bound.request_id for request in self.requests if request.state is HoldState.HELD]
        assert [hold.request_id for hold in self.budgets.holds(ALL_TENANTS)] == held


Holds.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
TestHolds = Holds.TestCase


def test_a_hold_is_resolved_once_whoever_tries(store: Ledger) -> None:
    budgets = Budgets(store)
    budgets.set(Budget("acme", Decimal(10)))
    budgets.reserve(bound_of("a", CU), DOLLARS, source="polar")
    assert budgets.release("acme", "a", source="polar")
    for change in ({"state": "settled"}, {"state": "held", "resolved_at": None}, {"cost_bound": Decimal(0)}):
        with pytest.raises(Exception, match=r"resolved once|append-only"), store.transaction() as connection:
            connection.execute(update(hold_table).values(change))
    budgets.reserve(bound_of("b", CU), DOLLARS, source="polar")
    with pytest.raises(Exception, match=r"resolved once|append-only"), store.transaction() as connection:
        connection.execute(text("DELETE FROM polar_hold WHERE state = 'held'"))
    assert [hold.request_id for hold in budgets.holds("acme")] == ["b"]


def test_a_released_request_may_be_tried_again(store: Ledger) -> None:
    budgets = Budgets(store)
    budgets.set(Budget("acme", Decimal(1)))
    for _ in range(3):
        assert budgets.reserve(bound_of("a", CU), DOLLARS, source="polar") == 0
        assert budgets.release("acme", "a", source="polar")
    assert budgets.reserve(bound_of("a", CU), DOLLARS, source="polar") == 0
    use(store, "a", CU // 2)
    (standing,) = budgets.standings("acme", NOON)
    assert (standing.spent, standing.held, standing.left) == (CU // 2, 0, CU // 2)


def test_a_hold_that_ended_is_not_settled_by_what_is_used_after_it(store: Ledger) -> None:
    now = [START]
    budgets = Budgets(store, lifetime=LIFETIME, clock=lambda: now[0])
    budgets.set(Budget("acme", Decimal(10)))
    for name in ("released", "expired"):
        budgets.reserve(bound_of(name, CU), DOLLARS, source="polar")
    assert budgets.release("acme", "released", source="polar")
    now[0] += LIFETIME
    assert budgets.expire() == 1
    for name in ("released", "expired"):
        use(store, name, CU)
    (standing,) = budgets.standings("acme", NOON)
    assert (standing.spent, standing.held) == (2 * CU, 0)
    with store.snapshot() as connection:
        ended = connection.execute(select(hold_table.c.request_id, hold_table.c.state)).all()
    assert {name: str(state) for name, state in ended} == {"released": "released", "expired": "expired"}


def test_a_request_in_progress_keeps_its_id_to_itself(store: Ledger) -> None:
    budgets = Budgets(store)
    budgets.set(Budget("acme", Decimal(10)))
    budgets.reserve(bound_of("a", CU), DOLLARS, source="polar")
    for again in (bound_of("a", 2 * CU), bound_of("a", CU)):
        with pytest.raises(ConflictError, match="acme"):
            budgets.reserve(again, DOLLARS, source="polar")
    assert budgets.reserve(bound_of("a", CU), DOLLARS, source="elsewhere") == 0  # another meter's request
    assert len(budgets.holds("acme")) == 2
