"""Usage as the database holds it, request by request: quick to add up for a report of a million requests.

Values are raw: times are microseconds since 1970, money is in 10^-12 of the currency, visits are JSON. Knows no report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import BigInteger, Select, literal_column, select, type_coerce

from polar_billing.ledger.records import conditions
from polar_billing.ledger.schema import receipt_table, usage_table
from polar_billing.values.canonical import to_microseconds

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from polar_billing.ledger.records import Selection


class RawUsage(NamedTuple):
    """One request; see `UsageRecord` and `StoredUsage`."""

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


_COMPUTED: Final = {
    "flops_answer": "polar_usage.flops_layers_decode + polar_usage.flops_head",
    **{name: f"coalesce(polar_usage.{name}, 0)" for name in ("tokens_drafted", "tokens_accepted", "flops_drafts")},
    "cost": "coalesce(polar_receipt.cost, 0)",
}
_OF_RECEIPT: Final = frozenset({"price_book_hash", "unrated"})


def raw_usage_query(selection: Selection) -> Select[Any]:
    """The query of a selection, whose tags are ignored; its columns are those of `RawUsage`, in no order of rows."""
    sources = {name: f"polar_{'receipt' if name in _OF_RECEIPT else 'usage'}.{name}" for name in RawUsage._fields}
    columns: list[ColumnElement[Any]] = [
        literal_column(source).label(name) for name, source in (sources | _COMPUTED).items()
    ]
    served = type_coerce(usage_table.c.started_at, BigInteger)
    since, until = selection.period.since, selection.period.until
    bounds = (moment and to_microseconds(moment) for moment in (since, until))
    return (
        select(*columns)
        .select_from(usage_table)
        .join(receipt_table, receipt_table.c.usage_seq == usage_table.c.seq)
        .where(*conditions(selection, usage_table.c, served, *bounds))
    )
