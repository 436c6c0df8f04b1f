"""What one answer cost, as the model classes of frameworks report it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polar_sdk.usage import Receipt, UsageRecord


def cost_facts(record: UsageRecord, receipt: Receipt | None) -> dict[str, Any]:
    """Money and compute of one answer.

    Returns:
        `cost`, a float for display, None where no price is known; `cost_details`, with the exact decimal as text;
        `polar`, what was executed and for whom.
    """
    receipt = receipt or {}
    amount = receipt.get("cost")
    details = {"amount": amount, "currency": receipt.get("currency"), "price_book": receipt.get("price_book")}
    if receipt.get("unrated"):
        details["unrated"] = receipt["unrated"]
    return {"cost": None if amount is None else float(amount), "cost_details": details, "polar": _executed(record)}


def _drafts(record: UsageRecord) -> dict[str, Any]:
    """Nothing where nothing was drafted."""
    tokens = record.tokens
    return (
        {"drafts": {"drafted": tokens.drafted, "accepted": tokens.accepted, "flops": record.flops.drafts}}
        if tokens.drafted
        else {}
    )


def _executed(record: UsageRecord) -> dict[str, Any]:
    return {
        "program": record.program,
        "visits": record.visits.total,
        "flops": record.flops.total,
        "identity_flops": record.identity_flops,
        **_drafts(record),
        "compute_units": record.compute_units,
        "tier": record.tier,
        "tenant": record.tenant,
        "tags": dict(record.tags),
        "request_id": record.request_id,
        "outcome": record.outcome.value,
        "model_fingerprint": record.model_fingerprint,
        "router": record.router,
        "router_version": record.router_version,
    }
