"""Budgets and holds as rows, and the hold of a request in every budget that covers it, for many requests at once.

Every function takes an open transaction. `hold` also needs the tenant's counts to be locked, and due holds to have
expired in the same transaction. Opens nothing and reads no clock.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, bindparam, func, insert, literal_column, select, update
from sqlalchemy.dialects.postgresql import ARRAY

from polar_billing.budgets import counters
from polar_billing.budgets.budget import Budget, Level, OverBudget
from polar_billing.budgets.counters import Scope
from polar_billing.budgets.offers import Refusal, choose, needed
from polar_billing.errors import BillingError, ConflictError, CurrencyMixError, StoreError, id_in_use
from polar_billing.ledger import chain
from polar_billing.ledger.connection import KeyedQuery
from polar_billing.ledger.schema import budget_table, hold_table
from polar_billing.values.canonical import canonical_json, canonical_text
from polar_billing.values.money import STORED_SCALE, from_scaled
from polar_billing.values.periods import Period, Window

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from datetime import timedelta
    from decimal import Decimal

    from sqlalchemy import ColumnElement, Connection, Row

    from polar_billing.budgets.offers import Cost
    from polar_billing.ledger.records import Identity
    from polar_sdk.usage import UsageBound

# Built once: building a statement costs more than running it.
_BUDGETS: Final = select(budget_table).order_by(budget_table.c.seq)
_BUDGETS_OF: Final = _BUDGETS.where(budget_table.c.tenant == bindparam("tenant"))
_BUDGETS_NAMED: Final = _BUDGETS_OF.where(
    budget_table.c.level.in_([*Level]), budget_table.c.name.in_(bindparam("names", expanding=True))
)
_HOLDS_OF: Final = KeyedQuery(
    select(hold_table)
    .where(hold_table.c.tenant == bindparam("of_tenant"), hold_table.c.source == bindparam("of_source"))
    .order_by(hold_table.c.attempt),
    hold_table.c.request_id,
)
_IS_HELD: Final = hold_table.c.state == literal_column("'held'")
"""No parameter, so that a prepared statement may use the index of those that are held."""
_OPEN: Final = (
    select(hold_table).where(_IS_HELD, hold_table.c.expires_at <= bindparam("due")).order_by(hold_table.c.seq)
)
_OPEN_OF: Final = _OPEN.where(hold_table.c.tenant == bindparam("tenant"))
_INSERT: Final = insert(hold_table).returning(hold_table.c.seq, sort_by_parameter_order=True)


_SAME: Final = (
    "seq", "source", "request_id", "attempt", "fingerprint", "offer", "cost_bound", "flops_bound", "held_at",
    "expires_at",
)  # fmt: skip
"""Columns that are fields of a `Hold`."""


class HoldState(StrEnum):
    """How a hold stands; it leaves `held` once, for one of the others."""

    HELD = "held"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Hold:
    """A hold for one request, open or resolved."""

    seq: int
    source: str
    request_id: str
    attempt: int
    """From 1; a request whose hold was released or expired may be tried again."""
    scope: Scope
    fingerprint: str
    """Fingerprint of the bound that it was made for."""
    offer: int
    """Index of the offer that it was made for."""
    cost_bound: Decimal
    """Unit: `scope.currency`."""
    flops_bound: int
    held_at: datetime
    expires_at: datetime
    state: HoldState

    @property
    def compute_units_bound(self) -> Decimal:
        """The maximum that the request may use, exactly. Unit: CU."""
        return from_scaled(self.flops_bound, STORED_SCALE)

    @property
    def identity(self) -> Identity:
        """Identifies the request."""
        return (self.scope.tenant, self.source, self.request_id)


def write_budget(connection: Connection, budget: Budget, *, closed: bool, now: datetime) -> None:
    """Put a budget in force, or close it, as a link of the tenant's chain."""
    tenant, level, name, unit, window = budget.key
    values: dict[str, Any] = {"tenant": tenant, "level": level, "name": name, "unit": unit, "time_window": window}
    values |= {"limit_count": budget.limit_count, "decimals": budget.decimals, "zone": budget.zone}
    values |= {"over_budget": str(budget.over_budget), "closed": int(closed), "set_at": now}
    seq = connection.execute(insert(budget_table).values(values).returning(budget_table.c.seq)).scalar_one()
    chain.link(connection, budget_table, seq)


def in_force(connection: Connection, tenant: str | None, names: Collection[str] | None = None) -> list[Budget]:
    """The budgets in force, of a tenant or of all, in the order in which they were first set.

    With `names` only those with such a name, on whatever level; the tenant's own is "".
    """
    values: dict[str, Any]
    query, values = (_BUDGETS, {}) if tenant is None else (_BUDGETS_OF, {"tenant": tenant})
    if names is not None and tenant is not None:
        query, values = _BUDGETS_NAMED, {"tenant": tenant, "names": sorted(names)}
    rows = connection.execute(query, values)
    latest = {(row.tenant, row.level, row.name, row.unit, row.time_window): row for row in rows}
    return [_budget(row) for row in latest.values() if not row.closed]


