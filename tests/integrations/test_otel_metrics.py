"""OpenTelemetry metrics: what the sink that stores has stored, in the names of the conventions."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from polar_sdk import ListSink
from polar_sdk.errors import SinkError
from polar_sdk.frameworks.telemetry import MetricsSink
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from polar_sdk import UsageRecord


class _PricedSink(ListSink):
    """Prices what has a tier."""

    def emit(self, record: UsageRecord) -> Any:
        super().emit(record)
        cost = None if record.tier is None else f"0.00{record.tokens.output}"
        return {"cost": cost, "currency": "EUR"}


class _FullSink(ListSink):
    def emit(self, record: UsageRecord) -> Any:
        raise SinkError("the store is full.")


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    """The points of each metric."""
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {
        metric.name: list(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


def sink_of(inner: ListSink, reader: InMemoryMetricReader, **options: Any) -> MetricsSink:
    return MetricsSink(inner, MeterProvider([reader]), **options)


def test_what_was_stored_is_counted(reader: InMemoryMetricReader) -> None:
    stored = _PricedSink()
    model = tiny_model(sink=sink_of(stored, reader))
    model.generate("Hello there", max_tokens=5, compute="exact")
    model.generate("Hello", max_tokens=3, tenant="acme")
    found, records = points(reader), stored.records
    assert len(records) == 2
    tokens = {point.attributes["gen_ai.token.type"]: 0 for point in found["gen_ai.client.token.usage"]}
    for point in found["gen_ai.client.token.usage"]:
        assert point.attributes["gen_ai.provider.name"] == "polar"
        assert point.attributes["gen_ai.request.model"] == records[0].model
        tokens[point.attributes["gen_ai.token.type"]] += point.sum
    assert tokens == {
        "input": sum(record.tokens.input for record in records),
        "output": sum(record.tokens.output for record in records),
    }
    assert sum(point.value for point in found["polar.flops"]) == sum(record.flops.total for record in records)
    assert sum(point.value for point in found["polar.flops_saved"]) == sum(record.flops_saved for record in records)
    assert sum(point.count for point in found["gen_ai.server.request.duration"]) == 2
    assert sum(point.count for point in found["gen_ai.server.time_to_first_token"]) == 2
    assert {point.attributes["polar.tenant"] for point in found["polar.requests"]} == {"default", "acme"}
    priced = [record for record in records if record.tier is not None]
    unrated = sum(point.value for point in found.get("polar.unrated", []))
    assert unrated == len(records) - len(priced)
    for point in found.get("polar.cost", []):
        assert point.attributes["polar.currency"] == "EUR"


def test_an_error_names_its_class_and_a_cached_answer_has_no_time(reader: InMemoryMetricReader) -> None:
    stored = ListSink()
    model = tiny_model(sink=stored)
    model.generate("Hello", max_tokens=2)
    (record,) = stored.records
    sink = sink_of(ListSink(), reader, tenants=False)
    sink.emit(record.model_copy(update={"outcome": Outcome.ERROR, "error": "LogitsError"}))
    sink.emit(record.model_copy(update={"outcome": Outcome.CACHED}))
    found = points(reader)
    (duration,) = found["gen_ai.server.request.duration"]
    assert (duration.count, duration.attributes["error.type"]) == (1, "LogitsError")
    assert "polar.tenant" not in duration.attributes
    assert "gen_ai.server.time_to_first_token" not in found
    assert {point.attributes["polar.outcome"] for point in found["polar.requests"]} == {"error", "cached"}


def test_what_was_not_stored_is_not_counted(reader: InMemoryMetricReader) -> None:
    stored = ListSink()
    tiny_model(sink=stored).generate("Hello", max_tokens=2)
    with pytest.raises(SinkError):
        sink_of(_FullSink(), reader).emit(stored.records[0])
    assert points(reader) == {}


def test_without_opentelemetry_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from polar_sdk import ListSink\n"
        "from polar_sdk.frameworks.telemetry import MetricsSink\n"
        "try: MetricsSink(ListSink())\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "polar-llm[tracing]" in run.stdout
