"""Traces of a LangChain call: who asked, on the usage record, also through LangGraph; its cost, on the message."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import get_usage_metadata_callback
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver

from langchain_polar import ChatPolar, PolarLLM
from polar_sdk import ListSink
from polar_sdk.errors import TagError
from polar_sdk.testing import scripted_model, tiny_model

if TYPE_CHECKING:
    from polar_sdk import PolarModel

BOTH = pytest.mark.parametrize("kind", [PolarLLM, ChatPolar])
RUN = UUID("01890a5d-ac96-774b-bcce-b302099a8057")


@BOTH
def test_a_tenant_is_refused_and_a_label_left_out_if_it_cannot_be_a_name(
    kind: Any, engine: PolarModel, sink: ListSink
) -> None:
    model = kind(engine=engine, max_tokens=1, cache=InMemoryCache())
    labels: dict[Any, str] = {"team": "a\x1b[2J", "\u202eteam": "b", "app": "shop", "k" * 201: "c", 7: "d"}
    for _ in ("computed", "cached"):
        for tenant in (" acme", "acme\u00a0", "ac\u200bme", " ", "x" * 201, ["acme"]):
            with pytest.raises(TagError, match="tenant"):
                model.invoke("Hello", config={"metadata": {"tenant": tenant}})
            assert not sink.records
        model.invoke("Hello", config={"metadata": {"tenant": "acme", **labels}, "tags": ["nightly", "a\nb"]})
        (record,) = sink.records
        assert record.tags == {"app": "shop", "langchain_tags": "nightly"}
        sink.records.clear()


@BOTH
def test_call_wins_over_config_and_config_over_object(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine, max_tokens=1, tenant="object", usage_tags={"a": "object", "b": "object"})
    config = {"metadata": {"tenant": "config", "b": "config", "c": "config"}}
    model.invoke("Hello")
    model.invoke("Hello", config=config)
    model.invoke("Hello", config=config, tenant="call", usage_tags={"c": "call"})
    list(model.stream("Hello", config=config, tenant="call", usage_tags={"c": "call"}))
    assert [record.tenant for record in sink.records] == ["object", "config", "call", "call"]
    assert sink.records[2].tags == sink.records[3].tags == {"a": "object", "b": "config", "c": "call"}


@BOTH
def test_the_tenant_and_tags_of_an_engine_stand_where_nothing_else_is_named(kind: Any) -> None:
    sink = ListSink()
    engine = tiny_model(sink=sink, tenant="house", tags={"app": "shop"})
    kind(engine=engine, max_tokens=1).invoke("Hello")
    assert (sink.records[0].tenant, sink.records[0].tags) == ("house", {"app": "shop"})


def test_a_message_says_what_it_cost(priced: PolarModel, priced_sink: ListSink) -> None:
    message = ChatPolar(engine=priced, max_tokens=4, compute="economy").invoke("Hello")
    (record,) = priced_sink.records
    assert message.usage_metadata == {
        "input_tokens": record.tokens.input,
        "output_tokens": 4,
        "total_tokens": record.tokens.input + 4,
    }
    about = message.response_metadata
    assert about["model_name"] == record.model
    assert about["finish_reason"] == "length"
    assert about["cost"] == 0.004
    assert about["cost_details"] == {"amount": "0.004", "currency": "EUR", "price_book": "t1"}
    assert about["polar"]["program"] == record.program == "0 3-5"
    assert about["polar"]["tier"] == "economy"
    assert about["polar"]["visits"] == record.visits.total
    assert about["polar"]["flops"] == record.flops.total < about["polar"]["identity_flops"]
    json.dumps(about)


def test_without_a_price_the_cost_is_unknown_and_not_zero(engine: PolarModel) -> None:
    about = ChatPolar(engine=engine, max_tokens=1).invoke("Hello").response_metadata
    assert about["cost"] is None
    assert about["cost_details"]["amount"] is None


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_stream_has_usage_and_cost_on_one_chunk(priced: PolarModel, way: str) -> None:
    chat = ChatPolar(engine=priced, max_tokens=5)
    chunks = list(chat.stream("Hello")) if way == "sync" else [chunk async for chunk in chat.astream("Hello")]
    with_usage = [chunk for chunk in chunks if chunk.usage_metadata]
    with_cost = [chunk for chunk in chunks if "cost" in chunk.response_metadata]
    assert len(with_usage) == len(with_cost) == 1
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    again = chat.invoke("Hello")
    assert whole.content == again.content
    assert whole.usage_metadata == again.usage_metadata
    assert whole.response_metadata["model_name"] == again.response_metadata["model_name"]
    assert whole.response_metadata["polar"]["flops"] == again.response_metadata["polar"]["flops"]
    assert whole.id
    assert whole.chunk_position == "last"


def _integers(value: Any) -> bool:
    return all(_integers(one) if isinstance(one, dict) else type(one) is int for one in value.values())


async def test_usage_metadata_holds_integers_and_langchains_own_callback_counts(priced: PolarModel) -> None:
    chat = ChatPolar(engine=priced, max_tokens=3)
    with get_usage_metadata_callback() as usage:
        message = chat.invoke("Hello")
        list(chat.stream("Hello"))
        await chat.ainvoke("Hello")
        await chat.abatch(["Hello", "Hello"])
    assert _integers(message.usage_metadata)
    counted = usage.usage_metadata[message.response_metadata["model_name"]]
    assert counted["output_tokens"] == 15
    assert message.usage_metadata is not None
    assert counted["input_tokens"] == 5 * message.usage_metadata["input_tokens"]


def test_a_batch_of_a_chat_model_answers_each_in_place(engine: PolarModel, sink: ListSink) -> None:
    chat = ChatPolar(engine=engine, max_tokens=4)
    assert [one.content for one in chat.batch(["a", "b", "c"])] == [chat.invoke(one).content for one in ("a", "b", "c")]
    assert len({record.request_id for record in sink.records}) == 6


def test_streaming_true_gives_invoke_the_same_message(engine: PolarModel) -> None:
    streamed = ChatPolar(engine=engine, max_tokens=4, streaming=True).invoke("Hello")
    plain = ChatPolar(engine=engine, max_tokens=4).invoke("Hello")
    assert type(streamed) is AIMessage
    assert not isinstance(streamed, AIMessageChunk)
    assert streamed.content == plain.content
    assert streamed.usage_metadata == plain.usage_metadata


WAYS = pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "batch", "abatch"])


async def _ask(model: Any, way: str, config: Any) -> None:
    answer = getattr(model, way)(["Hello"] if way.endswith("batch") else "Hello", config)
    if way in ("ainvoke", "abatch"):
        await answer
    elif way == "stream":
        list(answer)
    elif way == "astream":
        _ = [piece async for piece in answer]


@BOTH
@WAYS
async def test_a_config_is_on_the_record(kind: Any, engine: PolarModel, sink: ListSink, way: str) -> None:
    config: Any = {
        "metadata": {"tenant": "acme", "team": "search", "depth": 3, "huge": "x" * 300, "ls_x": "y", "obj": {}},
        "tags": ["nightly", "seq:step:1"],
        "run_id": RUN,
        "configurable": {"thread_id": "t-7"},
    }
    await _ask(kind(engine=engine, max_tokens=1, usage_tags={"app": "shop", "team": "none"}), way, config)
    (record,) = sink.records
    assert (record.tenant, record.request_id) == ("acme", str(RUN))
    tags = {"app": "shop", "team": "search", "depth": "3", "langchain_tags": "nightly", "thread_id": "t-7"}
    assert record.tags == tags
    assert config["configurable"] == {"thread_id": "t-7"}, "the caller's config was changed"


@BOTH
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_a_config_is_on_the_record_where_invoke_streams(
    kind: Any, engine: PolarModel, sink: ListSink, way: str
) -> None:
    config: Any = {"metadata": {"tenant": "acme", "team": "search"}, "tags": ["nightly"], "run_id": RUN}
    await _ask(kind(engine=engine, max_tokens=2, streaming=True), way, config)
    (record,) = sink.records
    assert (record.tenant, record.request_id) == ("acme", str(RUN))
    assert record.tags == {"team": "search", "langchain_tags": "nightly"}


async def test_whoever_looks_on_changes_nothing_of_who_is_billed(sink: ListSink) -> None:
    chat = ChatPolar(engine=scripted_model(lambda _: "Sunny.", context_window=1024, sink=sink), max_tokens=20)

    def ask(text: str, config: Any) -> Any:
        return chat.invoke(text, config)

    config: Any = {"metadata": {"tenant": "acme", "team": "search"}}
    _ = [event async for event in RunnableLambda(ask).astream_events("Hello", config, version="v2")]
    agent: Any = create_agent(chat, [])
    list(agent.stream({"messages": [HumanMessage("Hello")]}, config, stream_mode="messages"))
    assert [(record.tenant, record.tags["team"]) for record in sink.records] == [("acme", "search")] * 2


@BOTH
@pytest.mark.parametrize("way", ["invoke", "astream"])
async def test_a_thread_of_a_chain_is_on_the_record(kind: Any, engine: PolarModel, sink: ListSink, way: str) -> None:
    chain = RunnableLambda(str) | kind(engine=engine, max_tokens=1) | StrOutputParser()
    await _ask(chain, way, {"configurable": {"thread_id": UUID(int=7)}, "metadata": {"tenant": "acme"}})
    (record,) = sink.records
    assert (record.tenant, record.tags["thread_id"]) == ("acme", str(UUID(int=7)))


@BOTH
def test_threads_of_a_batch_stay_apart_and_metadata_wins(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine, max_tokens=1)
    model.batch(["a", "b"], [{"configurable": {"thread_id": name}} for name in ("one", "two")])
    assert sorted(record.tags["thread_id"] for record in sink.records) == ["one", "two"]
    model.invoke("a", {"configurable": {"thread_id": "one"}, "metadata": {"thread_id": "mine"}})
    assert sink.records[-1].tags["thread_id"] == "mine"
    model.invoke("a")
    assert sink.records[-1].tags == {}
    assert model.batch([]) == []


@BOTH
async def test_a_batch_in_parts_keeps_each_run(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine, max_tokens=1)
    configs: Any = [{"run_id": UUID(int=RUN.int + place), "max_concurrency": 2} for place in range(6)]
    model.batch(["a", "b", "c"], configs[:3])
    await model.abatch(["a", "b", "c"], configs[3:])
    assert sorted(record.request_id for record in sink.records) == [str(config["run_id"]) for config in configs]


async def test_the_thread_of_a_graph_is_on_the_record(sink: ListSink) -> None:
    engine = scripted_model(lambda _: "Sunny.", context_window=1024, sink=sink)
    agent: Any = create_agent(ChatPolar(engine=engine, max_tokens=20), [], checkpointer=InMemorySaver())
    ask = {"messages": [HumanMessage("Weather?")]}
    config: Any = {"configurable": {"thread_id": "t-7"}, "metadata": {"tenant": "acme"}}
    agent.invoke(ask, config)
    await agent.ainvoke(ask, config)
    assert [(record.tenant, record.tags["thread_id"]) for record in sink.records] == [("acme", "t-7")] * 2
    assert sink.records[1].tokens.input > sink.records[0].tokens.input, "the thread was not continued"
