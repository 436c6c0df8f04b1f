"""Keep the sums by hour up to date as usage is stored, and compute them again from usage.

One way of adding up serves the writer, `verify`, retention and migrations. Everything is added in Python integers
and kept as whole millions and a rest, so nothing overflows and nothing is rounded. Knows no output.

Usage added up for the usage query: from the sums by hour where they serve, from usage itself where they do not.

The two agree, because both are integers of the same facts; `verify` holds them to it. Hours that a period cuts, and
hours in which the day changes in the asked time zone, are always added up from usage. Knows no prices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, func, literal, literal_column, select, type_coerce

from polar_billing.ledger.contract import AllTenants
from polar_billing.ledger.lookup import upsert_rows
from polar_billing.ledger.schema import receipt_table, usage_table
from polar_billing.ledger.schema.base import to_microseconds
from polar_billing.ledger.schema.rollups import ROLLUP_KEYS, ROLLUP_QUANTITIES, rollup_table
from polar_billing.values.canonical import canonical_json
from polar_billing.values.money import to_units

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import ColumnElement, Connection

    from polar_billing.ledger.contract import Selection, StoredUsage
    from polar_billing.values.periods import Period

    Raw = Sequence[Any]
    """The values of `RAW_COLUMNS`."""
    RollupKey = tuple[Any, ...]
    """The values of `ROLLUP_KEYS`."""
    Sums = dict[RollupKey, list[int]]
    """Key → requests, then the quantities in the order of `ROLLUP_QUANTITIES`."""

_MILLION: Final = 1_000_000
_HOUR: Final = 3_600_000_000
"""Microseconds."""
_COLUMNS: Final = ["requests", *(f"{name}_{part}" for name in ROLLUP_QUANTITIES for part in ("millions", "rest"))]
_ADD: Final = tuple(f"{name} = {rollup_table.name}.{name} + excluded.{name}" for name in _COLUMNS)
_USAGE_COLUMNS: Final = (  # the places of the columns in a raw row are written out in `sum_up` and `quantities_of`
    *("seq", "tenant", "source", "started_at", "tier", "model", "outcome", "visits_prefill", "visits_decode"),
    *("tokens_input", "tokens_cached", "tokens_output", "flops_total", "identity_flops"),
)
_RECEIPT_COLUMNS: Final = ("price_book_hash", "cost", "unrated")
RAW_COLUMNS: Final = (*_USAGE_COLUMNS, *_RECEIPT_COLUMNS)
_pick_usage: Final = itemgetter(*(usage_table.c.keys().index(name) for name in _USAGE_COLUMNS))
_pick_receipt: Final = itemgetter(*(receipt_table.c.keys().index(name) for name in _RECEIPT_COLUMNS))


def _picked(usage: Sequence[Any], receipt: Sequence[Any]) -> Raw:
    return (*_pick_usage(usage), *_pick_receipt(receipt))


def hour_of(microseconds: int) -> int:
    """The hour since 1970 that a moment falls in. Unit: hours."""
    return microseconds // _HOUR


def add_to_rollups(connection: Connection, rows: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> None:
    """Add newly stored rows of `polar_usage`, each with its row of `polar_receipt`, to the sums."""
    write_rollups(connection, sum_up(_picked(usage, receipt) for usage, receipt in rows))


def sum_up(rows: Iterable[Raw]) -> Sums:
    """Add rows of `raw_usage` up by rollup key."""
    sums: Sums = {}
    for row in rows:
        key = (row[1], row[3] // _HOUR, row[4] or "", row[5], row[2], row[6], row[14], row[16] or "")
        quantities = quantities_of(row)
        found = sums.get(key)
        sums[key] = quantities if found is None else list(map(add, found, quantities))
    return sums


def quantities_of(row: Raw) -> list[int]:
    """One request and its quantities, from a row of `raw_usage`."""
    visits = visits_in(row[7]) + visits_in(row[8])
    return [1, row[9], row[10], row[11], visits, row[12], row[13], row[15] or 0]


@lru_cache(maxsize=4096)  # the same programs come again and again
def visits_in(text: str) -> int:
    """The sum of a JSON array of integers. Unit: visits."""
    inner = text[1:-1]
    return sum(map(int, inner.split(","))) if inner else 0


def _add(sums: Sums, key: RollupKey, quantities: Iterable[int]) -> None:
    found = sums.get(key)
    sums[key] = list(quantities) if found is None else [a + b for a, b in zip(found, quantities, strict=True)]


def merge(*many: Sums) -> Sums:
    """Add several sums up."""
    merged: Sums = {}
    for sums in many:
        for key, quantities in sums.items():
            _add(merged, key, quantities)
    return merged


def write_rollups(connection: Connection, sums: Sums) -> None:
    """Add sums to the stored ones."""
    # In a fixed order, so that two writers cannot wait for each other's rows.
    upsert_rows(connection, rollup_table, [_row(key, sums[key]) for key in sorted(sums)], _ADD)


def _row(key: RollupKey, quantities: list[int]) -> tuple[Any, ...]:
    requests, *others = quantities
    split = (part for quantity in others for part in divmod(quantity, _MILLION))
    return (hashlib.sha256(canonical_json(key)).digest(), *key, requests, *split)


def stored_rollups(connection: Connection, *conditions: ColumnElement[bool]) -> Sums:
    """Read the stored sums."""
    columns = [rollup_table.c[name] for name in (*ROLLUP_KEYS, *_COLUMNS)]
    keys = len(ROLLUP_KEYS)
    sums: Sums = {}
    for row in connection.execute(select(*columns).where(*conditions)):
        requests, *split = row[keys:]
        _add(sums, tuple(row[:keys]), (requests, *_joined(split)))
    return sums


def _joined(split: list[int]) -> Iterator[int]:
    for millions, rest in zip(split[::2], split[1::2], strict=True):
        yield millions * _MILLION + rest


def raw_usage(connection: Connection, *conditions: ColumnElement[bool]) -> Iterator[Raw]:
    """Read what sums are made of, of usage with its receipt, as the database holds it; see `RAW_COLUMNS`."""
    names = [f"polar_usage.{name}" for name in _USAGE_COLUMNS] + [f"polar_receipt.{name}" for name in _RECEIPT_COLUMNS]
    columns: list[ColumnElement[Any]] = [literal_column(name) for name in names]
    query = (
        select(*columns)
        .select_from(usage_table)
        .join(receipt_table, receipt_table.c.usage_seq == usage_table.c.seq)
        .where(*conditions)
    )
    with connection.execute(query, execution_options={"yield_per": 1_000}) as rows:
        yield from rows


SUM_DIMENSIONS: Final = frozenset({"tenant", "tier", "model", "source", "outcome", "day", "month"})
"""What sums by hour can be grouped by."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
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
    from polar_billing.values.periods import Period

    period = Period(zone=zone)
    try:
        begin = _EPOCH + timedelta(hours=hour)
        return period.local_date(begin) != period.local_date(begin + timedelta(hours=1) - timedelta(microseconds=1))
    except OverflowError:  # at either end of the calendar
        return True
