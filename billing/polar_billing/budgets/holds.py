"""Budgets and holds as rows, and the hold of a request in every budget that covers it.

Every function takes an open transaction. `hold` also needs the head of the tenant's chain to be locked, and due holds
to have expired in the same transaction. Opens nothing and reads no clock.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, bindparam, func, insert, select, update
from sqlalchemy.dialects.postgresql import ARRAY

from polar_billing.budgets import counters
from polar_billing.budgets.budget import Budget, Level, OverBudget
from polar_billing.budgets.counters import Scope
from polar_billing.budgets.offers import Cost, Refusal, Standing, choose, needed
from polar_billing.errors import StoreError, id_in_use
from polar_billing.ledger import chain
from polar_billing.ledger.schema import budget_table, hold_table
from polar_billing.prices.quote import charged_bound, quote
from polar_billing.values.canonical import canonical_json, canonical_text
from polar_billing.values.money import STORED_SCALE, from_scaled, to_scaled
from polar_billing.values.periods import Period, Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import timedelta
    from decimal import Decimal

    from sqlalchemy import Connection, Row

    from polar_billing.ledger.records import Identity
    from polar_billing.prices.book import PriceBook
    from polar_sdk.usage import Offer, UsageBound

_ID_BATCH: Final = 500

# Built once: building a statement costs more than running it.
_BUDGETS: Final = select(budget_table).order_by(budget_table.c.seq)
_BUDGETS_OF: Final = _BUDGETS.where(budget_table.c.tenant == bindparam("tenant"))
_BUDGETS_NAMED: Final = _BUDGETS_OF.where(
    budget_table.c.level.in_([*Level]), budget_table.c.name.in_(bindparam("names", expanding=True))
)
_HOLDS_OF: Final = (
    select(hold_table)
    .where(
        hold_table.c.tenant == bindparam("tenant"),
        hold_table.c.source == bindparam("source"),
        hold_table.c.request_id.in_(bindparam("ids", expanding=True)),
    )
    .order_by(hold_table.c.attempt)
)
_OPEN: Final = (
    select(hold_table)
    .where(hold_table.c.state == "held", hold_table.c.expires_at <= bindparam("due"))
    .order_by(hold_table.c.seq)
)
_STATES: Final = select(hold_table.c.seq, hold_table.c.state).where(
    hold_table.c.seq.in_(bindparam("seqs", expanding=True))
)
_OPEN_OF: Final = _OPEN.where(hold_table.c.tenant == bindparam("tenant"))


class HoldState(StrEnum):
    """How a hold stands; it leaves `held` once, for one of the others."""

    HELD = "held"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Hold:
    """What is held for one request, or was."""

    seq: int
    source: str
    request_id: str
    attempt: int
    """From 1; a request whose hold was released or expired may be tried again."""
    scope: Scope
    fingerprint: str
    """Of the bound that it was made for."""
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


def in_force(connection: Connection, tenant: str | None, names: Mapping[str, str] | None = None) -> list[Budget]:
    """The budgets in force, in the order in which they were first set.

    Args:
        connection: Any transaction.
        tenant: Whose; None for every tenant.
        names: Level → name, for only those; None for all of them.
    """
    values: dict[str, Any]
    query, values = (_BUDGETS, {}) if tenant is None else (_BUDGETS_OF, {"tenant": tenant})
    if names is not None and tenant is not None:
        query, values = _BUDGETS_NAMED, {"tenant": tenant, "names": sorted(set(names.values()))}
    rows = connection.execute(query, values)
    latest = {(row.tenant, row.level, row.name, row.unit, row.time_window): row for row in rows}
    budgets = [_budget(row) for row in latest.values() if not row.closed]
    return (
        budgets if names is None else [budget for budget in budgets if names.get(budget.level) == (budget.name or "")]
    )


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


def insert_hold(connection: Connection, scope: Scope, values: Mapping[str, Any]) -> int:
    """Write a hold and return its number; `values` are the columns other than those of its scope."""
    names = {"project": scope.project, "user_name": scope.user, "key_name": scope.key}
    columns = {"tenant": scope.tenant, **names, "at": scope.at, "currency": scope.currency, **values}
    seq: int = connection.execute(insert(hold_table).values(columns).returning(hold_table.c.seq)).scalar_one()
    return seq


def latest_holds(connection: Connection, identities: Iterable[Identity]) -> dict[Identity, Hold]:
    """The latest hold of each request."""
    ids: dict[tuple[str, str], list[str]] = {}
    for tenant, source, request_id in sorted(set(identities)):
        ids.setdefault((tenant, source), []).append(request_id)
    holds: dict[Identity, Hold] = {}
    for (tenant, source), request_ids in ids.items():
        for batch in _batches(request_ids):
            values = {"tenant": tenant, "source": source, "ids": batch}
            holds |= {hold.identity: hold for hold in map(_hold, connection.execute(_HOLDS_OF, values))}
    return holds


def open_holds(connection: Connection, tenant: str | None, *, due: datetime | None = None) -> list[Hold]:
    """The open holds, the oldest first.

    Args:
        connection: Any transaction.
        tenant: Whose; None for every tenant.
        due: Only those that expire by then.
    """
    until = datetime.max.replace(tzinfo=UTC) if due is None else due
    query, whose = (_OPEN, {}) if tenant is None else (_OPEN_OF, {"tenant": tenant})
    return [_hold(row) for row in connection.execute(query, {"due": until, **whose})]


def _hold(row: Row[Any]) -> Hold:
    return Hold(
        seq=row.seq,
        source=row.source,
        request_id=row.request_id,
        attempt=row.attempt,
        scope=Scope(row.tenant, row.project, row.user_name, row.key_name, row.at, row.currency),
        fingerprint=row.fingerprint,
        offer=row.offer,
        cost_bound=row.cost_bound,
        flops_bound=row.flops_bound,
        held_at=row.held_at,
        expires_at=row.expires_at,
        state=HoldState(row.state),
    )


def resolve(
    connection: Connection, seqs: Sequence[int], state: HoldState, now: datetime, *, due: datetime | None = None
) -> set[int]:
    """Resolve holds; a trigger refuses one that was resolved before.

    Args:
        connection: A transaction.
        seqs: Which.
        state: How.
        now: When.
        due: Only those that expire by then: their process may have renewed them since they were read.

    Returns:
        Those that were resolved.
    """
    statement = update(hold_table).values(state=str(state), resolved_at=now).returning(hold_table.c.seq)
    if due is not None:
        statement = statement.where(hold_table.c.expires_at <= due)
    resolved: set[int] = set()
    for batch in _batches(seqs):
        resolved |= set(connection.execute(statement.where(hold_table.c.seq.in_(batch))).scalars())
    return resolved


def renew(connection: Connection, seqs: Sequence[int], until: datetime) -> set[int]:
    """Renew open holds, in one statement however many there are; the head of no chain need be locked.

    Returns:
        Those that were renewed; not those that are resolved, nor those that another transaction is changing.
    """
    hold = hold_table.c
    if connection.dialect.name == "postgresql":
        among = hold.seq == func.any(bindparam("seqs", list(seqs), type_=ARRAY(BigInteger)))
        # It waits for nobody, and so is in no deadlock with those who lock tenants first.
        free = select(hold.seq).where(among, hold.state == "held").with_for_update(skip_locked=True)
    else:
        unpacked = func.json_each(canonical_text(list(seqs))).table_valued("value")
        free = select(unpacked.c.value)
    renewed = update(hold_table).where(hold.seq.in_(free), hold.state == "held").values(expires_at=until)
    return set(connection.execute(renewed.returning(hold.seq)).scalars())


def states(connection: Connection, seqs: Sequence[int]) -> dict[int, HoldState]:
    """How holds stand."""
    rows = [row for batch in _batches(seqs) for row in connection.execute(_STATES, {"seqs": batch})]
    return {row.seq: HoldState(row.state) for row in rows}


def _batches(ids: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (ids[start : start + _ID_BATCH] for start in range(0, len(ids), _ID_BATCH))


def costs(bound: UsageBound, book: PriceBook) -> list[Cost]:
    """The maximum that each offer of a request can cost under a price book."""
    return [_cost(bound, offer, book) for offer in bound.offers]


def _cost(bound: UsageBound, offer: Offer, book: PriceBook) -> Cost:
    flops = charged_bound(offer, book)
    quoted = quote(book, bound.tenant, offer.tier, flops, bound.tokens_input, bound.tokens_output_max, bound.at)
    money = None if quoted.amount is None else to_scaled(quoted.amount, STORED_SCALE)
    return Cost(quoted.currency, money, offer.flops_bound, quoted.unrated)


@dataclass(frozen=True)
class Granted:
    """The offer that a request may be served with, and its hold."""

    offer: int
    seq: int | None
    """None where no budget covers the request."""


def hold(
    connection: Connection,
    bound: UsageBound,
    offers: Mapping[int, Cost],
    *,
    source: str,
    now: datetime,
    lifetime: timedelta,
    again: bool = False,
) -> Granted | Refusal:
    """Hold what the first offer that fits every budget may use.

    Args:
        connection: See the top of this module.
        bound: The request.
        offers: Index → maximum cost, in order of preference.
        source: The meter.
        now: The time.
        lifetime: How long the hold lives unless it is renewed.
        again: Whether this process has tried before and does not know what came of it.

    Returns:
        That offer and its hold, or why there is none; then nothing is held.

    Raises:
        ConflictError: The request id is in use, or has been used.
        CurrencyMixError: A budget is in another currency than the price book.
    """
    identity = (bound.tenant, source, bound.request_id)
    former = latest_holds(connection, [identity]).get(identity)
    if former is not None and former.state in {HoldState.HELD, HoldState.SETTLED}:
        return _repeated(former, bound, again=again)
    indices, candidates = list(offers), list(offers.values())
    scope = Scope.of(bound.tenant, bound.tags, bound.at, candidates[0].currency)
    standings = _standings(connection, scope, candidates[0])
    chosen = choose([standing for _, standing in standings], candidates)
    if isinstance(chosen, Refusal):
        return chosen
    if not standings:
        return Granted(indices[chosen], None)
    cost = candidates[chosen]
    _raise_held(connection, standings, cost)
    values: dict[str, Any] = {"source": source, "request_id": bound.request_id, "fingerprint": fingerprint(bound)}
    values |= {"attempt": 1 if former is None else former.attempt + 1, "offer": indices[chosen]}
    values |= {"cost_bound": from_scaled(cost.money or 0, STORED_SCALE), "flops_bound": cost.flops}
    values |= {"state": str(HoldState.HELD), "held_at": now, "expires_at": now + lifetime}
    return Granted(indices[chosen], insert_hold(connection, scope, values))


def _standings(connection: Connection, scope: Scope, first: Cost) -> list[tuple[int, Standing]]:
    budgets = in_force(connection, scope.tenant, scope.names)
    for budget in budgets:
        needed(first, budget)  # refuses another currency before any counter is created
    windows = [(budget, Period.containing(scope.at, budget.window, budget.zone)) for budget in budgets]
    return counters.standings(connection, windows, scope)


def _repeated(former: Hold, bound: UsageBound, *, again: bool) -> Granted:
    """The answer of the first call, if this is the same call again and nobody knows that answer."""
    if again and former.state is HoldState.HELD and former.fingerprint == fingerprint(bound):
        return Granted(former.offer, former.seq)
    how = "was served before" if former.state is HoldState.SETTLED else "is being served"
    raise id_in_use(bound.tenant, bound.request_id, how)


def _raise_held(connection: Connection, standings: list[tuple[int, Standing]], cost: Cost) -> None:
    budgets = {seq: standing.budget for seq, standing in standings}
    amounts = {seq: (needed(cost, budget) or 0, budget.limit_count) for seq, budget in budgets.items()}
    if not counters.raise_held(connection, amounts):
        # Never reached while every writer locks the tenant first; if one does not, nothing is held.
        tenant = standings[0][1].budget.tenant
        raise StoreError(f"a budget of tenant {tenant!r} was changed by another writer.", hint="Try again.")
