"""No tenant reads or charges another, through any public name of the package.

Every name of `polar_billing.__all__`, and every public method of its classes, must stand in one of the tables below: a
case that tries, or the reason why there is nothing to try. A new name without one fails `test_nothing_is_left_out`.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

import polar_billing
from polar_billing import (
    ALL_TENANTS,
    Account,
    Budget,
    BudgetError,
    Budgets,
    Ledger,
    Level,
    Line,
    Meter,
    Period,
    PriceBook,
    Selection,
    balances,
    build_report,
    credit_note,
    credit_notes,
    draft_statement,
    issue_statement,
    issued_statements,
    lines_of_usage,
    post,
    recheck,
    report_csv,
    report_html,
    reprice,
    usage_csv,
    usage_of_line,
    usage_rows,
    verify_ledger,
)
from polar_billing.errors import BillingError, ConflictError, QueryError
from polar_billing.ledger.records import INTERRUPTED_TAG
from polar_billing.statements.retention import prune
from polar_billing.testing import audit, usage_record
from polar_sdk.errors import BudgetExceededError
from polar_sdk.usage import Offer, UsageBound
from tests.billing.storing import store_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_billing import IssuedStatement

VICTIM, ATTACKER = "acme", "globex"
LOOKALIKES = ("ACME", "a%", "acm_", "%", "*", "' OR 1=1 --", "acme\u0301", "acme.", "")
"""Names that a careless comparison would take for the victim's, or for everybody's. No record can have one with blanks
around it or with invisible characters."""
SECRET = "secret-of-acme"
OLD = datetime(2026, 9, 15, 12, tzinfo=UTC)
AT = datetime(2026, 11, 15, 12, tzinfo=UTC)
NOVEMBER = Period.month("2026-11")
AFTER = datetime(2026, 12, 5, tzinfo=UTC)


@dataclass
class World:
    """A ledger in which the victim has usage, budgets and a hold, and the attacker has something of each."""

    ledger: Ledger
    budgets: Budgets = field(init=False)
    meter: Meter = field(init=False)
    issued: dict[str, IssuedStatement] = field(init=False)
    paid: dict[str, int] = field(init=False)
    book: PriceBook = field(default_factory=PriceBook.example)

    def __post_init__(self) -> None:
        self.budgets, self.meter = Budgets(self.ledger), Meter(self.ledger, prices=self.book)
        for tenant in (VICTIM, ATTACKER):
            tags = {"project": "p", "user": "ann", "key": "k", "note": SECRET if tenant == VICTIM else "own"}
            for number in range(3):
                self.meter.emit(usage_record(f"{tenant}-{number}", tenant=tenant, tags=tags, started_at=AT))
            self.meter.emit(usage_record(f"{tenant}-old", tenant=tenant, tags=tags, started_at=OLD))
            self.budgets.set(Budget(tenant, Decimal(1), "USD"))
            self.budgets.set(Budget(tenant, Decimal(1), "CU", Level.USER, "ann"))
            self.meter.reserve(self.bound(tenant, "running", tags=tags))
        self.meter.flush()
        self.issued = {one: issue_statement(self.ledger, one, NOVEMBER, now=AFTER) for one in (VICTIM, ATTACKER)}
        victims, least = self.issued[VICTIM].statement.id, Decimal("0.000001")
        credit_note(self.ledger, VICTIM, victims, least, reason=SECRET, reference="n1", now=AFTER)
        with self.ledger.transaction() as connection:
            assert prune(connection, VICTIM, OLD + timedelta(days=1)) == 1
            self.paid = {one: post(connection, one, "payment", "p1", payment(1), AFTER) for one in (VICTIM, ATTACKER)}

    def bound(self, tenant: str, request_id: str, flops: int = 10**10, **changes: Any) -> UsageBound:
        offer = Offer(tier="standard", program="0-5", flops_bound=flops)
        fields = {"tokens_input": 1, "tokens_output_max": 1, "offers": (offer,), "at": AT, **changes}
        return UsageBound(request_id=request_id, tenant=tenant, **fields)

    def state(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of the victim, of every table that has tenants."""
        found = {}
        with self.ledger.snapshot() as connection:
            for table in polar_tables():
                rows = connection.execute(text(f"SELECT * FROM {table} WHERE tenant = :tenant"), {"tenant": VICTIM})
                found[table] = [tuple(row) for row in rows]
        return found


