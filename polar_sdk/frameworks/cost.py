"""The cost of answers: what frameworks' model classes report for one, and sums by model, tier, tenant and tag.

Knows no framework.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.usage import FALLBACK_TAG, FLOPS_PER_COMPUTE_UNIT, STOPPED_TAG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from polar_sdk.usage import Receipt, UsageRecord

_NOTES: Final = {"stopped_by": STOPPED_TAG, "fallback_from": FALLBACK_TAG}
"""Names of tags that say how an answer came about."""


def cost_facts(record: UsageRecord, receipt: Receipt | None) -> dict[str, Any]:
    """Money and compute of one answer.

    Returns:
        `cost`, a float for display, None if no price is known; `cost_details`, with the exact decimal as text;
        `polar`, what was executed and for whom.
    """
    receipt = receipt or {}
    amount = receipt.get("cost")
    details = {"amount": amount, "currency": receipt.get("currency"), "price_book": receipt.get("price_book")}
    if receipt.get("unrated"):
        details["unrated"] = receipt["unrated"]
    return {"cost": None if amount is None else float(amount), "cost_details": details, "polar": _executed(record)}


def total_cost(receipts: Iterable[Receipt | None]) -> Decimal | None:
    """The exact sum of the costs of several answers; None if one is not known, or there are none."""
    amounts = [(receipt or {}).get("cost") for receipt in receipts]
    known = [Decimal(amount) for amount in amounts if amount is not None]
    return sum(known, Decimal()) if known and len(known) == len(amounts) else None


def _executed(record: UsageRecord) -> dict[str, Any]:
    tokens = record.tokens
    drafts = {"drafted": tokens.drafted, "accepted": tokens.accepted, "flops": record.flops.drafts}
    return {
        "program": record.program,
        "visits": record.visits.total,
        "flops": record.flops.total,
        "identity_flops": record.identity_flops,
        **({"drafts": drafts} if tokens.drafted else {}),
        **{name: record.tags[tag] for name, tag in _NOTES.items() if tag in record.tags},
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


@dataclass(frozen=True)
class PolarCall:
    """The bill of one answer."""

    model: str
    tier: str | None
    program: str
    tenant: str
    tags: Mapping[str, str]
    request_id: str
    outcome: str
    input_tokens: int
    output_tokens: int
    flops: int
    """Executed. Unit: FLOPs."""
    identity_flops: int
    """Executed at full depth. Unit: FLOPs."""
    cost: Decimal | None
    """Exact; None if no price is known."""
    currency: str | None

    @classmethod
    def of(cls, model: str | None, reported: Mapping[str, Any], tokens: tuple[int, int]) -> PolarCall | None:
        """Read what an answer reports; None if it is not of a PoLar model.

        Args:
            model: Name of the model.
            reported: Metadata of the answer, with `cost_details` and `polar`.
            tokens: Of input and output; those of a cached answer are not counted, since nothing was computed.
        """
        facts, money = reported.get("polar"), reported.get("cost_details") or {}
        if not facts:
            return None
        amount = money.get("amount")
        computed = facts["outcome"] != "cached"
        return cls(
            model=model or "unknown",
            tier=facts["tier"],
            program=facts["program"],
            tenant=facts["tenant"],
            tags=facts["tags"],
            request_id=facts["request_id"],
            outcome=facts["outcome"],
            input_tokens=tokens[0] if computed else 0,
            output_tokens=tokens[1] if computed else 0,
            flops=facts["flops"],
            identity_flops=facts["identity_flops"],
            cost=None if amount is None else Decimal(amount),
            currency=money.get("currency"),
        )

    @property
    def compute_units(self) -> Decimal:
        """Executed compute units, exact. Unit: CU."""
        return Decimal(self.flops) / FLOPS_PER_COMPUTE_UNIT


@dataclass
class CostTotals:
    """Sums over calls."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    flops: int = 0
    identity_flops: int = 0
    cost: dict[str, Decimal] = field(default_factory=dict)
    """Exact sum per currency of the calls that have a price."""
    unrated: int = 0
    """Calls without a price; `cost` leaves them out."""

    @property
    def compute_units(self) -> Decimal:
        """Executed compute units, exact. Unit: CU."""
        return Decimal(self.flops) / FLOPS_PER_COMPUTE_UNIT

    def add(self, call: PolarCall) -> None:
        """Count one call."""
        self.requests += 1
        self.input_tokens += call.input_tokens
        self.output_tokens += call.output_tokens
        self.flops += call.flops
        self.identity_flops += call.identity_flops
        if call.cost is None or call.currency is None:
            self.unrated += 1
        else:
            self.cost[call.currency] = self.cost.get(call.currency, Decimal(0)) + call.cost


class CallCosts:
    """The bills of a block of calls. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[PolarCall] = []

    def take(self, calls: Iterable[PolarCall]) -> None:
        """Count calls that have ended."""
        with self._lock:
            self._calls.extend(calls)

    @property
    def calls(self) -> list[PolarCall]:
        """One bill per answer, in the order in which they ended."""
        with self._lock:
            return list(self._calls)

    @property
    def total(self) -> CostTotals:
        """Sums over all calls."""
        return _sums(self.calls, lambda _: ["all"]).get("all", CostTotals())

    @property
    def by_model(self) -> dict[str, CostTotals]:
        """Sums per model name."""
        return _sums(self.calls, lambda call: [call.model])

    @property
    def by_tier(self) -> dict[str, CostTotals]:
        """Sums per tier; calls with a program by hand are under `by hand`."""
        return _sums(self.calls, lambda call: [call.tier or "by hand"])

    @property
    def by_tenant(self) -> dict[str, CostTotals]:
        """Sums per tenant."""
        return _sums(self.calls, lambda call: [call.tenant])

    @property
    def by_tag(self) -> dict[str, CostTotals]:
        """Sums per `key=value`; a call with two tags counts under both, one without counts under none."""
        return _sums(self.calls, lambda call: [f"{key}={value}" for key, value in call.tags.items()])

    def __repr__(self) -> str:
        total = self.total
        money = " + ".join(f"{amount} {currency}" for currency, amount in total.cost.items()) or "no price"
        return f"<{total.requests} requests, {total.compute_units} CU, {money}>"


def _sums(calls: Iterable[PolarCall], keys: Callable[[PolarCall], list[str]]) -> dict[str, CostTotals]:
    sums: dict[str, CostTotals] = {}
    for call in calls:
        for key in keys(call):
            sums.setdefault(key, CostTotals()).add(call)
    return sums
