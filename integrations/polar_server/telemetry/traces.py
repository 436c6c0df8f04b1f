"""Traces: a call's trace context is passed on to upstream servers and, on request, the call is traced by OpenTelemetry.

The span of a call is a child of the caller's, which its `traceparent` header names, and ends when every record of its
answer is stored. It has what the answer used and cost, but no text of prompt or answer. The application chooses the
exporters. OpenTelemetry is not imported unless it is needed.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import InvalidRequestError, MissingExtraError
from polar_sdk.frameworks.telemetry import MetricsSink, note_answer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    from polar_sdk.usage import UsageSink
    from polar_server.answers import Answer, Ask
    from polar_server.http.exchange import Exchange

_PARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
"""W3C Trace Context, `traceparent`."""
_MAX_STATE: Final = 512
"""Longest `tracestate` that W3C asks everybody to pass on. Unit: characters."""
_OPERATIONS: Final = {"/v1/completions": "text_completion"}
"""Names of calls in the GenAI conventions; any other call is `chat`."""
_ASKED: Final = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
}
_context: Final[ContextVar[Mapping[str, str]]] = ContextVar("polar_server_trace", default=MappingProxyType({}))


def trace_headers() -> Mapping[str, str]:
    """Headers for a server behind this one, which continue the trace of the call that is answered here."""
    return _context.get()


@dataclass(frozen=True)
class Telemetry:
    """Destination of spans and metrics.

    Attributes:
        spans: None = OpenTelemetry's global provider.
        metrics: Likewise.
    """

    spans: TracerProvider | None = None
    metrics: MeterProvider | None = None

    @classmethod
    def configured(cls) -> Telemetry:
        """The global providers, if somebody has configured them.

        Raises:
            MissingExtraError: OpenTelemetry is not installed.
            InvalidRequestError: Nobody has: every span and metric would be dropped.
        """
        trace, _ = _opentelemetry()
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            raise InvalidRequestError(
                "--otel: no OpenTelemetry SDK is configured, so spans and metrics would be lost. Start the "
                "server with `opentelemetry-instrument polar serve --otel`, with OTEL_EXPORTER_OTLP_ENDPOINT set."
            )
        return cls()

    def counted(self, sink: UsageSink) -> UsageSink:
        """The sink, with metrics of what it stores."""
        return MetricsSink(sink, self.metrics)


class Traces:
    """The traces that calls of a server belong to.

    Args:
        telemetry: Where spans go; None = there are none, and the caller's context is passed on as it is.

    Raises:
        MissingExtraError: Spans are wanted, and OpenTelemetry is not installed.
    """

    def __init__(self, telemetry: Telemetry | None) -> None:
        self._tracer: Tracer | None = None
        if telemetry is not None:
            self._trace, self._format = _opentelemetry()
            self._tracer = self._trace.get_tracer("polar_server", tracer_provider=telemetry.spans)

    @contextmanager
    def of_call(self, exchange: Exchange, model: str, asks: Sequence[Ask]) -> Iterator[CallTrace]:
        """The trace of a call whose answer begins in the block, and has it as its context."""
        if self._tracer is None:
            trace, headers = CallTrace(None), _passed_on(exchange.headers)
        else:
            span = self._begin(self._tracer, exchange, model, asks)
            trace, headers = CallTrace(span), {}
            self._format.inject(headers, self._trace.set_span_in_context(span))
        if "traceparent" in headers:
            exchange.facts["trace_id"] = headers["traceparent"].split("-")[1]
        token = _context.set(headers)
        try:
            yield trace
        except BaseException as error:
            trace.failed(error)
            raise
        finally:
            _context.reset(token)

    def _begin(self, tracer: Tracer, exchange: Exchange, model: str, asks: Sequence[Ask]) -> Span:
        """The span of a call, from its arrival on."""
        operation = _OPERATIONS.get(exchange.path, "chat")
        _, options = asks[0]
        asked: Mapping[str, Any] = {**options}
        facts: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "polar",
            "gen_ai.request.model": model,
            **{theirs: asked[name] for name, theirs in _ASKED.items() if asked.get(name) is not None},
        }
        if len(asks) > 1:
            facts["gen_ai.request.choice.count"] = len(asks)
        # A server that another instrumentation watches has a span already, which began under the caller's.
        current = self._trace.get_current_span().get_span_context().is_valid
        return tracer.start_span(
            f"{operation} {model}",
            context=None if current else self._format.extract(exchange.headers),
            kind=self._trace.SpanKind.INTERNAL if current else self._trace.SpanKind.SERVER,
            attributes=facts,
            start_time=time.time_ns() - int(exchange.elapsed_ms * 1e6),
        )


class CallTrace:
    """The span of a call, or nothing.

    Attributes:
        span: None if none is wanted.
    """

    def __init__(self, span: Span | None) -> None:
        self.span = span

    def ended(self, answer: Answer) -> None:
        """All choices have ended, and what they used is stored."""
        if self.span is None:
            return
        for choice in answer.choices:
            if choice.record is not None:
                note_answer(self.span, choice.record, choice.receipt)
        if answer.error is not None:
            self.failed(answer.error)
        else:
            self.span.end()

    def failed(self, error: BaseException) -> None:
        """It ended in an error, whose text may quote a prompt and stays here."""
        if self.span is not None:
            from opentelemetry.trace import Status, StatusCode

            self.span.set_attribute("error.type", type(error).__name__)
            self.span.set_status(Status(StatusCode.ERROR))
            self.span.end()


def _opentelemetry() -> tuple[Any, TraceContextTextMapPropagator]:
    """OpenTelemetry's traces, and W3C's format for their context.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        raise MissingExtraError(
            "spans and --otel need OpenTelemetry, which is not installed.", hint="pip install 'polar-llm[tracing]'"
        ) from error
    return trace, TraceContextTextMapPropagator()


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's trace context, if it has one that can be passed on."""
    parent, state = headers.get("traceparent", ""), headers.get("tracestate", "")
    if not _PARENT.fullmatch(parent):
        return {}
    passed = {"traceparent": parent}
    if state and len(state) <= _MAX_STATE and state.isascii() and state.isprintable():
        passed["tracestate"] = state
    return passed