def payment(amount: int) -> list[Line]:
    return [
        Line(Account.CASH, Decimal(amount), "USD"),
        Line(Account.RECEIVABLE, Decimal(-amount), "USD"),
    ]


def polar_tables() -> list[str]:
    from polar_billing.ledger.schema import metadata

    return sorted(str(table.name) for table in metadata.tables.values() if "tenant" in table.c)


Case = "Callable[[World], None]"
CASES: dict[str, Callable[[World], None]] = {}


def case(*names: str) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    """Say which public names a function tries."""

    def note(tried: Callable[[World], None]) -> Callable[[World], None]:
        CASES.update(dict.fromkeys(names, tried))
        return tried

    return note


REASONS = {
    "a value": """
        Account Budget CreditNote IssuedStatement Level Line OverBudget Period Quote Rating Report Repriced
        Selection Statement StatementLine StoredUsage UsageRow Verification Window ALL_TIME""",
    "the operator's view, which a caller must ask for by name": "ALL_TENANTS",
    "prices; no tenant's data": "PriceBook add_book Ledger.price_books Ledger.find_books Ledger.price_choices",
    "pure: what is handed in, and a book": "quote rate Meter.entry Meter.receipt",
    "takes and returns nothing": """
        Ledger.check Ledger.check_exists Ledger.close Budgets.renew Budgets.stop
        Meter.check Meter.close Meter.flush Meter.recover""",
    "a bare connection, for the operator's programs": "Ledger.as_stored Ledger.snapshot Ledger.transaction",
    "promises, which are made to no tenant alone": "Meter.standings",
}
NOTHING_TO_TRY = {name for names in REASONS.values() for name in names.split()}


def attempt(call: Callable[[], object]) -> object:
    """The answer of a call, or the error that it refuses with."""
    try:
        return call()
    except (BillingError, BudgetExceededError) as error:
        return str(error)


@case(
    "Ledger",
    "Ledger.read",
    "Ledger.count",
    "Ledger.count_pruned",
    "Ledger.usage_sums",
    "Ledger.raw_usage",
    "Ledger.tag_values",
)
def read(world: World) -> None:
    assert world.ledger.count_pruned(Selection(VICTIM)) == 1
    for tenant in (ATTACKER, *LOOKALIKES):
        for selection in (Selection(tenant), Selection(tenant, tags={"note": SECRET}), Selection(tenant, model="%")):
            for newest in (None, 100):
                found = list(world.ledger.read(selection, newest=newest))
                assert {one.record.tenant for one in found} <= {ATTACKER}
                assert SECRET not in repr(found)
        assert {one.tenant for one in world.ledger.raw_usage(Selection(tenant))} <= {ATTACKER}
        assert world.ledger.count_pruned(Selection(tenant)) == 0
        assert world.ledger.count(Selection(tenant)) == len(list(world.ledger.read(Selection(tenant))))
        assert SECRET not in world.ledger.tag_values(Selection(tenant), "note")
        for hourly in (True, False):
            sums = list(world.ledger.usage_sums(Selection(tenant), hourly=hourly))
            assert VICTIM not in repr(sums).replace(repr(tenant), "")


