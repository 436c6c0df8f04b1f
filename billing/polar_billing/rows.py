"""A usage record as one row of `polar_usage`, and back, field by field.

Written out rather than derived, so that a new field of the record cannot slip past the schema unnoticed; the
round trip is tested over generated records. Rows are trusted when read: they were validated when written and
cannot change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_billing.storage import StoredUsage
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord, VisitUsage

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Row

__all__ = ["from_row", "to_row"]


def to_row(record: UsageRecord, *, source: str, digest: str, stored_at: datetime) -> dict[str, Any]:
    """The column values of a record."""
    return {
        "tenant": record.tenant,
        "source": source,
        "request_id": record.request_id,
        "content_hash": digest,
        "record_version": record.schema_version,
        "started_at": record.started_at,
        "stored_at": stored_at,
        "tags": record.tags,
        "model": record.model,
        "model_fingerprint": record.model_fingerprint,
        "router": record.router,
        "router_version": record.router_version,
        "tier": record.tier,
        "program": record.program,
        "outcome": str(record.outcome),
        "finish_reason": record.finish_reason,
        "error": record.error,
        "tokens_input": record.tokens.input,
        "tokens_cached": record.tokens.cached,
        "tokens_output": record.tokens.output,
        "visits_prefill": record.visits.prefill,
        "visits_decode": record.visits.decode,
        "flops_embed": record.flops.embed,
        "flops_layers_prefill": record.flops.layers_prefill,
        "flops_layers_decode": record.flops.layers_decode,
        "flops_head": record.flops.head,
        "flops_router": record.flops.router,
        "flops_total": record.flops.total,
        "flops_formula": record.flops_formula,
        "identity_flops": record.identity_flops,
        "kv_bytes_peak": record.kv_bytes_peak,
        "device": record.device,
        "dtype": record.dtype,
        "queue_ns": record.queue_ns,
        "prefill_ns": record.prefill_ns,
        "decode_ns": record.decode_ns,
    }


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
