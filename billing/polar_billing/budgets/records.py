"""Budgets and holds as rows, and back. Takes an open transaction; knows no clock and decides nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, insert, select, update

from polar_billing import chain
from polar_billing.budgets.budget import Budget, Level, OverBudget
from polar_billing.budgets.counters import Scope
from polar_billing.canonical import canonical_json
from polar_billing.money import STORED_SCALE, from_scaled
from polar_billing.periods import Window
from polar_billing.schema import budget_table, hold_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from decimal import Decimal

    from sqlalchemy import Connection, Row

    from polar_sdk.usage import UsageBound

__all__ = [
    "Hold",
    "HoldState",
    "fingerprint",
    "in_force",
    "insert_hold",
    "latest_holds",
    "open_holds",
    "resolve",
    "write_budget",
]

Identity = tuple[str, str, str]
"""Tenant, source and request id."""
_IDS_AT_ONCE: Final = 500

chain.register_chained(budget_table)

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
_OPEN_OF: Final = _OPEN.where(hold_table.c.tenant == bindparam("tenant"))


class HoldState(StrEnum):
    """How a hold stands; it leaves `held` once, for one of the others."""

    HELD = "held"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Hold:
    """What is reserved for one request, or how that ended."""

    seq: int
    source: str
    request_id: str
    attempt: int
    """1 for the first; a request that was released or expired may be tried again."""
    scope: Scope
    fingerprint: str
    """Of the bound it was made for."""
    offer: int
    """Index of the offer it was made for."""
    cost_bound: Decimal
    """Unit: `scope.currency`."""
    flops_bound: int
    held_at: datetime
    expires_at: datetime
    state: HoldState

    @property
    def compute_units_bound(self) -> Decimal:
        """Most compute the request may use, exactly. Unit: CU."""
        return from_scaled(self.flops_bound, STORED_SCALE)

    @property
    def identity(self) -> Identity:
        """Whose request it is for."""
        return (self.scope.tenant, self.source, self.request_id)


def write_budget(connection: Connection, budget: Budget, *, closed: bool, now: datetime) -> None:
    """Put a budget in force, or out of it, and link that into the tenant's chain."""
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
        names: Level → name, to have those alone; None for all of them.
    """
    values: dict[str, Any]
    query, values = (_BUDGETS, {}) if tenant is None else (_BUDGETS_OF, {"tenant": tenant})
    if names is not None and tenant is not None:
        query, values = _BUDGETS_NAMED, {"tenant": tenant, "names": sorted(set(names.values()))}
    last = {
        (one.tenant, one.level, one.name, one.unit, one.time_window): one for one in connection.execute(query, values)
    }
    found = [_budget(one) for one in last.values() if not one.closed]
    return found if names is None else [one for one in found if names.get(one.level) == (one.name or "")]


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
    """SHA-256 over what a request may use: equal for a repeated call, however much later."""
    facts = bound.model_dump(mode="json", exclude={"at", "tags"})
    return hashlib.sha256(canonical_json([facts, sorted(bound.tags.items())])).hexdigest()


def insert_hold(connection: Connection, scope: Scope, values: Mapping[str, Any]) -> None:
    """Write a hold; `values` are the columns beside those of its scope."""
    names = {"project": scope.project, "user_name": scope.user, "key_name": scope.key}
    own = {"tenant": scope.tenant, **names, "at": scope.at, "currency": scope.currency}
    connection.execute(insert(hold_table).values({**own, **values}))


def latest_holds(connection: Connection, identities: Iterable[Identity]) -> dict[Identity, Hold]:
    """The last hold of each request."""
    ids: dict[tuple[str, str], list[str]] = {}
    for tenant, source, request_id in sorted(set(identities)):
        ids.setdefault((tenant, source), []).append(request_id)
    found: dict[Identity, Hold] = {}
    for (tenant, source), wanted in ids.items():
        for start in range(0, len(wanted), _IDS_AT_ONCE):
            values = {"tenant": tenant, "source": source, "ids": wanted[start : start + _IDS_AT_ONCE]}
            found |= {hold.identity: hold for hold in map(_hold, connection.execute(_HOLDS_OF, values))}
    return found


def open_holds(connection: Connection, tenant: str | None, *, due: datetime | None = None) -> list[Hold]:
    """What is held, the oldest first.

    Args:
        connection: Any transaction.
        tenant: Whose; None for every tenant.
        due: Only what expires until then.
    """
    until = datetime.max.replace(tzinfo=UTC) if due is None else due
    query, whose = (_OPEN, {}) if tenant is None else (_OPEN_OF, {"tenant": tenant})
    return [_hold(one) for one in connection.execute(query, {"due": until, **whose})]


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


def resolve(connection: Connection, seqs: Sequence[int], state: HoldState, now: datetime, **values: Any) -> None:
    """Resolve holds; a trigger refuses one that was resolved before."""
    changes = {"state": str(state), "resolved_at": now, **values}
    for start in range(0, len(seqs), _IDS_AT_ONCE):
        some = hold_table.c.seq.in_(seqs[start : start + _IDS_AT_ONCE])
        connection.execute(update(hold_table).where(some).values(changes))
