"""Usage and cost of an answer as attributes of OpenTelemetry's current span.

The names are those of OpenTelemetry's GenAI conventions (`gen_ai.*`), of OpenInference (`llm.*`) and our own
(`polar.*`). Nothing of OpenTelemetry is imported unless tracing is asked for. A span that sees several answers, such as
that of an HTTP request around an agent, has their sums, the names of the last, and one event per answer. Knows no
framework.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from polar_sdk.errors import MissingExtraError
from polar_sdk.frameworks.cost import CostTotals, PolarCall, cost_facts
from polar_sdk.locks import renewed_in_child

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from polar_sdk.usage import Receipt, UsageRecord


EVENT: Final = "polar.answer"
"""Name of the event that a span has per answer, with the attributes of that answer alone."""
_COST_CURRENCY: Final = "USD"
"""Currency of costs for OpenInference and Langfuse; a cost in another one is in `polar.cost` alone."""
_totals: Final[WeakKeyDictionary[Any, CostTotals]] = WeakKeyDictionary()
"""Sums of the answers that a span has seen."""
_adding: Final = renewed_in_child(threading.Lock())


class CallSpan:
    """The span that is current where a call begins, and gets what the call used when it ends.

    Args:
        wanted: Whether to trace at all; False imports nothing and does nothing.

    Raises:
        MissingExtraError: Tracing is wanted, and OpenTelemetry is not installed.
    """

    def __init__(self, wanted: bool) -> None:
        self._span = _recording() if wanted else None

    def note(self, record: UsageRecord, receipt: Receipt | None) -> None:
        """Set what an answer used and cost; does nothing where no span records."""
        if self._span is not None and self._span.is_recording():
            note_answer(self._span, record, receipt)


def note_answer(span: Span, record: UsageRecord, receipt: Receipt | None) -> None:
    """Set on a span what an answer used and cost."""
    tokens = record.tokens.input, record.tokens.output
    call = PolarCall.of(record.model, cost_facts(record, receipt), tokens)
    assert call is not None  # it is a PoLar record
    own = CostTotals()
    own.add(call)
    with _adding:
        totals = _totals.setdefault(span, CostTotals())
        totals.add(call)
        span.set_attributes({**_names(record), **_sums(totals)})
    span.add_event(EVENT, {**_names(record), **_sums(own)})


def _recording() -> Span | None:
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise MissingExtraError(
            "tracing=True needs OpenTelemetry, which is not installed.", hint="pip install 'polar-llm[tracing]'"
        ) from error
    span = trace.get_current_span()
    return span if span.is_recording() else None


def _names(record: UsageRecord) -> dict[str, Any]:
    """Attributes that cannot be added up."""
    return {
        "gen_ai.provider.name": "polar",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": [record.finish_reason],
        "llm.model_name": record.model,
        "polar.request_id": record.request_id,
        "polar.tenant": record.tenant,
        "polar.tier": record.tier or "by hand",
        "polar.program": record.program,
        "polar.outcome": record.outcome.value,
    }


def _sums(totals: CostTotals) -> dict[str, Any]:
    sums: dict[str, Any] = {
        "gen_ai.usage.input_tokens": totals.input_tokens,
        "gen_ai.usage.output_tokens": totals.output_tokens,
        "llm.token_count.prompt": totals.input_tokens,
        "llm.token_count.completion": totals.output_tokens,
        "llm.token_count.total": totals.input_tokens + totals.output_tokens,
        "polar.requests": totals.requests,
        "polar.unrated": totals.unrated,  # how many have no price, which the cost leaves out
        "polar.flops": totals.flops,
        "polar.identity_flops": totals.identity_flops,
        "polar.compute_units": float(totals.compute_units),
    }
    if totals.cost:
        sums["polar.cost"] = " + ".join(f"{amount:f} {currency}" for currency, amount in sorted(totals.cost.items()))
    if _COST_CURRENCY in totals.cost:
        sums["gen_ai.usage.cost"] = sums["llm.cost.total"] = float(totals.cost[_COST_CURRENCY])
    return sums