def _budget(row: Row[Any]) -> Budget:
    return Budget(
        tenant=row.tenant,
        limit=from_scaled(row.limit_count, row.decimals),
        unit=row.unit,
        level=Level(row.level),
        name=row.name or None,
        window=Window(row.time_window),
        zone=row.zone,
        over_budget=OverBudget(row.over_budget),
    )


def fingerprint(bound: UsageBound) -> str:
    """SHA-256 of what a request may use: equal for a repeated call, however much later."""
    facts = bound.model_dump(mode="json", exclude={"at", "tags", "id_is_new"})
    return hashlib.sha256(canonical_json([facts, sorted(bound.tags.items())])).hexdigest()


def latest_holds(connection: Connection, identities: Iterable[Identity]) -> dict[Identity, Hold]:
    """The latest hold of each request."""
    ids: dict[tuple[str, str], list[str]] = {}
    for tenant, source, request_id in sorted(set(identities)):
        ids.setdefault((tenant, source), []).append(request_id)
    holds: dict[Identity, Hold] = {}
    for (tenant, source), request_ids in ids.items():
        rows = _HOLDS_OF.run(connection, request_ids, of_tenant=tenant, of_source=source)
        holds |= {hold.identity: hold for hold in map(_hold, rows)}
    return holds


def open_holds(connection: Connection, tenant: str | None, *, due: datetime | None = None) -> list[Hold]:
    """The open holds, of a tenant or of all, the oldest first; with `due` only those that expire by then."""
    until = datetime.max.replace(tzinfo=UTC) if due is None else due
    query, whose = (_OPEN, {}) if tenant is None else (_OPEN_OF, {"tenant": tenant})
    return [_hold(row) for row in connection.execute(query, {"due": until, **whose})]


def _hold(row: Row[Any]) -> Hold:
    scope = Scope(row.tenant, row.project, row.user_name, row.key_name, row.at, row.currency)
    return Hold(scope=scope, state=HoldState(row.state), **{name: getattr(row, name) for name in _SAME})


def resolve(
    connection: Connection, seqs: Sequence[int], state: HoldState, now: datetime, *, due: datetime | None = None
) -> set[int]:
    """Resolve holds, and return those that were; a trigger refuses one that was resolved before.

    With `due` only those that expire by then: their process may have renewed them since they were read.
    """
    statement = update(hold_table).where(_among(connection, seqs)).values(state=str(state), resolved_at=now)
    if due is not None:
        statement = statement.where(hold_table.c.expires_at <= due)
    return set(connection.execute(statement.returning(hold_table.c.seq)).scalars()) if seqs else set()


def renew(connection: Connection, seqs: Sequence[int], until: datetime) -> set[int]:
    """Renew open holds, in one statement however many there are; nothing need be locked.

    Returns those that were renewed: not those that are resolved, nor those that another transaction is changing.
    """
    hold = hold_table.c
    free = select(hold.seq).where(_among(connection, seqs), hold.state == "held")
    # It waits for nobody, and so is in no deadlock with those who lock tenants first. SQLite has no such lock.
    free = free.with_for_update(skip_locked=True)
    renewed = update(hold_table).where(hold.seq.in_(free), hold.state == "held").values(expires_at=until)
    return set(connection.execute(renewed.returning(hold.seq)).scalars())


def states(connection: Connection, seqs: Sequence[int]) -> dict[int, HoldState]:
    """How holds stand."""
    rows = connection.execute(select(hold_table.c.seq, hold_table.c.state).where(_among(connection, seqs)))
    return {row.seq: HoldState(row.state) for row in rows}


def _among(connection: Connection, seqs: Sequence[int]) -> ColumnElement[bool]:
    """True of holds with these numbers, which travel as one parameter: SQLite limits how many there may be."""
    if connection.dialect.name == "postgresql":
        return hold_table.c.seq == func.any(bindparam("seqs", list(seqs), type_=ARRAY(BigInteger)))
    unpacked = func.json_each(canonical_text(list(seqs))).table_valued("value")
    return hold_table.c.seq.in_(select(unpacked.c.value))


@dataclass(frozen=True)
class Granted:
    """The offer that a request may be served with, and its hold."""

    offer: int
    seq: int | None
    """None if no budget covers the request."""


@dataclass(frozen=True)
class Ask:
    """A request for a hold."""

    bound: UsageBound
    offers: Mapping[int, Cost]
    """Index → maximum cost, in order of preference."""
    source: str
    """The meter."""

    @cached_property
    def identity(self) -> Identity:
        """Identifies the request."""
        return (self.bound.tenant, self.source, self.bound.request_id)

    @cached_property
    def scope(self) -> Scope:
        """Which counters it counts towards."""
        currency = next(iter(self.offers.values())).currency
        return Scope.of(self.bound.tenant, self.bound.tags, self.bound.at, currency)


Answer = Granted | Refusal | BillingError
"""The answer to an `Ask`; its error is that of this request alone."""
_Window = tuple[Budget, Period]