@case("Ledger.append_many", "Ledger.store", "Meter", "Meter.emit", "Meter.emit_many", "open_meter")
def store_under_the_victims_ids(world: World) -> None:
    for tenant in (ATTACKER, *filter(str.strip, LOOKALIKES)):
        for request_id in ("acme-0", "running"):
            record = usage_record(request_id, tenant=tenant, tags={"user": "ann"}, started_at=AT)
            stored = store_record(world.ledger, record, world.book)
            assert stored.record.tenant == record.tenant != VICTIM
            assert SECRET not in repr(world.meter.emit(record))
            assert SECRET not in repr(world.meter.emit_many([record]))
    assert SECRET not in str(attempt(lambda: world.meter.emit(usage_record("globex-0", tenant=ATTACKER))))


@case("usage_rows", "usage_csv")
def usage_queries(world: World) -> None:
    for tenant in (ATTACKER, *LOOKALIKES):
        rows = usage_rows(world.ledger, Selection(tenant), by=["tenant", "tag:note", "day"])
        assert {row.group["tenant"] for row in rows} <= {ATTACKER}
        assert SECRET not in usage_csv(rows)


@case("build_report", "report_csv", "report_html")
def reports(world: World) -> None:
    for tenant in (ATTACKER, *LOOKALIKES):
        made = build_report(world.ledger, Selection(tenant))
        assert {one.tenant for one in made.tenants} <= {ATTACKER}
        assert f"{VICTIM}," not in report_csv(made)
        if tenant == ATTACKER:
            assert VICTIM not in report_html(made)


@case(
    "Budgets",
    "Budgets.in_force",
    "Budgets.standings",
    "Budgets.standings_in",
    "Budgets.holds",
    "Budgets.recheck",
    "Budgets.recheck_holds",
)
def look_at_budgets(world: World) -> None:
    for tenant in (ATTACKER, *LOOKALIKES):
        assert {one.tenant for one in world.budgets.in_force(tenant)} <= {ATTACKER}
        assert {one.budget.tenant for one in world.budgets.standings(tenant, AT)} <= {ATTACKER}
        with world.ledger.snapshot() as connection:
            assert {one.budget.tenant for one in world.budgets.standings_in(connection, tenant, AT)} <= {ATTACKER}
        assert {one.scope.tenant for one in world.budgets.holds(tenant)} <= {ATTACKER}
        assert world.budgets.recheck(tenant, repair=True) == []
        assert world.budgets.recheck_holds(tenant) == []


@case("Budgets.set", "Budgets.close")
def change_budgets(world: World) -> None:
    for tenant in (ATTACKER, *filter(str.strip, LOOKALIKES)):
        with suppress(BudgetError):  # some of them are names that no request may have
            world.budgets.set(Budget(tenant, Decimal(0), "CU", Level.USER, "ann"))
            world.budgets.set(Budget(tenant, Decimal(0), "USD"))
            world.budgets.close(tenant, level="tenant", unit="USD", window="month")
    for tenant in LOOKALIKES:
        attempt(partial(world.budgets.close, tenant, level="user", unit="CU", window="month", name="ann"))


@case("Budgets.reserve", "Meter.reserve")
def reserve_against_the_victim(world: World) -> None:
    """Neither under the victim's request id, nor with the victim's tags, nor so much that all is used up."""
    for tenant in (ATTACKER, *filter(str.strip, LOOKALIKES)):
        for request_id in ("running", "new"):
            bound = world.bound(tenant, request_id, tags={"user": "ann", "note": "x"})
            answer = attempt(partial(world.meter.reserve, bound))
            assert VICTIM not in str(answer).replace(repr(tenant), "")
    huge = world.bound(ATTACKER, "huge", 10**15, tags={"user": "ann"})
    refused = str(attempt(lambda: world.meter.reserve(huge)))
    assert f"of tenant {ATTACKER!r}" in refused
    with pytest.raises(ConflictError, match=VICTIM):
        world.meter.reserve(world.bound(VICTIM, "running", tags=victim_tags()))  # still the victim's own


def victim_tags() -> dict[str, str]:
    return {"project": "p", "user": "ann", "key": "k", "note": SECRET}


