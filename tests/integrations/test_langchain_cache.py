"""LangChain's caches: a hit is recorded with no compute, and no two models share an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
from langchain_core.caches import InMemoryCache

from langchain_polar import ChatPolar, PolarLLM
from polar_sdk import ListSink
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from polar_sdk import PolarModel

BOTH = pytest.mark.parametrize("kind", [PolarLLM, ChatPolar])


@BOTH
@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_cache_hit_is_recorded_with_no_compute(
    kind: Any, priced: PolarModel, priced_sink: ListSink, way: str
) -> None:
    model = kind(engine=priced, max_tokens=3, cache=InMemoryCache(), compute="economy")

    async def ask(**options: Any) -> Any:
        config = {"metadata": {"tenant": "acme"}}
        if way == "sync":
            return model.invoke("Hello", config=config, **options)
        return await model.ainvoke("Hello", config=config, **options)

    first, second = await ask(), await ask(tenant="globex", usage_tags={"a": "b"})
    computed, hit = priced_sink.records
    assert computed.outcome is Outcome.COMPLETED
    assert (hit.outcome, hit.finish_reason, hit.program) == (Outcome.CACHED, "cached", "")
    assert hit.flops.total == hit.identity_flops == hit.tokens.input == hit.tokens.output == 0
    assert (hit.tenant, hit.tags, hit.tier) == ("globex", {"a": "b"}, "economy")
    assert hit.model_fingerprint == computed.model_fingerprint
    assert hit.request_id != computed.request_id
    if kind is ChatPolar:
        assert first.content == second.content
        assert second.response_metadata["cost"] == 0
        assert second.response_metadata["polar"]["flops"] == 0
        assert second.response_metadata["polar"]["outcome"] == "cached"
        assert first.response_metadata["polar"]["flops"] == computed.flops.total
    else:
        assert first == second


@BOTH
def test_a_cache_hit_is_charged_to_whom_the_request_would_have_been(kind: Any) -> None:
    sink = ListSink()
    engine = tiny_model(sink=sink, tenant="house", tags={"app": "shop"})
    model = kind(
        engine=engine, max_tokens=1, cache=InMemoryCache(), usage_tags={"team": "a"}, metadata={"b": 1}, tags=["x"]
    )
    model.invoke("Hello", config={"tags": ["y"]})
    model.invoke("Hello", config={"tags": ["y"]})
    assert [record.outcome for record in sink.records] == [Outcome.COMPLETED, Outcome.CACHED]
    assert {record.tenant for record in sink.records} == {"house"}
    tags = {"app": "shop", "team": "a", "b": "1", "langchain_tags": "y,x"}
    assert sink.records[0].tags == sink.records[1].tags == tags


@BOTH
def test_options_of_a_call_are_part_of_the_cache_key(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine, max_tokens=3, cache=InMemoryCache())
    for options in ({}, {"compute": "economy"}, {"max_tokens": 2}, {"temperature": 1.0, "seed": 1}):
        model.invoke("Hello", **cast("Any", options))
    assert [record.outcome for record in sink.records] == [Outcome.COMPLETED] * 4
    kind(engine=tiny_model(sink=sink, seed=1), max_tokens=3, cache=model.cache).invoke("Hello")
    assert sink.records[-1].outcome is Outcome.COMPLETED, "another model's answer came out of the cache"


async def test_a_batch_partly_from_the_cache_is_recorded_row_by_row(engine: PolarModel, sink: ListSink) -> None:
    llm = PolarLLM(engine=engine, max_tokens=3, cache=InMemoryCache())
    answers = llm.batch(["a", "b"])
    assert await llm.abatch(["b", "c", "a"]) == [answers[1], llm.invoke("c"), answers[0]]
    outcomes = [record.outcome for record in sink.records]
    assert outcomes == [Outcome.COMPLETED] * 3 + [Outcome.CACHED] * 3