def hold(
    connection: Connection, asks: Sequence[Ask], *, now: datetime, lifetime: timedelta, again: Collection[Identity]
) -> list[Answer]:
    """Hold for requests of one tenant, one after another, what the first offer that fits every budget may use.

    Returns for each the offer and its hold, or why nothing is held for it: no offer fits, its id is in use or has been
    used (`ConflictError`), or a budget is in another currency than the price book (`CurrencyMixError`). Requests
    `again` are those that this process has asked for before, without knowing what came of it.
    """
    former = latest_holds(connection, [ask.identity for ask in asks])
    names = {name for ask in asks for name in ask.scope.names.values()}
    budgets = in_force(connection, asks[0].bound.tenant, names)
    answers: dict[int, Answer] = {}
    windows: dict[int, list[_Window]] = {}
    asked: set[Identity] = set()
    for place, ask in enumerate(asks):
        latest = former.get(ask.identity)
        try:
            if ask.identity in asked:
                raise id_in_use(ask.bound.tenant, ask.bound.request_id, "is being served")
            if latest is not None and latest.state in {HoldState.HELD, HoldState.SETTLED}:
                # The answer of the first call, if this is the same call again and nobody knows that answer.
                lost = latest.state is HoldState.HELD and ask.identity in again
                if not (lost and latest.fingerprint == fingerprint(ask.bound)):
                    how = "was served before" if latest.state is HoldState.SETTLED else "is being served"
                    raise id_in_use(ask.bound.tenant, ask.bound.request_id, how)
                answers[place] = Granted(latest.offer, latest.seq)
            else:
                windows[place] = _windows(budgets, ask)
        except (ConflictError, CurrencyMixError) as error:
            answers[place] = error
        asked.add(ask.identity)
    answers |= _hold_new(connection, {place: (asks[place], windows[place]) for place in windows}, former, now, lifetime)
    return [answers[place] for place in range(len(asks))]


def _windows(budgets: Sequence[Budget], ask: Ask) -> list[_Window]:
    """The budgets that cover a request, in their windows."""
    own = [budget for budget in budgets if budget.covers(ask.bound.tags)]
    for budget in own:
        needed(next(iter(ask.offers.values())), budget)  # refuses another currency before any counter is created
    return [(budget, Period.containing(ask.bound.at, budget.window, budget.zone)) for budget in own]


def _hold_new(
    connection: Connection,
    asks: Mapping[int, tuple[Ask, Sequence[_Window]]],
    former: Mapping[Identity, Hold],
    now: datetime,
    lifetime: timedelta,
) -> dict[int, Answer]:
    """Hold for requests that have no hold; what one of them takes, the next has no more."""
    every = dict.fromkeys(window for _, windows in asks.values() for window in windows)
    standings = counters.standings(connection, every, [ask.scope for ask, _ in asks.values()])
    answers: dict[int, Answer] = {}
    granted: dict[int, Granted] = {}
    raised: Counter[_Window] = Counter()
    rows: dict[int, dict[str, Any]] = {}
    for place, (ask, windows) in asks.items():
        chosen = choose([standings[window][1] for window in windows], list(ask.offers.values()))
        if isinstance(chosen, Refusal):
            answers[place] = chosen
            continue
        offer, cost = list(ask.offers.items())[chosen]
        granted[place] = Granted(offer, None)
        for window in windows:
            seq, standing = standings[window]
            amount = needed(cost, standing.budget) or 0
            standings[window] = seq, replace(standing, held=standing.held + amount)
            raised[window] += amount
        if windows:
            times = {"held_at": now, "expires_at": now + lifetime}
            rows[place] = _row(ask, offer, cost, former.get(ask.identity)) | times
    amounts = {standings[window][0]: (more, window[0].limit_count) for window, more in raised.items()}
    if not counters.raise_held(connection, amounts):
        # Never reached while every writer locks the tenant first; if one does not, nothing is held.
        tenant = next(iter(raised))[0].tenant
        raise StoreError(f"a budget of tenant {tenant!r} was changed by another writer.", hint="Try again.")
    seqs = connection.execute(_INSERT, list(rows.values())).scalars().all() if rows else []
    for place, seq in zip(rows, seqs, strict=True):
        granted[place] = replace(granted[place], seq=seq)
    return answers | granted


def _row(ask: Ask, offer: int, cost: Cost, former: Hold | None) -> dict[str, Any]:
    """A new hold, without its times."""
    scope = ask.scope
    return {
        "tenant": scope.tenant,
        "project": scope.project,
        "user_name": scope.user,
        "key_name": scope.key,
        "at": scope.at,
        "currency": scope.currency,
        "source": ask.source,
        "request_id": ask.bound.request_id,
        "attempt": 1 if former is None else former.attempt + 1,
        "fingerprint": fingerprint(ask.bound),
        "offer": offer,
        "cost_bound": from_scaled(cost.money or 0, STORED_SCALE),
        "flops_bound": cost.flops,
        "state": str(HoldState.HELD),
    }
