"""LlamaIndex's `get_polar_cost_callback`: the same figures as `raw` and as a real ledger, however a call is made."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import instrument_tags
from pydantic import BaseModel

from llama_index_polar import CallCosts, PolarLLM, get_polar_cost_callback
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from polar_sdk import ListSink, PolarModel

billing: Any = pytest.importorskip("polar_billing")
HELLO = [ChatMessage("Hello")]


class Person(BaseModel):
    """Somebody."""

    name: str


@pytest.fixture
def metered() -> PolarModel:
    return tiny_model(ledger="auto", context_window=2048)


def _stored() -> list[Any]:
    with billing.Ledger() as ledger:
        return list(ledger.read(billing.Selection(billing.ALL_TENANTS)))


async def test_block_raw_and_ledger_agree_to_the_last_unit(metered: PolarModel) -> None:
    llm = PolarLLM(engine=metered, max_tokens=5, tenant="acme")
    raws: list[Any] = []
    with get_polar_cost_callback() as costs:
        raws.append(llm.complete("Hello").raw)
        raws.append(llm.chat(HELLO, compute="economy", usage_tags={"team": "search"}).raw)
        raws.append(list(llm.stream_complete("Hello", program="0-5"))[-1].raw)
        raws.append(list(llm.stream_chat(HELLO))[-1].raw)
        with instrument_tags({"tenant": "globex", "app": "shop"}):
            raws.append((await llm.acomplete("Hello")).raw)
            raws.append((await llm.achat(HELLO)).raw)
        raws.append([one async for one in await llm.astream_complete("Hello")][-1].raw)
        raws.append([one async for one in await llm.astream_chat(HELLO, compute="exact")][-1].raw)
    llm.complete("after the block")
    stored = _stored()[:-1]
    assert len(costs.calls) == len(stored) == len(raws) == 8
    for call, usage, raw in zip(costs.calls, stored, raws, strict=True):
        record = usage.record
        assert call.request_id == record.request_id == raw["polar"]["request_id"]
        assert call.cost == usage.cost == Decimal(raw["cost_details"]["amount"])
        assert usage.cost
        assert raw["cost"] == float(usage.cost)
        assert (call.flops, call.identity_flops) == (record.flops.total, record.identity_flops)
        assert (call.input_tokens, call.output_tokens) == (record.tokens.input, record.tokens.output)
        assert (call.tenant, call.tags, call.tier, call.model) == (
            record.tenant,
            record.tags,
            record.tier,
            record.model,
        )
    assert costs.total.cost == {"USD": sum(usage.cost for usage in stored)}
    assert costs.total.compute_units == Decimal(sum(usage.record.flops.total for usage in stored)) / 10**12
    tiers = {tier: sums.requests for tier, sums in costs.by_tier.items()}
    assert tiers == {"standard": 5, "economy": 1, "by hand": 1, "exact": 1}
    assert costs.by_tenant["globex"].requests == costs.by_tag["app=shop"].requests == 2
    assert costs.by_tag["team=search"].output_tokens == 5
    assert list(costs.by_model) == [metered.name]


async def test_calls_deep_in_engines_threads_and_programs_count_once_each(metered: PolarModel) -> None:
    llm = PolarLLM(engine=metered, max_tokens=60)
    prompt = PromptTemplate("Who is {name}?")
    with get_polar_cost_callback() as costs:
        llm.predict(prompt, name="Anna")
        llm.structured_predict(Person, prompt, name="Anna")
        llm.as_structured_llm(Person).complete("Who?")
        _ = [one async for one in await llm.astream_structured_predict(Person, prompt, name="Anna")]
        engine = SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults(llm=llm))
        for _ in engine.stream_chat("Hello").response_gen:  # a thread of LlamaIndex reads the stream
            pass
        await asyncio.gather(*(llm.acomplete(f"Hello {index}") for index in range(3)))
    stored = _stored()
    assert {call.request_id for call in costs.calls} == {usage.record.request_id for usage in stored}
    assert len(costs.calls) == len(stored) == 8
    assert costs.total.cost == {"USD": sum(usage.cost for usage in stored)}


async def test_blocks_count_their_own_context_and_what_is_inside_them(priced: PolarModel) -> None:
    llm = PolarLLM(engine=priced, max_tokens=2)

    async def block(count: int) -> CallCosts:
        with get_polar_cost_callback() as costs:
            for _ in range(count):
                await llm.acomplete("Hello")
        return costs

    with get_polar_cost_callback() as around:
        one, two = await asyncio.gather(block(1), block(2))
    assert (one.total.requests, two.total.requests, around.total.requests) == (1, 2, 3)
    assert around.total.cost == {"EUR": Decimal("0.006")}
    listeners = [one for one in get_dispatcher().event_handlers if one.class_name() == "PolarCostListener"]
    assert len(listeners) == 1


def test_what_has_no_bill_is_passed_over(engine: PolarModel) -> None:
    class Other(MockLLM):
        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
            return CompletionResponse(text="hi", raw={"usage": {"prompt_tokens": 1}})

    with get_polar_cost_callback() as costs:
        MockLLM(max_tokens=1).complete("x")
        Other(max_tokens=1).complete("x")
        PolarLLM(engine=engine, max_tokens=1).complete("Hello")
    assert (costs.total.requests, costs.total.unrated, costs.total.cost) == (1, 1, {})


def test_a_stream_that_is_left_is_in_the_ledger_alone(priced: PolarModel, priced_sink: ListSink) -> None:
    with get_polar_cost_callback() as costs:
        stream = PolarLLM(engine=priced, max_tokens=50).stream_complete("Hello")
        next(stream)
        stream.close()
    assert costs.calls == []
    assert [record.outcome for record in priced_sink.records] == ["cancelled"]
