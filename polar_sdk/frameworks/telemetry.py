"""Usage and cost in OpenTelemetry, with the extra `tracing`: attributes of spans, and metrics.

Names and units are those of OpenTelemetry's GenAI conventions (`gen_ai.*`, in development), of OpenInference (`llm.*`)
and our own (`polar.*`) for what they lack. Nothing of OpenTelemetry is imported unless it is asked for. A span with
several answers, such as that of an HTTP request around an agent, has their sums, the names of the last, and one event
per answer. Metrics are sums for dashboards, and go to the application's meter provider; the exact amounts are in the
ledger. Knows no framework.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from polar_sdk.errors import MissingExtraError
from polar_sdk.frameworks.cost import CostTotals, PolarCall, cost_facts
from polar_sdk.locks import renewed_in_child
from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT, ForwardingSink, Outcome

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span

    from polar_sdk.usage import Receipt, UsageRecord, UsageSink


EVENT: Final = "polar.answer"
"""Name of the event that a span has per answer, with the attributes of that answer alone."""
_COST_CURRENCY: Final = "USD"
"""Currency of costs for OpenInference and Langfuse; a cost in another one is in `polar.cost` alone."""
_totals: Final[WeakKeyDictionary[Any, CostTotals]] = WeakKeyDictionary()
"""Sums of the answers that a span has seen."""
_adding: Final = renewed_in_child(threading.Lock())
_PROVIDER: Final = "polar"
_NS: Final = 10**9
_TOKEN_BUCKETS: Final = tuple(4**power for power in range(14))
_DURATION_BUCKETS: Final = tuple(2**power / 100 for power in range(14))
_FIRST_TOKEN_BUCKETS: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
_NEXT_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


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
        """Set what an answer used and cost; does nothing if no span records."""
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
        raise _missing("tracing=True") from error
    span = trace.get_current_span()
    return span if span.is_recording() else None


def _missing(what: str) -> MissingExtraError:
    hint = "pip install 'polar-llm[tracing]'"
    return MissingExtraError(f"{what} needs OpenTelemetry, which is not installed.", hint=hint)


def _names(record: UsageRecord) -> dict[str, Any]:
    """Attributes that cannot be added up."""
    return {
        "gen_ai.provider.name": _PROVIDER,
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


class MetricsSink(ForwardingSink):
    """Passes every call on to another sink, and counts each record that it stored.

    Args:
        inner: The sink that stores.
        provider: Where metrics go; None for OpenTelemetry's global meter provider.
        tenants: Whether metrics carry the tenant: one series per tenant, in every backend that keeps them.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """

    def __init__(self, inner: UsageSink, provider: MeterProvider | None = None, *, tenants: bool = True) -> None:
        try:
            from opentelemetry import metrics
        except ImportError as error:
            raise _missing("MetricsSink") from error
        super().__init__(inner)
        self._tenants = tenants
        meter = metrics.get_meter("polar_sdk", meter_provider=provider)

        def histogram(name: str, unit: str, what: str, buckets: tuple[float, ...]) -> Any:
            return meter.create_histogram(name, unit, what, explicit_bucket_boundaries_advisory=buckets)

        self._tokens = histogram("gen_ai.client.token.usage", "{token}", "Tokens of a request.", _TOKEN_BUCKETS)
        self._duration = histogram(
            "gen_ai.server.request.duration", "s", "From acceptance to the last token.", _DURATION_BUCKETS
        )
        self._first = histogram(
            "gen_ai.server.time_to_first_token", "s", "From acceptance to the end of the prompt.", _FIRST_TOKEN_BUCKETS
        )
        self._next = histogram(
            "gen_ai.server.time_per_output_token", "s", "Of the tokens after the first.", _NEXT_TOKEN_BUCKETS
        )
        self._requests = meter.create_counter("polar.requests", "{request}", "Requests, by how they ended.")
        self._flops = meter.create_counter("polar.flops", "{flop}", "Executed FLOPs.")
        self._units = meter.create_counter("polar.compute_units", "{CU}", "Executed compute units, 10^12 FLOPs each.")
        self._saved = meter.create_up_down_counter("polar.flops_saved", "{flop}", "Full depth less executed FLOPs.")
        self._cost = meter.create_counter("polar.cost", "{currency}", "What receipts say, by polar.currency.")
        self._unrated = meter.create_counter("polar.unrated", "{request}", "Requests without a price.")

    def emit(self, record: UsageRecord) -> Receipt | None:
        """Store a record, and count it once it is stored."""
        receipt = super().emit(record)
        self._count(record, receipt)
        return receipt

    def _count(self, record: UsageRecord, receipt: Receipt | None) -> None:
        shared = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": record.model,
            "gen_ai.response.model": record.model,
            "polar.tier": record.tier or "by hand",
            **({"polar.tenant": record.tenant} if self._tenants else {}),
        }
        for kind, tokens in (("input", record.tokens.input), ("output", record.tokens.output)):
            self._tokens.record(tokens, {**shared, "gen_ai.token.type": kind})
        self._time(record, shared)
        self._requests.add(1, {**shared, "polar.outcome": record.outcome.value})
        self._flops.add(record.flops.total, shared)
        self._units.add(record.flops.total / FLOPS_PER_COMPUTE_UNIT, shared)
        self._saved.add(record.flops_saved, shared)
        cost = None if receipt is None else receipt.get("cost")
        if receipt is not None and cost is not None:
            self._cost.add(float(cost), {**shared, "polar.currency": str(receipt.get("currency"))})
        else:
            self._unrated.add(1, shared)

    def _time(self, record: UsageRecord, shared: dict[str, str]) -> None:
        if record.outcome is Outcome.CACHED:  # nobody served it
            return
        failed = {"error.type": record.error or "_OTHER"} if record.outcome is Outcome.ERROR else {}
        prompt_ns = record.queue_ns + record.prefill_ns
        self._duration.record((prompt_ns + record.decode_ns) / _NS, {**shared, **failed})
        if record.outcome is Outcome.COMPLETED and record.tokens.output:
            self._first.record(prompt_ns / _NS, shared)
            if record.tokens.output > 1:
                self._next.record(record.decode_ns / _NS / (record.tokens.output - 1), shared)