@case("Budgets.watch", "Budgets.forget", "Meter.watch")
def meddle_with_the_victims_hold(world: World) -> None:
    for tenant in (ATTACKER, *LOOKALIKES):
        world.meter.watch(tenant, "running", fail)
        world.budgets.watch((tenant, "polar", "running"), fail)
        world.budgets.forget((tenant, "polar", "running"))
    world.budgets.renew()


def fail(error: Exception) -> None:
    raise error


@case("Ledger.is_stored")
def ask_for_the_victims_request(world: World) -> None:
    stored = next(iter(world.ledger.read(Selection(VICTIM)))).record.request_id
    assert world.ledger.is_stored((VICTIM, "polar", stored))
    for tenant in (ATTACKER, *LOOKALIKES):
        assert not world.ledger.is_stored((tenant, "polar", stored))


@case("Ledger.is_recorded", "Meter.mark")
def mark_the_victims_request(world: World) -> None:
    stored = next(iter(world.ledger.read(Selection(VICTIM)))).record
    assert world.ledger.is_recorded(world.meter.entry(stored))
    for tenant in (ATTACKER, *LOOKALIKES):
        mark = stored.model_copy(update={"tenant": tenant})
        assert not world.ledger.is_recorded(world.meter.entry(mark))
        world.meter.mark(mark)
    # What is stored of an interrupted request frees what was held for it, and for nobody else's of that name.
    world.meter.emit(usage_record("x", tenant=ATTACKER, tags={INTERRUPTED_TAG: "running"}, started_at=AT))
    assert world.budgets.holds(ATTACKER) == []


@case("Meter.audited")
def audit_the_victims_request(world: World) -> None:
    for tenant in (ATTACKER, *filter(str.strip, LOOKALIKES)):
        world.meter.audited(audit("acme-0", tenant=tenant, lost=True))


@case("Meter.quote")
def ask_for_a_price(world: World) -> None:
    for tenant in (ATTACKER, *filter(None, LOOKALIKES)):
        assert VICTIM not in repr(world.meter.quote(world.bound(tenant, "asked"))).replace(repr(tenant), "")


@case("Budgets.release", "Meter.release")
def release_the_victims_hold(world: World) -> None:
    for tenant in (ATTACKER, *LOOKALIKES):
        world.meter.release(tenant, "running")
        for source in ("polar", "other"):
            assert not world.budgets.release(tenant, "running", source=source)
    assert [hold.request_id for hold in world.budgets.holds(VICTIM)] == ["running"]


@case("Budgets.expire")
def expire_the_victims_hold(world: World) -> None:
    later = Budgets(world.ledger, clock=lambda: datetime.now(UTC) + timedelta(days=1))
    for tenant in (ATTACKER, *LOOKALIKES):
        later.expire(tenant)
    assert world.budgets.holds(ATTACKER) == []
    assert [hold.request_id for hold in world.budgets.holds(VICTIM)] == ["running"]


@case("post", "balances")
def books(world: World) -> None:
    with world.ledger.snapshot() as connection:
        for tenant in LOOKALIKES:
            assert balances(connection, tenant) == {}
        assert balances(connection, ATTACKER)[Account.CASH, "USD"] == 1
    for tenant in (ATTACKER, *filter(str.strip, LOOKALIKES)):
        with world.ledger.transaction() as connection:
            number = post(connection, tenant, "payment", "p1" if tenant != ATTACKER else "p2", payment(1_000), AFTER)
            assert number != world.paid[VICTIM]
        with pytest.raises(QueryError), world.ledger.transaction() as connection:
            post(connection, tenant, "payment", "back", payment(-1), AFTER, corrects=world.paid[VICTIM])


