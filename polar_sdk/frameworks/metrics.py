"""Usage as OpenTelemetry metrics: a sink around the one that stores, by the extra `tracing`.

Names and units are those of OpenTelemetry's GenAI conventions (`gen_ai.*`, in development), and our own (`polar.*`) for
what they lack. Where metrics go is the application's choice: a meter provider it hands in, or OpenTelemetry's global
one. Metrics are sums for dashboards; what is owed is in the ledger. Knows no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import MissingExtraError
from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT, ForwardingSink, Outcome

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

    from polar_sdk.usage import Receipt, UsageRecord, UsageSink


_PROVIDER: Final = "polar"
_NS: Final = 10**9
_TOKEN_BUCKETS: Final = tuple(4**power for power in range(14))
_DURATION_BUCKETS: Final = tuple(2**power / 100 for power in range(14))
_FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_NEXT_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


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
            raise MissingExtraError(
                "MetricsSink needs OpenTelemetry, which is not installed.", hint="pip install 'polar-llm[tracing]'"
            ) from error
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
