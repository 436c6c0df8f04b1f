"""The counters: spent and held per budget and window, and how they are computed from the stored usage.

A counter is a projection: held is the sum of the open holds of its window, spent the sum of its usage, held for or not,
such as usage from before the tenant had a budget. Spent is summed from usage and receipts, which are in the hash chain;
a settled hold counts only if retention deleted the facts of its request. A counter is computed in the database when a
request first needs it, in two columns, neither of which can exceed 64 bits. From then on, every change of a hold
updates it in the same transaction. Every function here takes an open transaction; those that write need the tenant's
counts to be locked (`lock_counts`). Knows no clock and decides nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Text,
    and_,
    bindparam,
    case,
    cast,
    exists,
    func,
    literal,
    literal_column,
    select,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import JSON

from polar_billing.budgets.budget import COMPUTE_UNIT, Budget, Level
from polar_billing.budgets.offers import Standing
from polar_billing.ledger.books import read_books
from polar_billing.ledger.connection import KeyedQuery
from polar_billing.ledger.records import in_span
from polar_billing.ledger.rollups import joined_sum, split_sum
from polar_billing.ledger.schema import counter_table, hold_table, receipt_table, usage_table
from polar_billing.values.money import STORED_SCALE
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Row, Select

FULL: Final = 2**62
"""The maximum of a counter: far above any limit, and low enough that a sum never leaves the 64 bits of its column."""
_NAME_COLUMNS: Final = {
    Level.PROJECT: hold_table.c.project,
    Level.USER: hold_table.c.user_name,
    Level.KEY: hold_table.c.key_name,
}


@dataclass(frozen=True)
class _Group:
    """Budgets of one tenant that one query can compute: they differ in their names alone."""

    tenant: str
    level: Level
    unit: str
    decimals: int
    period: Period

    @classmethod
    def of(cls, budget: Budget, period: Period) -> _Group:
        return cls(budget.tenant, budget.level, budget.unit, budget.decimals, period)


def computed(connection: Connection, windows: Sequence[tuple[Budget, Period]]) -> list[Standing]:
    """Budgets in windows of theirs, computed from holds and usage: three queries for all that differ in name alone."""
    groups: defaultdict[_Group, set[str]] = defaultdict(set)
    for budget, period in windows:
        groups[_Group.of(budget, period)].add(budget.name or "")
    sums: dict[_Group, tuple[Counter[str], Counter[str]]] = {}
    for group, names in groups.items():
        only = names if len(names) <= _MAX_NAMES else None
        held = _totals(connection, _over_holds(group, only, "held"))
        pruned = _totals(
            connection, _over_holds(group, only, "settled").where(~exists().where(same_request(usage_table.c)))
        )
        sums[group] = pruned + _totals(connection, _over_usage(connection, group, only)), held
    standings = []
    for budget, period in windows:
        spent, in_hold = (by_name[budget.name or ""] for by_name in sums[_Group.of(budget, period)])
        standings.append(Standing(budget, period, min(spent, FULL), min(in_hold, FULL)))
    return standings


def _over_holds(group: _Group, names: set[str] | None, state: str) -> Select[Any]:
    hold = hold_table.c
    money, flops = (hold.cost_bound, hold.flops_bound) if state == "held" else (hold.cost, hold.flops)
    compute = group.unit == COMPUTE_UNIT
    name = _NAME_COLUMNS.get(group.level)
    query = _sums(type_coerce(flops if compute else money, BigInteger), group.decimals, name, names)
    query = query.where(hold.tenant == group.tenant, hold.state == state, *in_span(hold.at, *group.period.ends))
    return query if compute else query.where(hold.currency == group.unit)


def _over_usage(connection: Connection, group: _Group, names: set[str] | None) -> Select[Any]:
    usage, receipt = usage_table.c, receipt_table.c
    compute = group.unit == COMPUTE_UNIT
    # An unrated request counts what was held for it, if it was settled.
    settled = select(func.max(type_coerce(hold_table.c.cost, BigInteger)))
    settled = settled.where(same_request(usage_table.c), hold_table.c.state == "settled").correlate(usage_table)
    charged = func.coalesce(type_coerce(receipt.cost, BigInteger), settled.scalar_subquery())
    name = None if group.level is Level.TENANT else tag_of(connection, group.level)
    query = _sums(usage.flops_total if compute else charged, group.decimals, name, names)
    query = query.where(usage.tenant == group.tenant, *in_span(usage.started_at, *group.period.ends))
    if not compute:
        query = query.join_from(usage_table, receipt_table, receipt.usage_seq == usage.seq)
        books = [digest for digest, book in read_books(connection).items() if book.currency == group.unit]
        query = query.where(receipt.price_book_hash.in_(books))
    return query


def same_request(columns: Any) -> ColumnElement[bool]:
    """True of a hold and a row about its request, as usage is."""
    hold = hold_table.c
    return and_(columns.tenant == hold.tenant, columns.source == hold.source, columns.request_id == hold.request_id)


def _sums(
    counts: ColumnElement[Any], decimals: int, name: ColumnElement[Any] | None, names: set[str] | None
) -> Select[Any]:
    """Sum counts of 10^-12, each rounded up to 10^-decimals, as millions and rest.

    By name, those of `names` or all of them; without a column of names it is the tenant's own level.
    """
    step = 10 ** (STORED_SCALE - decimals)
    rounded = counts if step == 1 else counts // step + case((counts % step > 0, 1), else_=0)
    query: Select[Any] = select((literal("") if name is None else name).label("name"), *split_sum(rounded))
    if name is None:
        return query
    query = query.group_by(literal_column("name"))
    return query.where(name.is_not(None)) if names is None else query.where(name.in_(sorted(names)))


def _totals(connection: Connection, sums: Select[Any]) -> Counter[str]:
    return Counter({name: joined_sum(*parts) for name, *parts in connection.execute(sums)})


def tag_of(connection: Connection, name: str) -> ColumnElement[Any]:
    """The value of a tag of usage; null where there is none. Its name is one of ours."""
    tags = type_coerce(usage_table.c.tags, Text)
    if connection.dialect.name == "postgresql":
        text: ColumnElement[Any] = cast(tags, JSON)[name].astext
        return text
    return case((func.json_valid(tags), func.json_extract(tags, f'$."{name}"')))  # changed past this package


_FIRST: Final = datetime(1, 1, 1, tzinfo=UTC)
_LAST: Final = datetime.max.replace(tzinfo=UTC)
_MAX_NAMES: Final = 500
"""Names in one query; every SQLite takes 999 parameters or more."""

# Built once: building a statement costs more than running it.
_TOUCHED_ANY: Final = select(counter_table).where(
    counter_table.c.tenant.in_(bindparam("tenants", expanding=True)),
    counter_table.c.starts <= bindparam("last"),
    counter_table.c.ends > bindparam("first"),
)
_MORE: Final = bindparam("more", type_=BigInteger)
_LESS: Final = bindparam("less", type_=BigInteger)
_CHANGE: Final = (
    update(counter_table)
    .where(counter_table.c.seq == bindparam("of_seq"))
    .values(
        spent=case((counter_table.c.spent > FULL - _MORE, FULL), else_=counter_table.c.spent + _MORE),
        held=case((counter_table.c.held < _LESS, 0), else_=counter_table.c.held - _LESS),
    )
)
_RAISE: Final = (
    update(counter_table)
    .where(
        counter_table.c.seq == bindparam("of_seq"),
        counter_table.c.spent <= bindparam("room", type_=BigInteger) - counter_table.c.held,
    )
    .values(held=counter_table.c.held + _MORE)
)
_OF_TENANTS: Final = KeyedQuery(select(counter_table).order_by(counter_table.c.seq), counter_table.c.tenant)
_TOUCHED: Final = _TOUCHED_ANY.where(
    counter_table.c.level.in_([*Level]), counter_table.c.name.in_(bindparam("names", expanding=True))
)


@dataclass(frozen=True)
class Scope:
    """Which counters a request counts towards."""

    tenant: str
    project: str | None
    user: str | None
    key: str | None
    at: datetime
    currency: str

    @classmethod
    def of(cls, tenant: str, tags: Mapping[str, str], at: datetime, currency: str) -> Scope:
        """The scope of a request with these tags."""
        return cls(tenant, tags.get(Level.PROJECT), tags.get(Level.USER), tags.get(Level.KEY), at, currency)

    @property
    def names(self) -> dict[str, str]:
        """Level → name, for the levels that the request has."""
        named = {Level.PROJECT: self.project, Level.USER: self.user, Level.KEY: self.key}
        return {Level.TENANT: "", **{level: name for level, name in named.items() if name is not None}}

    def counts_in(self, counter: Row[Any]) -> bool:
        """True if the request counts towards this row of the counters."""
        return (
            counter.tenant == self.tenant
            and self.names.get(counter.level) == counter.name
            and counter.unit in {COMPUTE_UNIT, self.currency}
            and counter.starts <= self.at < counter.ends
        )


@dataclass
class Change:
    """Amounts to add to a counter's spent and to take from its held. Unit: 10^-decimals of its unit."""

    spent: int = 0
    freed: int = 0


