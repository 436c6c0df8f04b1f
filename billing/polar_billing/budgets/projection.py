"""What is spent and held in a window, computed from the holds and from usage that was stored without one.

Everything is summed in the database, in two columns of which neither can leave 64 bits. Takes an open transaction;
knows no counters.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, Text, case, cast, exists, func, select, type_coerce
from sqlalchemy.dialects.postgresql import JSON

from polar_billing.budgets.budget import COMPUTE_UNIT, Level
from polar_billing.budgets.choose import Standing
from polar_billing.money import STORED_SCALE
from polar_billing.schema import hold_table, price_book_table, receipt_table, usage_table

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement, Connection, Row, Select

    from polar_billing.budgets.budget import Budget
    from polar_billing.periods import Period

__all__ = ["FULL", "computed"]

FULL: Final = 2**62
"""Where a counter stops: far beyond any limit, and so that adding to it never leaves the 64 bits of its column."""
_MILLION: Final = 10**6
_NAME_COLUMNS: Final = {
    Level.PROJECT: hold_table.c.project,
    Level.USER: hold_table.c.user_name,
    Level.KEY: hold_table.c.key_name,
}


def computed(connection: Connection, budget: Budget, period: Period) -> Standing:
    """A budget in one of its windows, from what is stored."""
    held = _total(connection, _over_holds(budget, period, "held"))
    spent = _total(connection, _over_holds(budget, period, "settled"))
    spent += _total(connection, _over_usage(connection, budget, period))
    return Standing(budget, period, min(spent, FULL), min(held, FULL))


def _over_holds(budget: Budget, period: Period, state: str) -> Select[Any]:
    hold = hold_table.c
    money, flops = (hold.cost_bound, hold.flops_bound) if state == "held" else (hold.cost, hold.flops)
    compute = budget.unit == COMPUTE_UNIT
    query = _sums(type_coerce(flops if compute else money, BigInteger), budget.decimals)
    query = query.where(hold.tenant == budget.tenant, hold.state == state, *_within(hold.at, period))
    if budget.level in _NAME_COLUMNS:
        query = query.where(_NAME_COLUMNS[budget.level] == budget.name)
    return query if compute else query.where(hold.currency == budget.unit)


def _over_usage(connection: Connection, budget: Budget, period: Period) -> Select[Any]:
    """Usage that no hold was settled for."""
    usage, hold = usage_table.c, hold_table.c
    settled = exists().where(
        hold.tenant == usage.tenant,
        hold.source == usage.source,
        hold.request_id == usage.request_id,
        hold.state == "settled",
    )
    compute = budget.unit == COMPUTE_UNIT
    query = _sums(usage.flops_total if compute else type_coerce(receipt_table.c.cost, BigInteger), budget.decimals)
    query = query.where(usage.tenant == budget.tenant, ~settled, *_within(usage.started_at, period))
    if not compute:
        query = query.join_from(usage_table, receipt_table, receipt_table.c.usage_seq == usage.seq)
        query = query.where(receipt_table.c.price_book_hash.in_(_books(connection, budget.unit)))
    return query if budget.level is Level.TENANT else query.where(_tag(connection, budget.level) == budget.name)


def _sums(counts: ColumnElement[Any], decimals: int) -> Select[Any]:
    """Sum counts of 10^-12, each rounded up to 10^-decimals, in two columns."""
    step = 10 ** (STORED_SCALE - decimals)
    rounded = counts if step == 1 else counts // step + case((counts % step > 0, 1), else_=0)
    return select(func.sum(rounded // _MILLION).label("millions"), func.sum(rounded % _MILLION).label("rest"))


def _total(connection: Connection, sums: Select[Any]) -> int:
    row: Row[Any] = connection.execute(sums).one()
    return int(row.millions or 0) * _MILLION + int(row.rest or 0)


def _within(column: ColumnElement[datetime], period: Period) -> list[ColumnElement[bool]]:
    since = [] if period.since is None else [column >= period.since]
    return since if period.until is None else [*since, column < period.until]


def _books(connection: Connection, currency: str) -> list[str]:
    rows = connection.execute(select(price_book_table.c.hash, price_book_table.c.document))
    return [row.hash for row in rows if json.loads(row.document)["currency"] == currency]


def _tag(connection: Connection, level: Level) -> ColumnElement[Any]:
    tags = type_coerce(usage_table.c.tags, Text)
    if connection.dialect.name == "postgresql":
        text: ColumnElement[Any] = cast(tags, JSON)[str(level)].astext
        return text
    return func.json_extract(tags, f'$."{level}"')
