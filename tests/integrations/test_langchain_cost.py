"""`get_polar_cost_callback`: what it counts, and what it leaves alone."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from langchain_core.caches import InMemoryCache
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from langchain_polar import ChatPolar, PolarLLM, get_polar_cost_callback

if TYPE_CHECKING:
    from polar_sdk import ListSink, PolarModel


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
