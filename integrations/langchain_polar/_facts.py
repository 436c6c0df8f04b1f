"""What a finished answer cost, in the places where LangChain users look.

Tokens go to `usage_metadata` as integers only: a float there breaks LangChain's own usage counter. Money and
compute go to the response metadata. Also turns a LangChain cache hit into a usage record that says nothing
was executed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from polar_sdk.frameworks.cost import cost_facts
from polar_sdk.usage import Outcome, UsageRecord, new_request_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_polar._caller import Caller
    from polar_sdk import Generation
    from polar_sdk.usage import Receipt


_UNKNOWN = "unknown"
"""Model or router of a cache entry that another program wrote."""


def usage_metadata(record: UsageRecord) -> UsageMetadata:
    """Tokens of one request, as LangChain counts them: `cache_read` is part of `input_tokens`."""
    tokens = record.tokens
    usage = UsageMetadata(
        input_tokens=tokens.input, output_tokens=tokens.output, total_tokens=tokens.input + tokens.output
    )
    if tokens.cached:
        usage["input_token_details"] = InputTokenDetails(cache_read=tokens.cached)
    return usage


def response_metadata(generation: Generation) -> dict[str, Any]:
    """Model, finish reason, cost and compute of one answer, JSON-like."""
    record = generation.usage
    return {
        "model_name": record.model,
        "finish_reason": generation.finish_reason,
        **cost_facts(record, generation.receipt),
    }


def totals(generations: Sequence[Generation]) -> dict[str, Any]:
    """Sums over the prompts of one call, for `LLMResult.llm_output`.

    They all stand under `token_usage`, the one key that LangChain empties for every prompt but the first, so
    that a callback that adds results up counts them once.
    """
    records = [generation.usage for generation in generations]
    amounts = [(generation.receipt or {}).get("cost") for generation in generations]
    known = [Decimal(amount) for amount in amounts if amount is not None]
    return {
        "model_name": records[0].model if records else _UNKNOWN,
        "request_ids": [record.request_id for record in records],
        "token_usage": {
            "prompt_tokens": sum(record.tokens.input for record in records),
            "completion_tokens": sum(record.tokens.output for record in records),
            "total_tokens": sum(record.tokens.input + record.tokens.output for record in records),
            "flops": sum(record.flops.total for record in records),
            "identity_flops": sum(record.identity_flops for record in records),
            "cost": float(sum(known)) if len(known) == len(amounts) else None,
        },
    }


def cached_record(metadata: Mapping[str, Any], caller: Caller, tenant: str) -> UsageRecord:
    """The record of an answer that LangChain took from its cache: no tokens, no visits, 0 FLOPs.

    Args:
        metadata: Response metadata of the cached answer.
        caller: Who got it this time.
        tenant: Used where the caller names none.
    """
    origin: Mapping[str, Any] = metadata.get("polar") or {}
    return UsageRecord(
        request_id=caller.request_id or new_request_id(),
        tenant=caller.tenant or tenant,
        tags=dict(caller.tags),
        model=metadata.get("model_name") or _UNKNOWN,
        model_fingerprint=origin.get("model_fingerprint") or _UNKNOWN,
        router=origin.get("router") or _UNKNOWN,
        router_version=origin.get("router_version") or _UNKNOWN,
        tier=origin.get("tier"),
        program="",
        outcome=Outcome.CACHED,
        finish_reason="cached",
        started_at=datetime.now(UTC),
    )


def cached_metadata(metadata: Mapping[str, Any], record: UsageRecord, receipt: Receipt | None) -> dict[str, Any]:
    """Response metadata of a cached answer: what it cost this time, not what it cost when it was computed."""
    return {**metadata, **cost_facts(record, receipt)}
