"""`get_polar_cost_callback` of LangChain, and its caches: a hit is recorded with no compute."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from langchain_polar import ChatPolar, PolarLLM, get_polar_cost_callback
from polar_sdk import ListSink
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from polar_sdk import PolarModel


async def test_the_cost_callback_adds_up_to_the_records(priced: PolarModel, priced_sink: ListSink) -> None:
    chat, llm = ChatPolar(engine=priced, max_tokens=3), PolarLLM(engine=priced, max_tokens=2)
    chain = ChatPromptTemplate.from_template("{x}") | chat | StrOutputParser()
    with get_polar_cost_callback() as costs:
        chain.invoke({"x": "Hello"}, config={"metadata": {"tenant": "acme", "team": "search"}})
        await chain.ainvoke({"x": "Hello"})
        list(chat.stream("Hello", compute="economy"))
        _ = [piece async for piece in chat.astream("Hello", compute="economy")]
        llm.batch(["a", "b"], tenant="globex")
        list(llm.stream("a", program="0-5"))
    chat.invoke("after the block")
    records = priced_sink.records[:-1]
    assert [call.request_id for call in costs.calls] == [record.request_id for record in records]
    assert costs.total.requests == 7
    assert costs.total.flops == sum(record.flops.total for record in records)
    assert costs.total.cost == {"EUR": Decimal("0.018")}
    assert costs.total.compute_units == Decimal(costs.total.flops) / 10**12
    assert costs.total.unrated == 0
    assert {tier: sums.requests for tier, sums in costs.by_tier.items()} == {
        "standard": 4,
        "economy": 2,
        "by hand": 1,
    }
    assert costs.by_tag["team=search"].cost == {"EUR": Decimal("0.003")}
    assert costs.by_tenant["globex"].output_tokens == 4
    assert list(costs.by_model) == [records[0].model]
    assert "0.018 EUR" in repr(costs)


def test_the_cost_callback_says_how_much_it_could_not_price(engine: PolarModel) -> None:
    with get_polar_cost_callback() as costs:
        ChatPolar(engine=engine, max_tokens=1).invoke("Hello")
    assert (costs.total.unrated, costs.total.cost) == (1, {})


def test_the_cost_callback_passes_over_other_models() -> None:
    with get_polar_cost_callback() as costs:
        FakeListChatModel(responses=["hi"]).invoke("x")
        FakeListLLM(responses=["hi"]).invoke("x")
    assert costs.calls == []
    assert costs.total.requests == 0


def test_the_cost_callback_counts_nothing_for_a_cached_message(priced: PolarModel) -> None:
    chat = ChatPolar(engine=priced, max_tokens=3, cache=InMemoryCache())
    chat.invoke("Hello")
    with get_polar_cost_callback() as costs:
        chat.invoke("Hello")
    total = costs.total
    assert (total.requests, total.flops, total.output_tokens) == (1, 0, 0)
    assert not total.cost["EUR"]


def test_blocks_may_be_nested_also_inside_a_chain(priced: PolarModel) -> None:
    chat = ChatPolar(engine=priced, max_tokens=1)
    inner_totals = []

    def step(text: str) -> str:
        with get_polar_cost_callback() as inner:  # the run below reports to both blocks
            answer = chat.invoke(text)
        inner_totals.append(inner.total.requests)
        return str(answer.text)

    with get_polar_cost_callback() as outer:
        with get_polar_cost_callback() as middle:
            chat.invoke("Hello")
        RunnableLambda(step).invoke("Hello")
    assert (middle.total.requests, inner_totals, outer.total.requests) == (1, [1], 2)
    assert outer.total.cost == {"EUR": Decimal("0.002")}


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