def standings(
    connection: Connection, windows: Iterable[tuple[Budget, Period]], scopes: Sequence[Scope]
) -> dict[tuple[Budget, Period], tuple[int, Standing]]:
    """Budgets in windows of requests with these scopes, each with its counter's number, which is created if needed."""
    rows = {_key(row): row for row in touched(connection, scopes)}
    standings = {}
    for budget, period in windows:
        row = rows.get((*budget.key, period.since or _FIRST))
        if row is None:
            standings[budget, period] = _insert(connection, *computed(connection, [(budget, period)]))
        else:
            standings[budget, period] = row.seq, Standing(budget, period, row.spent, row.held)
    return standings


def _key(row: Row[Any]) -> tuple[object, ...]:
    return (row.tenant, row.level, row.name, row.unit, row.time_window, row.starts)


def _insert(connection: Connection, standing: Standing) -> tuple[int, Standing]:
    tenant, level, name, unit, window = standing.budget.key
    values: dict[str, Any] = {"tenant": tenant, "level": level, "name": name, "unit": unit, "time_window": window}
    values |= {"starts": standing.period.since or _FIRST, "ends": standing.period.until or _LAST}
    values |= {"decimals": standing.budget.decimals, "spent": standing.spent, "held": standing.held}
    seq: int = connection.execute(counter_table.insert().values(values).returning(counter_table.c.seq)).scalar_one()
    return seq, standing


