"""Usage added up for the usage query: from the sums by hour where they serve, from usage itself where they do not.

The two agree, because both are integers of the same facts; `verify` holds them to it. Hours that a period cuts, and
hours in which the day changes in the asked time zone, are always added up from usage. Knows no prices.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, func, literal, select, type_coerce

from polar_billing.columns import to_microseconds
from polar_billing.money import to_units
from polar_billing.rollups import quantities_of, raw_usage
from polar_billing.schema import rollup_table, usage_table
from polar_billing.schema.rollups import ROLLUP_KEYS, ROLLUP_QUANTITIES
from polar_billing.storage import AllTenants

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import ColumnElement, Connection

    from polar_billing.periods import Period
    from polar_billing.storage import Selection, StoredUsage

__all__ = ["SUM_DIMENSIONS", "Sum", "read_sums", "sum_of"]

SUM_DIMENSIONS: Final = frozenset({"tenant", "tier", "model", "source", "outcome", "day", "month"})
"""What sums by hour can be grouped by."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_HOUR: Final = 3_600_000_000
"""Microseconds."""
_KEYS_WITHOUT_HOUR: Final = tuple(name for name in ROLLUP_KEYS if name != "hour")


@dataclass(frozen=True)
class Sum:
    """Requests that have everything in common that a query may ask for, and what they used."""

    tenant: str
    tier: str | None
    model: str
    source: str
    outcome: str
    price_book_hash: str
    unrated: str | None
    at: int
    """A moment of service that stands for all of them, where the query asks for it. Unit: microseconds since 1970."""
    quantities: list[int]
    """Requests, then `ROLLUP_QUANTITIES`."""


def sum_of(stored: StoredUsage) -> Sum:
    """One stored request as a sum of one."""
    record = stored.record
    tokens, flops = record.tokens, (record.visits.total, record.flops.total, record.identity_flops)
    cost = 0 if stored.cost is None else to_units(stored.cost)
    return Sum(
        tenant=record.tenant,
        tier=record.tier,
        model=record.model,
        source=stored.source,
        outcome=record.outcome.value,
        price_book_hash=stored.price_book_hash,
        unrated=stored.unrated,
        at=to_microseconds(record.started_at),
        quantities=[1, tokens.input, tokens.cached, tokens.output, *flops, cost],
    )


def read_sums(connection: Connection, selection: Selection, *, hourly: bool, rollups: bool = True) -> Iterator[Sum]:
    """Add usage up.

    Args:
        connection: A transaction that sees one state of the ledger.
        selection: Which usage; its tags are not looked at.
        hourly: Keep hours apart, because the query asks for days or months.
        rollups: False to add it all up from usage.
    """
    since, until = _bounds(selection.period)
    first, last = (None if since is None else -(-since // _HOUR)), (None if until is None else until // _HOUR)
    if not rollups or (first is not None and last is not None and first >= last):
        yield from _from_usage(connection, selection, since, until)
        return
    if since is not None and first is not None and since < first * _HOUR:
        yield from _from_usage(connection, selection, since, first * _HOUR)
    split = yield from _from_rollups(connection, selection, first, last, hourly)
    for hour in split:
        yield from _from_usage(connection, selection, hour * _HOUR, (hour + 1) * _HOUR)
    if until is not None and last is not None and last * _HOUR < until:
        yield from _from_usage(connection, selection, last * _HOUR, until)


def _bounds(period: Period) -> tuple[int | None, int | None]:
    return (
        None if period.since is None else to_microseconds(period.since),
        None if period.until is None else to_microseconds(period.until),
    )


def _wanted(selection: Selection, columns: Any) -> list[ColumnElement[bool]]:
    wanted = [] if isinstance(selection.tenant, AllTenants) else [columns.tenant == selection.tenant]
    wanted += [] if selection.tier is None else [columns.tier == selection.tier]
    return wanted + ([] if selection.model is None else [columns.model == selection.model])


def _from_usage(connection: Connection, selection: Selection, since: int | None, until: int | None) -> Iterator[Sum]:
    served = type_coerce(usage_table.c.started_at, BigInteger)
    wanted = _wanted(selection, usage_table.c)
    wanted += [] if since is None else [served >= since]
    wanted += [] if until is None else [served < until]
    for row in raw_usage(connection, *wanted):
        _, tenant, source, at, tier, model, outcome, *_, book, _, unrated = row
        yield Sum(tenant, tier, model, source, outcome, book, unrated, at, quantities_of(row))


def _from_rollups(
    connection: Connection, selection: Selection, first: int | None, last: int | None, hourly: bool
) -> Any:
    """Sums of whole hours; returns the hours that have to be added up from usage."""
    columns = rollup_table.c
    hour = columns.hour if hourly else literal(0)
    keys = [columns[name] for name in _KEYS_WITHOUT_HOUR]
    sums = [func.sum(columns.requests)]
    sums += [func.sum(columns[f"{name}_{part}"]) for name in ROLLUP_QUANTITIES for part in ("millions", "rest")]
    wanted = _wanted(selection, columns)
    wanted += [] if first is None else [columns.hour >= first]
    wanted += [] if last is None else [columns.hour < last]
    groups = [*keys, columns.hour] if hourly else keys
    split: dict[int, None] = {}
    for row in connection.execute(select(*keys, hour, *sums).where(*wanted).group_by(*groups)):
        tenant, tier, model, source, outcome, book, unrated, at, requests, *parts = row
        if hourly and _is_split(at, selection.period.zone):
            split[at] = None
            continue
        values = map(int, parts)
        quantities = [int(requests), *(millions * 10**6 + rest for millions, rest in zip(values, values, strict=True))]
        yield Sum(tenant, tier or None, model, source, outcome, book, unrated or None, at * _HOUR, quantities)
    return list(split)


@lru_cache(maxsize=100_000)
def _is_split(hour: int, zone: str) -> bool:
    """True if the day changes within an hour of UTC, as where clocks are half an hour off."""
    from polar_billing.periods import Period

    period = Period(zone=zone)
    try:
        begin = _EPOCH + timedelta(hours=hour)
        return period.local_date(begin) != period.local_date(begin + timedelta(hours=1) - timedelta(microseconds=1))
    except OverflowError:  # at either end of the calendar
        return True
