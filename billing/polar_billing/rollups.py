"""Keep the sums by hour up to date as usage is stored, and compute them again from usage.

One way of adding up serves the writer, `verify`, retention and migrations. Everything is added in Python integers
and kept as whole millions and a rest, so nothing overflows and nothing is rounded. Knows no output.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import literal_column, select

from polar_billing.bulk import upsert_rows
from polar_billing.canonical import canonical_json
from polar_billing.schema import receipt_table, usage_table
from polar_billing.schema.rollups import ROLLUP_KEYS, ROLLUP_QUANTITIES, rollup_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import ColumnElement, Connection

    Raw = Sequence[Any]
    """The values of `RAW_COLUMNS`."""
    RollupKey = tuple[Any, ...]
    """The values of `ROLLUP_KEYS`."""
    Sums = dict[RollupKey, list[int]]
    """Key → requests, then the quantities in the order of `ROLLUP_QUANTITIES`."""

__all__ = [
    "RAW_COLUMNS",
    "add_to_rollups",
    "hour_of",
    "merge",
    "quantities_of",
    "raw_usage",
    "stored_rollups",
    "sum_up",
    "visits_in",
    "write_rollups",
]

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
