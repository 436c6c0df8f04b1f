"""Holds live as long as their work: renewed while it runs, and given away when nobody renews them."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from polar_billing.budgets.budget import Budget, Level
from polar_billing.budgets.enforcement import HOLD_LIFETIME, Budgets
from polar_billing.budgets.holds import HoldState
from polar_billing.errors import ConflictError, StoreLockedError
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.proof.verify import verify_ledger
from polar_sdk.errors import BudgetExceededError
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Outcome
from tests.billing.storing import CU, NOON, bound_of, use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from tests.billing.conftest import JumpingClock

MINUTE = timedelta(minutes=1)
LIFETIME_US = HOLD_LIFETIME // timedelta(microseconds=1)
BOOK = PriceBook.example()


class World:
    """A ledger whose tenant may use 4 CU, and time that passes when it is told to."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.now = ledger, NOON
        self.lost: dict[str, Exception] = {}
        self.mine, self.others = self.budgets(), self.budgets()
        self.mine.set(Budget("acme", Decimal(4)))

    def budgets(self) -> Budgets:
        return Budgets(self.ledger, lifetime=MINUTE, clock=lambda: self.now)

    def reserve(self, request_id: str, flops: int = CU) -> None:
        self.mine.reserve(bound_of(request_id, flops), BOOK, source="polar")
        self.mine.watch(("acme", "polar", request_id), lambda error: self.lost.update({request_id: error}))

    def held(self) -> list[str]:
        return [hold.request_id for hold in self.others.holds(ALL_TENANTS)]


@pytest.fixture
def world(store: Ledger) -> Iterator[World]:
    made = World(store)
    yield made
    for name in made.held():
        made.mine.forget(("acme", "polar", name))  # or its thread would renew it for ever
    made.mine.stop()


def test_a_hold_lives_as_long_as_it_is_renewed(world: World) -> None:
    world.reserve("long")
    for _ in range(20):
        world.now += 0.9 * MINUTE
        assert world.others.expire() == 0
        world.mine.renew()
    world.mine.forget(("acme", "polar", "long"))
    world.now += MINUTE
    world.mine.renew()
    assert world.others.expire() == 1
    assert world.lost == {}


def test_a_request_that_never_began_holds_for_one_lifetime(world: World) -> None:
    """Nobody vouches for it: its caller may have been interrupted before it could."""
    world.mine.reserve(bound_of("a"), BOOK, source="polar")
    world.now += MINUTE
    world.mine.renew()
    assert world.others.expire() == 1


def test_many_holds_are_renewed_in_one_statement(world: World) -> None:
    world.mine.set(Budget("acme", Decimal(10_000)))
    names = [f"r{n:04}" for n in range(600)]
    for name in names:
        world.mine.reserve(bound_of(name), BOOK, source="polar")
    for name in names:  # only now, since the thread that renews them begins with the first
        world.mine.watch(("acme", "polar", name), lambda error: world.lost.update(any=error))
    updates: list[str] = []

    @contextmanager
    def counting() -> Iterator[None]:
        engine = world.ledger._database.engine

        def note(connection: object, cursor: object, statement: str, *_: object) -> None:
            updates.extend([statement] if statement.startswith("UPDATE") else [])

        event.listen(engine, "before_cursor_execute", note)
        yield
        event.remove(engine, "before_cursor_execute", note)

    world.now += 0.9 * MINUTE
    with counting():
        world.mine.renew()
    assert len(updates) == 1
    world.now += 0.9 * MINUTE
    assert world.others.expire() == 0
    assert world.held() == names


def test_what_expired_all_the_same_is_held_again(world: World) -> None:
    """The ledger did not answer for a while; then somebody else was first."""
    world.reserve("late", 3 * CU)
    world.now += MINUTE
    assert world.others.expire() == 1
    world.mine.renew()
    (hold,) = world.mine.holds("acme")
    assert (hold.request_id, hold.attempt, hold.flops_bound) == ("late", 2, 3 * CU)
    assert hold.expires_at == world.now + MINUTE
    (standing,) = world.mine.standings("acme", NOON)
    assert (standing.held, standing.left) == (3 * CU, CU)
    world.now += 0.9 * MINUTE
    world.mine.renew()  # the new one, from now on
    world.now += 0.9 * MINUTE
    assert world.others.expire() == 0
    assert world.mine.recheck("acme") == []


def test_a_request_whose_money_was_given_away_is_ended(world: World) -> None:
    world.reserve("late", 3 * CU)
    world.now += MINUTE
    world.others.reserve(bound_of("quick", 2 * CU), BOOK, source="polar")
    world.mine.renew()
    error = world.lost.pop("late")
    assert isinstance(error, BudgetExceededError)
    assert (error.remaining, error.needed) == ("2", "3")
    assert world.held() == ["quick"]
    world.mine.renew()
    assert world.lost == {}  # told once