@case("draft_statement", "issue_statement", "issued_statements", "reprice", "recheck", "credit_notes", "usage_of_line")
def statements(world: World) -> None:
    own = world.issued[ATTACKER]
    assert own.statement.total == world.issued[VICTIM].statement.total  # three requests each, no more
    seqs = {one.seq for one in world.ledger.read(Selection(ATTACKER))}
    for line in own.statement.lines:
        assert set(usage_of_line(world.ledger, own, line)) <= seqs
    assert recheck(world.ledger, own) == []
    for tenant in (ATTACKER, *LOOKALIKES):
        made = [
            attempt(partial(draft_statement, world.ledger, tenant, NOVEMBER)),
            attempt(partial(issue_statement, world.ledger, tenant, NOVEMBER, now=AFTER)),
            attempt(partial(reprice, world.ledger, tenant, NOVEMBER, world.book)),
            issued_statements(world.ledger, tenant),
            credit_notes(world.ledger, tenant),
        ]
        told = repr(made).replace(repr(tenant), "")
        assert f"'{VICTIM}'" not in told
        assert SECRET not in told
        assert world.issued[VICTIM].statement.id not in told


@case("credit_note", "lines_of_usage")
def the_victims_statement(world: World) -> None:
    victim = world.issued[VICTIM].statement.id
    theirs = next(iter(world.ledger.read(Selection(VICTIM)))).seq
    for tenant in (ATTACKER, *LOOKALIKES):
        note = partial(credit_note, world.ledger, tenant, victim, Decimal("0.000001"), reason="x", reference="r")
        with pytest.raises(BillingError):
            note(now=AFTER)
        found = attempt(partial(lines_of_usage, world.ledger, tenant, theirs))
        assert isinstance(found, str) or found == []


@case("verify_ledger")
def verification(world: World) -> None:
    for tenant in (ATTACKER, *LOOKALIKES):
        made = verify_ledger(world.ledger, tenant)
        assert VICTIM not in repr(made).replace(repr(tenant), "")
        assert made.links == 0 or tenant == ATTACKER or tenant == ""


@pytest.fixture
def world(ledger_url: str) -> Iterator[World]:
    with Ledger(ledger_url) as ledger:
        made = World(ledger)
        yield made
        made.meter.close()


def public_names() -> list[str]:
    """Names of the package, and `Class.method` of each class that is no value and no error."""
    names = []
    for name in polar_billing.__all__:
        found = getattr(polar_billing, name)
        if isinstance(found, type) and issubclass(found, BaseException):
            continue
        names.append(name)
        if inspect.isclass(found) and name not in NOTHING_TO_TRY:
            methods = inspect.getmembers(found, inspect.isfunction)
            names += [f"{name}.{method}" for method, _ in methods if not method.startswith("_")]
    return names


def test_nothing_is_left_out() -> None:
    tried = {*CASES, *NOTHING_TO_TRY}
    assert not set(CASES) & set(NOTHING_TO_TRY)
    assert [name for name in public_names() if name not in tried] == []
    assert sorted(tried - set(public_names())) == []  # and nothing is listed that is gone


@pytest.mark.parametrize("tried", list(dict.fromkeys(CASES.values())), ids=lambda tried: str(tried.__name__))
def test_another_tenant_cannot_be_read_or_charged(world: World, tried: Callable[[World], None]) -> None:
    before = world.state()
    assert sum(map(len, before.values())) > 10
    tried(world)
    after = world.state()
    assert {table: after[table] for table in after if after[table] != before[table]} == {}


def test_the_operator_sees_both(world: World) -> None:
    everyone = {one.record.tenant for one in world.ledger.read(Selection(ALL_TENANTS))}
    assert everyone == {VICTIM, ATTACKER}
    assert len(world.budgets.holds(ALL_TENANTS)) == 2


def test_a_question_without_a_tenant_does_not_exist() -> None:
    for function in (Selection, Budgets.in_force, Budgets.standings, Budgets.holds, Budgets.release, Budgets.close):
        signature = inspect.signature(function)
        assert signature.parameters["tenant"].default is inspect.Parameter.empty
