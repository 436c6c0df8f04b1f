"""A usage record as one row of `polar_usage`, and back, field by field.

Written out rather than derived, so that a new field of the record cannot slip past the schema unnoticed; the
round trip is tested over generated records. Rows are trusted when read: they were validated when written and
cannot change.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from polar_billing.ledger.contract import StoredUsage
from polar_billing.ledger.schema.base import to_list_text, to_map_text, to_microseconds
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord, VisitUsage

if TYPE_CHECKING:
    from sqlalchemy import Row

    from polar_billing.ledger.contract import Entry


def to_raw(seq: int, entry: Entry, stored_at: int) -> tuple[Any, ...]:
    """The row of `polar_usage` as the database holds it, in the order of its columns.

    Args:
        seq: The number it is stored under.
        entry: What is stored.
        stored_at: Stored time. Unit: microseconds since 1970.
    """
    record = entry.record
    visits = record.visits
    return (
        seq,
        record.tenant,
        entry.source,
        record.request_id,
        entry.content_hash,
        record.schema_version,
        to_microseconds(record.started_at),
        stored_at,
        to_map_text(record.tags) if record.tags else "{}",
        *_how_it_ran(record),
        str(record.outcome),
        record.finish_reason,
        record.error,
        *_tokens(record),
        to_list_text(visits.prefill),
        to_list_text(visits.decode),
        *_work(record),
    )


_how_it_ran: Final = attrgetter("model", "model_fingerprint", "router", "router_version", "tier", "program")
_tokens: Final = attrgetter("tokens.input", "tokens.cached", "tokens.output")
_work: Final = attrgetter(
    *("flops.embed", "flops.layers_prefill", "flops.layers_decode", "flops.head", "flops.router", "flops.total"),
    *("flops_formula", "identity_flops", "kv_bytes_peak", "device", "dtype"),
    *("queue_ns", "prefill_ns", "decode_ns", "loops_stopped"),
)


def receipt_to_raw(seq: int, entry: Entry) -> tuple[Any, ...]:
    """The row of `polar_receipt` as the database holds it, in the order of its columns."""
    return (seq, entry.book.content_hash, entry.cost_units, entry.unrated)


def from_row(row: Row[Any]) -> StoredUsage:
    """The stored usage of a row of `polar_usage` joined with its receipt."""
    record = UsageRecord.model_construct(
        schema_version=row.record_version,
        request_id=row.request_id,
        tenant=row.tenant,
        tags=row.tags,
        model=row.model,
        model_fingerprint=row.model_fingerprint,
        router=row.router,
        router_version=row.router_version,
        tier=row.tier,
        program=row.program,
        outcome=Outcome(row.outcome),
        finish_reason=row.finish_reason,
        error=row.error,
        tokens=TokenUsage.model_construct(input=row.tokens_input, cached=row.tokens_cached, output=row.tokens_output),
        visits=VisitUsage.model_construct(prefill=row.visits_prefill, decode=row.visits_decode),
        flops=FlopUsage.model_construct(
            embed=row.flops_embed,
            layers_prefill=row.flops_layers_prefill,
            layers_decode=row.flops_layers_decode,
            head=row.flops_head,
            router=row.flops_router,
            total=row.flops_total,
        ),
        loops_stopped=row.loops_stopped,
        flops_formula=row.flops_formula,
        identity_flops=row.identity_flops,
        kv_bytes_peak=row.kv_bytes_peak,
        device=row.device,
        dtype=row.dtype,
        started_at=row.started_at,
        queue_ns=row.queue_ns,
        prefill_ns=row.prefill_ns,
        decode_ns=row.decode_ns,
    )
    return StoredUsage(
        seq=row.seq,
        source=row.source,
        record=record,
        stored_at=row.stored_at,
        price_book_hash=row.price_book_hash,
        cost=row.cost,
        unrated=row.unrated,
    )