def test_a_hold_that_somebody_else_settled_is_not_made_again(world: World) -> None:
    world.reserve("a")
    use(world.ledger, "a", CU)
    world.now += MINUTE
    world.mine.renew()
    (standing,) = world.mine.standings("acme", NOON)
    assert (standing.spent, standing.held) == (CU, 0)
    assert world.lost == {}


def test_an_id_that_is_held_elsewhere_cannot_be_held_again(world: World) -> None:
    world.reserve("a")
    with pytest.raises(ConflictError, match="acme"):
        world.others.reserve(bound_of("a"), BOOK, source="polar")
    world.now += MINUTE  # its process is gone, as far as anybody knows
    assert world.others.reserve(bound_of("a"), BOOK, source="polar") == 0
    world.mine.renew()
    assert isinstance(world.lost["a"], ConflictError)


def test_a_lost_answer_is_asked_for_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    transaction = world.ledger.transaction

    @contextmanager
    def lost(**options: bool) -> Iterator[Connection]:
        with transaction(**options) as connection:
            yield connection
        raise StoreLockedError("the answer was lost.")

    with monkeypatch.context() as patched:
        patched.setattr(world.ledger, "transaction", lost)
        with pytest.raises(StoreLockedError):
            world.mine.reserve(bound_of("a"), BOOK, source="polar")
    with pytest.raises(ConflictError):
        world.others.reserve(bound_of("a"), BOOK, source="polar")
    world.reserve("a")
    (standing,) = world.mine.standings("acme", NOON)
    assert standing.held == CU
    with pytest.raises(ConflictError):
        world.reserve("a")  # that time it was answered


def test_a_renewal_that_fails_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.reserve("a")

    def locked(**_: bool) -> None:
        raise StoreLockedError("locked.")

    with monkeypatch.context() as patched:
        patched.setattr(world.ledger, "transaction", locked)
        with pytest.raises(StoreLockedError):
            world.mine.renew()
    world.now += 0.9 * MINUTE
    world.mine.renew()
    world.now += 0.9 * MINUTE
    assert world.others.expire() == 0


# --- Clocks. ---


@pytest.mark.parametrize("jump", [timedelta(minutes=16), timedelta(minutes=-16)])
def test_a_clock_that_jumps_changes_nothing(store: Ledger, jump: timedelta, jumping: type[JumpingClock]) -> None:
    """The time of day of this machine, before and after the hold is made; other processes read the same clock."""
    mine = Budgets(store)
    mine.set(Budget("acme", Decimal(1)))
    for n in range(2):
        mine.reserve(bound_of(f"r{n}"), BOOK, source="polar")
        jumping.by += jump
        with pytest.raises(BudgetExceededError):
            Budgets(store).reserve(bound_of("other"), BOOK, source="polar")
        assert Budgets(store).expire() == 0
        assert mine.release("acme", f"r{n}", source="polar")


def test_without_a_server_the_clock_of_the_machine_since_boot_decides(ledger: Ledger, machine: dict[str, Any]) -> None:
    budgets = Budgets(ledger)
    budgets.set(Budget("acme", Decimal(1)))
    budgets.reserve(bound_of("a"), BOOK, source="polar")
    machine["since"] += LIFETIME_US - 1
    assert Budgets(ledger).expire() == 0
    machine["since"] += 1
    assert Budgets(ledger).expire() == 1


def test_after_a_boot_no_process_is_left_that_holds_anything(ledger: Ledger, machine: dict[str, Any]) -> None:
    budgets = Budgets(ledger)
    budgets.set(Budget("acme", Decimal(1)))
    budgets.reserve(bound_of("a"), BOOK, source="polar")
    machine.update(boot="second", since=7)
    assert Budgets(ledger).reserve(bound_of("b"), BOOK, source="polar") == 0
    assert [hold.request_id for hold in budgets.holds("acme")] == ["b"]
    machine["since"] += LIFETIME_US - 1
    assert Budgets(ledger).expire() == 0
    assert verify_ledger(ledger).sound


def test_where_nobody_knows_the_boot_the_time_of_day_decides(ledger: Ledger, machine: dict[str, Any]) -> None:
    machine["boot"] = None
    budgets = Budgets(ledger, lifetime=timedelta(microseconds=1))
    budgets.set(Budget("acme", Decimal(1)))
    before = datetime.now(UTC)
    for name in ("a", "b"):
        budgets.reserve(bound_of(name), BOOK, source="polar")
    (hold,) = budgets.holds("acme")
    assert before <= hold.held_at <= datetime.now(UTC)


# --- Through the engine. ---


