"""Traces over HTTP: one span per call under the caller's, with usage and cost, and its context goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from polar_server.telemetry.traces import Telemetry
from tests.integrations.server.conftest import WAIT_S, chat_body
from tests.integrations.test_otel_metrics import points

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.trace import ReadableSpan

    from tests.integrations.server.conftest import RecordingSink, Served

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SECRET = "the harbour at dawn"


class Watched:
    """Providers whose spans and metrics stay here."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        spans = TracerProvider()
        spans.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = Telemetry(spans, MeterProvider([self.reader]))

    def wait_for(self, count: int) -> list[ReadableSpan]:
        """The spans that ended, when there are so many: a span ends just after its answer."""
        deadline = time.monotonic() + WAIT_S
        while len(spans := list(self.exporter.get_finished_spans())) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return spans


@pytest.fixture
def watched() -> Watched:
    return Watched()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_a_span_under_the_callers(
    serve: Callable[..., Served], watched: Watched, sink: RecordingSink, stream: bool
) -> None:
    served = serve(telemetry=watched.telemetry)
    body = chat_body(messages=[{"role": "user", "content": SECRET}], stream=stream, temperature=0.5)
    body["logit_bias"] = {"256": -100}  # sampled: the end of text would cut it short by chance
    assert served.call("POST", "/v1/chat/completions", body, {"traceparent": TRACEPARENT})[0] == 200
    (span,), (record,) = watched.wait_for(1), sink.records
    assert (span.name, span.kind) == ("chat tiny", SpanKind.SERVER)
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    found = attributes(span)
    assert found["gen_ai.operation.name"] == "chat"
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.temperature"]) == (8, 0.5)
    assert found["gen_ai.usage.output_tokens"] == record.tokens.output == 8
    assert (found["polar.flops"], found["polar.program"]) == (record.flops.total, record.program)
    assert found["polar.cost"] == f"0.{record.flops.total:012d} EUR"
    assert span.status.status_code is StatusCode.UNSET
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time >= record.prefill_ns + record.decode_ns
    assert SECRET not in span.to_json()


def test_choices_of_one_call_are_added_up(serve: Callable[..., Served], watched: Watched, sink: RecordingSink) -> None:
    serve(telemetry=watched.telemetry).chat(n=3)
    (span,) = watched.wait_for(1)
    assert attributes(span)["gen_ai.request.choice.count"] == 3
    assert attributes(span)["polar.flops"] == sum(record.flops.total for record in sink.wait_for(3))
    assert [event.name for event in span.events] == ["polar.answer"] * 3


def test_an_error_is_named_and_not_quoted(serve: Callable[..., Served], watched: Watched) -> None:
    served = serve(telemetry=watched.telemetry)
    status, _, _ = served.call(
        "POST", "/v1/chat/completions", chat_body(messages=[{"role": "user", "content": SECRET * 2000}])
    )
    assert status == 400
    (span,) = watched.wait_for(1)
    assert attributes(span)["error.type"] == "ContextWindowError"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert SECRET not in span.to_json()


def test_what_is_stored_is_counted(serve: Callable[..., Served], watched: Watched, sink: RecordingSink) -> None:
    serve(telemetry=watched.telemetry).chat()
    counted = points(watched.reader)
    assert [point.value for point in counted["polar.flops"]] == [sink.records[0].flops.total]


@pytest.mark.parametrize("is_watched", [False, True])
def test_the_context_goes_on_to_servers_behind(
    serve: Callable[..., Served], watched: Watched, is_watched: bool
) -> None:
    behind = Watched()
    upstream = serve(telemetry=behind.telemetry)
    front = serve(
        backends={"economy": [f"{upstream.url}#tiny:economy"]},
        **({"telemetry": watched.telemetry} if is_watched else {}),
    )
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
    assert front.call("POST", "/v1/chat/completions", chat_body(model="tiny:economy"), headers)[0] == 200
    (span,) = behind.wait_for(1)
    assert span.parent is not None
    above = watched.wait_for(1)[0].context.span_id if is_watched else int(PARENT, 16)
    assert (f"{span.context.trace_id:032x}", span.parent.span_id) == (TRACE, above)
    assert span.context.trace_state.get("vendor") == "1"


def test_a_context_that_is_none_does_no_harm(serve: Callable[..., Served]) -> None:
    front = serve(backends={"economy": [f"{serve().url}#tiny:economy"]})
    for parent in ("nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", TRACEPARENT):
        headers = {"traceparent": parent, "tracestate": "x" * 5_000}
        assert front.call("POST", "/v1/chat/completions", chat_body(model="tiny:economy"), headers)[0] == 200


def test_a_server_without_an_sdk_refuses_to_be_watched() -> None:
    command = [sys.executable, "-c", "from polar_sdk.cli.main import main; main()"]
    arguments = ["serve", "--otel", "--no-ledger", "--port", "0"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "opentelemetry-instrument polar serve --otel" in " ".join(done.stderr.split())
