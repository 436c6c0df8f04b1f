"""Sums of usage by hour: kept up to date as usage is stored, recomputed from usage, and read for queries.

The writer, `verify` and retention add up in the same way: in Python integers, kept as whole millions and a rest, so
nothing overflows and nothing is rounded. A query reads the sums by hour where it can; hours that a period cuts, and
hours in which the day changes in the given time zone, are added up from usage. The two agree, because both are integers
of the same facts; `verify` checks one against the other. Reports read usage request by request, as the database holds
it (`RawUsage`). Knows no prices and no output.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from functools import lru_cache
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import BigInteger, func, literal, literal_column, select, type_coerce

from polar_billing.ledger.connection import upsert_rows
from polar_billing.ledger.records import conditions
from polar_billing.ledger.schema import ROLLUP_KEYS, ROLLUP_QUANTITIES, receipt_table, rollup_table, usage_table
from polar_billing.values.canonical import EPOCH, canonical_json, to_microseconds
from polar_billing.values.money import to_units
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Select

    from polar_billing.ledger.records import Selection, StoredUsage

    RollupKey = tuple[Any, ...]
    """The values of `ROLLUP_KEYS`."""
    Sums = dict[RollupKey, list[int]]
    """Key → requests, then the quantities in the order of `ROLLUP_QUANTITIES`."""

_MILLION: Final = 1_000_000
_HOUR: Final = 3_600_000_000
"""Microseconds."""
_COLUMNS: Final = ["requests", *(f"{name}_{part}" for name in ROLLUP_QUANTITIES for part in ("millions", "rest"))]
_ADD: Final = tuple(f"{name} = {rollup_table.name}.{name} + excluded.{name}" for name in _COLUMNS)
_USAGE_COLUMNS: Final = (
    *("tenant", "source", "started_at", "tier", "model", "outcome", "visits_prefill", "visits_decode"),
    *("tokens_input", "tokens_cached", "tokens_output", "flops_total", "identity_flops"),
)
_RECEIPT_COLUMNS: Final = ("price_book_hash", "cost", "unrated")
_COMPUTED: Final = {
    "flops_answer": "polar_usage.flops_layers_decode + polar_usage.flops_head",
    **{name: f"coalesce(polar_usage.{name}, 0)" for name in ("tokens_drafted", "tokens_accepted", "flops_drafts")},
    "cost": "coalesce(polar_receipt.cost, 0)",
}
_pick_usage: Final = itemgetter(*(usage_table.c.keys().index(name) for name in _USAGE_COLUMNS))
_pick_receipt: Final = itemgetter(*(receipt_table.c.keys().index(name) for name in _RECEIPT_COLUMNS))


class RawUsage(NamedTuple):
    """One request as the database holds it: times are microseconds since 1970, money is in 10^-12, visits are JSON.

    See `UsageRecord` and `StoredUsage`.
    """

    tenant: str
    tier: str | None
    model: str
    program: str
    outcome: str
    price_book_hash: str
    unrated: str | None
    started_at: int
    visits_prefill: str
    visits_prefill_filled: str | None
    visits_decode: str
    tokens_input: int
    tokens_cached: int
    tokens_output: int
    flops_total: int
    identity_flops: int
    flops_router: int
    flops_answer: int
    """Decode steps and the head."""
    tokens_drafted: int
    tokens_accepted: int
    flops_drafts: int
    cost: int
    """0 where unrated."""
    queue_ns: int
    prefill_ns: int
    decode_ns: int


class Sum(NamedTuple):
    """Requests that share everything a query can group by, and what they used."""

    tenant: str
    tier: str | None
    model: str
    source: str
    outcome: str
    price_book_hash: str
    unrated: str | None
    at: int
    """A moment of service that stands for all of them, if the query asks for it. Unit: microseconds since 1970."""
    quantities: list[int]
    """Requests, then `ROLLUP_QUANTITIES`."""

    @property
    def key(self) -> RollupKey:
        """The sum by hour that it belongs to, in the order of `ROLLUP_KEYS`."""
        what = (self.tier or "", self.model, self.source, self.outcome)
        return (self.tenant, self.at // _HOUR, *what, self.price_book_hash, self.unrated or "")


def _of_row(row: Iterable[Any]) -> Sum:
    """One request as the database holds it, by `_USAGE_COLUMNS` and `_RECEIPT_COLUMNS`, as a sum of one."""
    tenant, source, at, tier, model, outcome, prefill, decode, *tokens, flops, identity_flops, book, cost, unrated = row
    quantities = [1, *tokens, visits_in(prefill) + visits_in(decode), flops, identity_flops, cost or 0]
    return Sum(tenant, tier, model, source, outcome, book, unrated, at, quantities)


def add_to_rollups(connection: Connection, rows: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> None:
    """Add newly stored rows of `polar_usage`, each with its row of `polar_receipt`, to the stored sums."""
    sums = sum_up(_of_row((*_pick_usage(usage), *_pick_receipt(receipt))) for usage, receipt in rows)
    values = []
    for key in sorted(sums):  # in a fixed order, so that two writers cannot wait for each other's rows
        requests, *others = sums[key]
        split = (part for quantity in others for part in divmod(quantity, _MILLION))
        values.append((rollup_id(key), *key, requests, *split))
    upsert_rows(connection, rollup_table, values, _ADD)


def sum_up(usage: Iterable[Sum]) -> Sums:
    """Add usage up by rollup key."""
    sums: Sums = {}
    for part in usage:
        _add(sums, part.key, part.quantities)
    return sums


@lru_cache(maxsize=4096)  # the same programs come up again and again
def visits_in(text: str) -> int:
    """The sum of a JSON array of integers. Unit: visits."""
    inner = text[1:-1]
    return sum(map(int, inner.split(","))) if inner else 0


def _add(sums: Sums, key: RollupKey, quantities: list[int]) -> None:
    sum_ = sums.get(key)
    sums[key] = quantities if sum_ is None else list(map(add, sum_, quantities))


def merge(*many: Sums) -> Sums:
    """Add several sums up."""
    merged: Sums = {}
    for sums in many:
        for key, quantities in sums.items():
            _add(merged, key, quantities)
    return merged


def rollup_id(key: RollupKey) -> bytes:
    """The primary key of a stored sum: SHA-256 over its `ROLLUP_KEYS`."""
    return hashlib.sha256(canonical_json(key)).digest()


def misfiled_rollups(connection: Connection, tenant: str) -> Iterator[RollupKey]:
    """The stored sums of a tenant whose id does not follow from their key: later usage would be added elsewhere."""
    columns = [rollup_table.c[name] for name in ("id", *ROLLUP_KEYS)]
    query = select(*columns).where(rollup_table.c.tenant == tenant).order_by(rollup_table.c.hour)
    with connection.execute(query, execution_options={"yield_per": 1_000}) as rows:
        for stored_id, *key in rows:
            if bytes(stored_id) != rollup_id(tuple(key)):
                yield tuple(key)


def stored_rollups(connection: Connection, *conditions: ColumnElement[bool]) -> Sums:
    """Read the stored sums."""
    columns = [rollup_table.c[name] for name in (*ROLLUP_KEYS, *_COLUMNS)]
    keys = len(ROLLUP_KEYS)
    sums: Sums = {}
    for row in connection.execute(select(*columns).where(*conditions)):
        _add(sums, tuple(row[:keys]), [row[keys], *_joined(row[keys + 1 :])])
    return sums


def _joined(split: Sequence[Any]) -> Iterator[int]:
    """Quantities of their millions and their rest, one after the other."""
    return map(joined_sum, split[::2], split[1::2])


def split_sum(counts: ColumnElement[Any]) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    """The sum of a column in SQL, as whole millions and a rest: neither leaves 64 bits."""
    return func.sum(counts // _MILLION), func.sum(counts % _MILLION)


def joined_sum(millions: Any, rest: Any) -> int:
    """A sum of its two parts as the database returns them; 0 of nothing."""
    return int(millions or 0) * _MILLION + int(rest or 0)


def usage_shares(connection: Connection, *conditions: ColumnElement[bool]) -> Iterator[Sum]:
    """Read usage and its receipts, each request as a sum of one."""
    names = {name: f"polar_usage.{name}" for name in _USAGE_COLUMNS}
    names |= {name: f"polar_receipt.{name}" for name in _RECEIPT_COLUMNS}
    query = _joined_usage(names).where(*conditions)
    with connection.execute(query, execution_options={"yield_per": 1_000}) as rows:
        yield from map(_of_row, rows)


def usage_of(selection: Selection) -> list[ColumnElement[bool]]:
    """The conditions of a selection in SQL, over usage; its tags are left to the caller."""
    return conditions(selection, usage_table.c, usage_table.c.started_at, *selection.period.ends)


def raw_usage_query(selection: Selection) -> Select[Any]:
    """The query of a selection, whose tags are ignored; its columns are those of `RawUsage`, in no order of rows."""
    names = {name: f"polar_{'receipt' if name in _RECEIPT_COLUMNS else 'usage'}.{name}" for name in RawUsage._fields}
    served = type_coerce(usage_table.c.started_at, BigInteger)
    bounds = (None if moment is None else to_microseconds(moment) for moment in selection.period.ends)
    return _joined_usage(names | _COMPUTED).where(*conditions(selection, usage_table.c, served, *bounds))


def _joined_usage(names: Mapping[str, str]) -> Select[Any]:
    """Usage with its receipts; names of columns → SQL."""
    columns: list[ColumnElement[Any]] = [literal_column(sql).label(name) for name, sql in names.items()]
    joined = select(*columns).select_from(usage_table)
    return joined.join(receipt_table, receipt_table.c.usage_seq == usage_table.c.seq)


SUM_DIMENSIONS: Final = frozenset({"tenant", "tier", "model", "source", "outcome", "day", "month"})
"""Dimensions by which sums by hour can be grouped."""

_KEYS_WITHOUT_HOUR: Final = tuple(name for name in ROLLUP_KEYS if name != "hour")


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
    """Add up the usage of a selection, whose tags are ignored, from one state of the ledger.

    Hours are kept apart (`hourly`) where the query asks for days or months; without `rollups` it is all added up from
    usage.
    """
    since, until = (None if moment is None else to_microseconds(moment) for moment in selection.period.ends)
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


def _from_usage(connection: Connection, selection: Selection, since: int | None, until: int | None) -> Iterator[Sum]:
    served = type_coerce(usage_table.c.started_at, BigInteger)
    yield from usage_shares(connection, *conditions(selection, usage_table.c, served, since, until))


def _from_rollups(
    connection: Connection, selection: Selection, first: int | None, last: int | None, hourly: bool
) -> Any:
    """Sums of whole hours; returns the hours that have to be added up from usage."""
    columns = rollup_table.c
    hour = columns.hour if hourly else literal(0)
    keys = [columns[name] for name in _KEYS_WITHOUT_HOUR]
    sums = [func.sum(columns.requests)]
    sums += [func.sum(columns[f"{name}_{part}"]) for name in ROLLUP_QUANTITIES for part in ("millions", "rest")]
    where = conditions(selection, columns, columns.hour, first, last)
    groups = [*keys, columns.hour] if hourly else keys
    split: dict[int, None] = {}
    for row in connection.execute(select(*keys, hour, *sums).where(*where).group_by(*groups)):
        tenant, tier, model, source, outcome, book, unrated, at, requests, *parts = row
        if hourly and _is_split(at, selection.period.zone):
            split[at] = None
            continue
        quantities = [int(requests), *_joined(parts)]
        yield Sum(tenant, tier or None, model, source, outcome, book, unrated or None, at * _HOUR, quantities)
    return list(split)


@lru_cache(maxsize=100_000)
def _is_split(hour: int, zone: str) -> bool:
    """True if the day changes within an hour of UTC, as where clocks are half an hour off."""
    period = Period(zone=zone)
    try:
        begin = EPOCH + timedelta(hours=hour)
        return period.local_date(begin) != period.local_date(begin + timedelta(hours=1) - timedelta(microseconds=1))
    except OverflowError:  # at either end of the calendar
        return True
