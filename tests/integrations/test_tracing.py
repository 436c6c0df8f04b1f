"""Answers in traces: attributes of OpenTelemetry's current span, and LangSmith's costs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.prompts import ChatPromptTemplate
from langsmith import Client
from llama_index.core.llms import ChatMessage
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import llama_index_polar
from langchain_polar import ChatPolar, PolarLLM, PolarTracer
from polar_sdk.errors import MissingExtraError
from polar_sdk.testing import tiny_model
from tests.integrations.conftest import PricedSink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Tracer

    from polar_sdk import ListSink, PolarModel

HELLO = [ChatMessage("Hello")]
LANGCHAIN = ("invoke", "stream", "batch", "ainvoke", "astream", "abatch")
LLAMA_INDEX = ("complete", "stream_complete", "chat", "stream_chat", "acomplete", "astream_complete", "achat")


@pytest.fixture
def dollars() -> ListSink:
    return PricedSink("USD")


@pytest.fixture
def engine(dollars: ListSink) -> PolarModel:
    return tiny_model(sink=dollars)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("test")


def _attributes(exporter: InMemorySpanExporter) -> dict[str, Any]:
    (span,) = exporter.get_finished_spans()
    return dict(span.attributes or {})


async def _ask(model: Any, way: str) -> None:
    """Ask a model of either framework once."""
    question: Any = HELLO if way.endswith("chat") else ["Hello"] if way.endswith("batch") else "Hello"
    answer = getattr(model, way)(question)
    if way in ("ainvoke", "abatch", "acomplete", "achat", "astream_complete"):
        answer = await answer
    if way.startswith("stream"):
        list(answer)
    elif way.startswith("astream"):
        _ = [piece async for piece in answer]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((kind, way) for kind in (ChatPolar, PolarLLM) for way in LANGCHAIN),
        *((llama_index_polar.PolarLLM, way) for way in LLAMA_INDEX),
    ],
)
async def test_the_current_span_has_usage_and_cost(
    kind: Any, way: str, engine: PolarModel, dollars: ListSink, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    model = kind(engine=engine, max_tokens=3, tenant="acme", compute="economy", tracing=True)
    with tracer.start_as_current_span("request"):
        await _ask(model, way)
    (record,) = dollars.records
    assert _attributes(exporter) == {
        "gen_ai.provider.name": "polar",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": record.tokens.input,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cost": 0.003,
        "llm.model_name": record.model,
        "llm.token_count.prompt": record.tokens.input,
        "llm.token_count.completion": 3,
        "llm.token_count.total": record.tokens.input + 3,
        "llm.cost.total": 0.003,
        "polar.requests": 1,
        "polar.unrated": 0,
        "polar.request_id": record.request_id,
        "polar.tenant": "acme",
        "polar.tier": "economy",
        "polar.program": "0 3-5",
        "polar.outcome": "completed",
        "polar.flops": record.flops.total,
        "polar.identity_flops": record.identity_flops,
        "polar.compute_units": record.compute_units,
        "polar.cost": "0.003 USD",
    }


def test_a_span_around_several_answers_has_their_sums_and_an_event_each(
    engine: PolarModel, dollars: ListSink, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    chat = ChatPolar(engine=engine, max_tokens=2, tracing=True)
    llama = llama_index_polar.PolarLLM(engine=engine, max_tokens=3, tracing=True)
    with tracer.start_as_current_span("request"):
        chat.invoke("Hello")
        llama.complete("Hello", program="0-5")
    found = _attributes(exporter)
    assert found["polar.requests"] == 2
    assert found["polar.flops"] == sum(record.flops.total for record in dollars.records)
    assert (found["llm.cost.total"], found["polar.cost"]) == (0.005, "0.005 USD")
    assert (found["polar.tier"], found["polar.request_id"]) == ("by hand", dollars.records[1].request_id)
    (span,) = exporter.get_finished_spans()
    events = [dict(event.attributes or {}) for event in span.events if event.name == "polar.answer"]
    assert [event["polar.request_id"] for event in events] == [record.request_id for record in dollars.records]
    assert [event["gen_ai.usage.output_tokens"] for event in events] == [2, 3]
    assert [event["llm.cost.total"] for event in events] == [0.002, 0.003]


def test_a_cost_that_is_not_in_dollars_has_its_currency_beside_it(
    priced: PolarModel, sink: ListSink, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    with tracer.start_as_current_span("request"):
        ChatPolar(engine=priced, max_tokens=2, tracing=True).invoke("Hello")
    found = _attributes(exporter)
    assert found["polar.cost"] == "0.002 EUR"
    assert not {"llm.cost.total", "gen_ai.usage.cost"} & set(found)
    exporter.clear()
    with tracer.start_as_current_span("request"):
        ChatPolar(engine=priced, max_tokens=2, tracing=True).invoke("Hello")
        ChatPolar(engine=tiny_model(sink=sink), max_tokens=2, tracing=True).invoke("Hello")
    found = _attributes(exporter)
    assert (found["polar.cost"], found["polar.requests"], found["polar.unrated"]) == ("0.002 EUR", 2, 1)


def test_an_answer_from_a_cache_cost_nothing(
    engine: PolarModel, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    chat = ChatPolar(engine=engine, max_tokens=2, cache=InMemoryCache(), tracing=True)
    chat.invoke("Hello")
    with tracer.start_as_current_span("request"):
        chat.invoke("Hello")
    found = _attributes(exporter)
    assert (found["polar.outcome"], found["polar.flops"], found["llm.cost.total"]) == ("cached", 0, 0.0)


def test_a_stream_of_llama_index_belongs_to_the_span_in_which_it_was_made(
    engine: PolarModel, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    llm = llama_index_polar.PolarLLM(engine=engine, max_tokens=2, tracing=True)
    span = tracer.start_span("call")
    with trace.use_span(span):
        stream = llm.stream_complete("Hello")
    list(stream)
    span.end()
    assert _attributes(exporter)["polar.requests"] == 1


@pytest.mark.parametrize("kind", [ChatPolar, PolarLLM, llama_index_polar.PolarLLM])
def test_tracing_is_off_unless_asked_for(
    kind: Any, engine: PolarModel, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    way = "complete" if kind is llama_index_polar.PolarLLM else "invoke"
    with tracer.start_as_current_span("request"):
        getattr(kind(engine=engine, max_tokens=1), way)("Hello")
    assert _attributes(exporter) == {}
    getattr(kind(engine=engine, max_tokens=1, tracing=True), way)("Hello")  # no span records: nothing happens


def test_what_is_off_imports_nothing() -> None:
    code = (
        "import sys; from polar_sdk.frameworks.telemetry import CallSpan; CallSpan(False); "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_opentelemetry_the_fix_is_named(
    engine: PolarModel, dollars: ListSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(MissingExtraError, match=r"polar-llm\[tracing\]"):
        ChatPolar(engine=engine, tracing=True).invoke("Hello")
    assert dollars.records == []


# --- LangSmith. ---


@pytest.fixture
def langsmith() -> Iterator[tuple[Client, list[Any]]]:
    """A client of a server on this machine, and the runs that arrived there."""
    arrived: list[Any] = []

    class Server(BaseHTTPRequestHandler):
        def _take(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            arrived.append(json.loads(body))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_PATCH = _take  # noqa: N815  (the standard library's names)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = Client(f"http://127.0.0.1:{server.server_port}", api_key="none", auto_batch_tracing=False)
    yield client, arrived
    client.session.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_langsmith_gets_the_cost_of_a_chat_and_the_message_keeps_integers(
    engine: PolarModel, langsmith: Any, way: str
) -> None:
    client, arrived = langsmith
    chat = ChatPolar(engine=engine, max_tokens=3)
    chain = ChatPromptTemplate.from_template("{x}") | chat
    config: Any = {"callbacks": [PolarTracer(client=client)]}
    if way == "invoke":
        message = chain.invoke({"x": "Hello"}, config)
        assert message.usage_metadata is not None
        assert "total_cost" not in message.usage_metadata
    else:
        list(chain.stream({"x": "Hello"}, config))
    (sent,) = [run for run in arrived if (run.get("outputs") or {}).get("generations")]
    usage = sent["outputs"]["generations"][0][0]["message"]["kwargs"]["usage_metadata"]
    assert (usage["output_tokens"], usage["total_cost"]) == (3, 0.003)
    assert sent["extra"]["metadata"]["usage_metadata"] == usage
    assert sent["extra"]["metadata"]["ls_provider"] == "polar"


def test_langsmith_gets_tokens_and_cost_of_a_completion(engine: PolarModel, langsmith: Any) -> None:
    client, arrived = langsmith
    PolarLLM(engine=engine, max_tokens=3).batch(["a", "b"], {"callbacks": [PolarTracer(client=client)]})
    sent = [run for run in arrived if (run.get("outputs") or {}).get("generations")]
    assert [run["extra"]["metadata"]["usage_metadata"]["total_cost"] for run in sent] == [0.003] * 2
    assert [run["extra"]["metadata"]["usage_metadata"]["output_tokens"] for run in sent] == [3, 3]


def test_langsmith_gets_no_euros_for_dollars(priced: PolarModel, langsmith: Any) -> None:
    client, arrived = langsmith
    ChatPolar(engine=priced, max_tokens=3).invoke("Hello", {"callbacks": [PolarTracer(client=client)]})
    (sent,) = [run for run in arrived if (run.get("outputs") or {}).get("generations")]
    assert "total_cost" not in sent["extra"]["metadata"]["usage_metadata"]