class Renewals:
    """Counts the renewals of a meter's holds, and waits for some."""

    def __init__(self, budgets: Budgets) -> None:
        self._turn, self._count, renew = threading.Condition(), 0, budgets._leases._renew

        def counting(leases: Any) -> None:
            renew(leases)
            with self._turn:
                self._count += 1
                self._turn.notify_all()

        budgets._leases._renew = counting

    def wait_for(self, more: int) -> None:
        with self._turn:
            goal = self._count + more
            assert self._turn.wait_for(lambda: self._count >= goal, timeout=60)


@pytest.fixture
def meter(ledger: Ledger) -> Iterator[Meter]:
    with Meter(ledger, durability="spool") as made:
        made._budgets = Budgets(ledger, lifetime=timedelta(seconds=0.2))
        yield made


def test_paused_streams_stay_within_the_limit(meter: Meter) -> None:
    """Four streams opened one lifetime apart and read at the end: only one fits."""
    model = tiny_model(sink=meter, tenant="acme")
    budgets, renewals = meter._budgets, Renewals(meter._budgets)
    most = Decimal(model.cost("0-5", prompt=model.count_tokens("hello"), output=24).total).scaleb(-12)
    budgets.set(Budget("acme", most))
    streams = []
    for _ in range(4):
        stream = model.stream("hello", compute="premium", max_tokens=24)
        try:
            next(stream)
        except BudgetExceededError:
            continue
        streams.append(stream)
        renewals.wait_for(12)  # each a tenth of a lifetime after the other
    assert len(streams) == 1
    for stream in streams:
        list(stream)
    (standing,) = budgets.standings("acme")
    assert (standing.held, standing.left >= 0) == (0, True)
    assert len(list(meter.ledger.read(Selection("acme")))) == 1


def test_a_stream_whose_money_was_given_away_is_ended_and_counted(meter: Meter) -> None:
    model = tiny_model(sink=meter, tenant="acme")
    budgets = meter._budgets = Budgets(meter.ledger)
    cost = model.cost("0-5", prompt=model.count_tokens("hello"), output=24).total
    budgets.set(Budget("acme", Decimal(cost).scaleb(-12)))
    stream = model.stream("hello", compute="premium", max_tokens=24)
    next(stream)
    with meter.ledger.transaction() as connection:  # as if the ledger had not answered this process for a minute
        connection.exec_driver_sql("UPDATE polar_hold SET state = 'expired', resolved_at = 0")
        connection.exec_driver_sql("UPDATE polar_budget_counter SET held = 0")
    quick = bound_of("quick", cost // 2).model_copy(update={"at": datetime.now(UTC)})
    Budgets(meter.ledger).reserve(quick, BOOK, source="polar")
    budgets.renew()
    with pytest.raises(BudgetExceededError):
        list(stream)
    (stored,) = meter.ledger.read(Selection("acme"))
    assert (stored.record.outcome, stored.record.error) == (Outcome.ERROR, "BudgetExceededError")
    assert 0 < stored.record.flops.total < cost
    (standing,) = budgets.standings("acme")
    assert standing.spent == stored.record.flops.total
    assert budgets.recheck("acme") == []
    assert verify_ledger(meter.ledger).sound


def test_the_record_of_an_ended_stream_does_not_wait_for_its_reader(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(sink=meter, tenant="acme")
    budgets = meter._budgets = Budgets(meter.ledger)
    budgets.set(Budget("acme", Decimal(1)))
    ends: list[Callable[[Exception], None]] = []
    recorded = threading.Event()
    emit = Meter.emit

    def noting(self: Meter, record: Any) -> Any:
        receipt = emit(self, record)
        recorded.set()
        return receipt

    monkeypatch.setattr(Meter, "emit", noting)
    monkeypatch.setattr(Meter, "watch", lambda _self, _tenant, _id, end: ends.append(end))
    stream = model.stream("hello", max_tokens=200)
    next(stream)  # and its reader goes away
    (end,) = ends
    end(BudgetExceededError("lost."))
    assert recorded.wait(timeout=60)
    (stored,) = meter.ledger.read(Selection("acme"))
    assert stored.record.error == "BudgetExceededError"
    assert budgets.holds("acme") == []
    with pytest.raises(BudgetExceededError):
        list(stream)
    assert len(list(meter.ledger.read(Selection("acme")))) == 1


def test_a_meter_that_closes_leaves_no_thread(meter: Meter) -> None:
    model = tiny_model(sink=meter, tenant="acme")
    meter._budgets.set(Budget("acme", Decimal(1), level=Level.TENANT))
    model.generate("hello", max_tokens=2)
    threads = [thread for thread in threading.enumerate() if thread.name == "polar-lease"]
    meter.close()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert [hold.state for hold in meter._budgets.holds("acme") if hold.state is HoldState.HELD] == []