def read_standings(connection: Connection, windows: Sequence[tuple[Budget, Period]]) -> list[Standing]:
    """Budgets in windows of theirs, from their counters where there are any; writes nothing."""
    rows = {_key(row): row for row in _counters_of(connection, {budget.tenant for budget, _ in windows})}
    found = {
        (budget, period): Standing(budget, period, row.spent, row.held)
        for budget, period in windows
        if (row := rows.get((*budget.key, period.since or _FIRST))) is not None
    }
    missing = [window for window in windows if window not in found]
    found |= zip(missing, computed(connection, missing), strict=True)
    return [found[window] for window in windows]


def read_counters(connection: Connection, budgets: Iterable[Budget]) -> Iterator[tuple[Standing, bool]]:
    """Every counter of these budgets, and whether it counts in a window of its budget and with its decimals."""
    by_key: dict[tuple[object, ...], Budget] = {budget.key: budget for budget in budgets}
    for row in _counters_of(connection, {budget.tenant for budget in by_key.values()}):
        *key, _ = _key(row)
        if (budget := by_key.get(tuple(key))) is not None:
            period = Period.containing(row.starts, budget.window, budget.zone)
            filed = (period.since or _FIRST, period.until or _LAST, budget.decimals)
            yield Standing(budget, period, row.spent, row.held), filed == (row.starts, row.ends, row.decimals)


def _counters_of(connection: Connection, tenants: Collection[str]) -> Sequence[Row[Any]]:
    return _OF_TENANTS.run(connection, tenants).all()


def raise_held(connection: Connection, amounts: Mapping[int, tuple[int, int]]) -> bool:
    """Hold amounts if all of them still fit; False if one does not, and then the caller rolls back.

    `amounts`: number of the counter → amount and limit. Unit: 10^-decimals of the counter.
    """
    if not amounts or any(amount > limit for amount, limit in amounts.values()):
        return not amounts
    rows = [{"of_seq": seq, "more": more, "room": limit - more} for seq, (more, limit) in sorted(amounts.items())]
    return connection.execute(_RAISE, rows).rowcount == len(rows)


def touched(connection: Connection, scopes: Sequence[Scope]) -> list[Row[Any]]:
    """The counters that exist and that any of the requests counts towards."""
    if not scopes:
        return []
    values: dict[str, Any] = {
        "tenants": sorted({scope.tenant for scope in scopes}),
        "first": min(scope.at for scope in scopes),
        "last": max(scope.at for scope in scopes),
    }
    names = {name for scope in scopes for name in scope.names.values()}
    # With too many names for one query, read all counters of the tenants.
    query, named = (_TOUCHED, {"names": sorted(names)}) if len(names) <= _MAX_NAMES else (_TOUCHED_ANY, {})
    rows = connection.execute(query, {**values, **named})
    return [row for row in rows if any(scope.counts_in(row) for scope in scopes)]


def change(connection: Connection, changes: Iterable[tuple[int, Change]]) -> None:
    """Change counters, given by number; a full one stays full, and none falls below zero."""
    rows = [
        {"of_seq": seq, "more": min(difference.spent, FULL), "less": min(difference.freed, FULL)}
        for seq, difference in sorted(changes, key=lambda pair: pair[0])
    ]
    if rows:
        connection.execute(_CHANGE, rows)


def drop(connection: Connection, budget: Budget) -> None:
    """Delete the counters of a budget whose limit or zone changes; they are computed again when needed."""
    connection.execute(counter_table.delete().where(_of(budget)))


def _of(budget: Budget) -> ColumnElement[bool]:
    counter = counter_table.c
    tenant, level, name, unit, window = budget.key
    return and_(
        counter.tenant == tenant,
        counter.level == level,
        counter.name == name,
        counter.unit == unit,
        counter.time_window == window,
    )
