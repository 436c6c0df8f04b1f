"""`get_polar_cost_callback`: what a block of LangChain calls cost, by model, tier, tag and tenant.

Reads what PoLar models write into their results and nothing else. It sees what LangChain shows to callbacks:
an interrupted answer, and one that `PolarLLM` took from a cache, never reach a callback. The ledger
has both.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from langchain_core.tracers.context import register_configure_hook

from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


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
    """What full depth would have executed. Unit: FLOPs."""
    cost: Decimal | None
    """Exact; None where no price is known."""
    currency: str | None

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


class PolarCostCallbackHandler(BaseCallbackHandler):
    """Collects the bill of every answer that LangChain reports to it. Safe to share between threads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._calls: list[PolarCall] = []

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

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        """Take the bills from a result; results of other models hold none."""
        answers = [answer for row in response.generations for answer in row]
        calls = [call for answer in answers if (call := _bill(answer)) is not None]
        with self._lock:
            self._calls.extend(calls)

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


def _bill(generation: object) -> PolarCall | None:
    if isinstance(generation, ChatGeneration):
        info: Mapping[str, Any] = generation.message.response_metadata
        usage: Mapping[str, Any] = getattr(generation.message, "usage_metadata", None) or {}
    elif isinstance(generation, Generation):
        info = generation.generation_info or {}
        usage = info.get("usage_metadata") or {}
    else:
        return None
    facts, money = info.get("polar"), info.get("cost_details") or {}
    if not facts:
        return None
    amount = money.get("amount")
    computed = facts["outcome"] != "cached"  # LangChain keeps the tokens of the original on a cached message
    return PolarCall(
        model=info.get("model_name") or "unknown",
        tier=facts["tier"],
        program=facts["program"],
        tenant=facts["tenant"],
        tags=facts["tags"],
        request_id=facts["request_id"],
        outcome=facts["outcome"],
        input_tokens=usage.get("input_tokens", 0) if computed else 0,
        output_tokens=usage.get("output_tokens", 0) if computed else 0,
        flops=facts["flops"],
        identity_flops=facts["identity_flops"],
        cost=None if amount is None else Decimal(amount),
        currency=money.get("currency"),
    )


_active: ContextVar[PolarCostCallbackHandler | None] = ContextVar("polar_cost_callback", default=None)
register_configure_hook(_active, inheritable=True)  # once: LangChain keeps every hook that is registered


@contextmanager
def get_polar_cost_callback() -> Iterator[PolarCostCallbackHandler]:
    """Collect the cost of every PoLar call in the block, however deep in a chain.

    Example:
        >>> with get_polar_cost_callback() as costs:  # doctest: +SKIP
        ...     chain.invoke({"question": "…"})
        >>> costs.total.cost, costs.by_tier["economy"].compute_units  # doctest: +SKIP
    """
    handler = PolarCostCallbackHandler()
    token = _active.set(handler)
    try:
        yield handler
    finally:
        _active.reset(token)
