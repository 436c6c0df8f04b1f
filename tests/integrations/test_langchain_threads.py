"""Run id, thread id and tags of a config reach the usage record, also through LangGraph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langgraph.checkpoint.memory import InMemorySaver

from langchain_polar import ChatPolar, PolarLLM
from polar_sdk.testing import scripted_model

if TYPE_CHECKING:
    from polar_sdk import ListSink, PolarModel

BOTH = pytest.mark.parametrize("kind", [PolarLLM, ChatPolar])
WAYS = pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "batch", "abatch"])
RUN = UUID("01890a5d-ac96-774b-bcce-b302099a8057")


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
async def test_run_thread_and_tags_are_on_the_record(kind: Any, engine: PolarModel, sink: ListSink, way: str) -> None:
    config = {"run_id": RUN, "configurable": {"thread_id": "t-7", "model": "other"}, "tags": ["nightly"]}
    await _ask(kind(engine=engine, max_tokens=1), way, config)
    (record,) = sink.records
    assert record.request_id == str(RUN)
    assert (record.tags["thread_id"], record.tags["langchain_tags"]) == ("t-7", "nightly")
    assert config["configurable"] == {"thread_id": "t-7", "model": "other"}, "the caller's config was changed"


@BOTH
@WAYS
async def test_a_thread_of_a_chain_is_on_the_record(kind: Any, engine: PolarModel, sink: ListSink, way: str) -> None:
    chain = ChatPromptTemplate.from_template("{x}") | kind(engine=engine, max_tokens=1) | StrOutputParser()
    config: Any = {"configurable": {"thread_id": UUID(int=7)}, "metadata": {"tenant": "acme"}}
    question: Any = {"x": "Hello"}
    answer = getattr(chain, way)([question] if way.endswith("batch") else question, config)
    if way in ("ainvoke", "abatch"):
        await answer
    elif way == "stream":
        list(answer)
    elif way == "astream":
        _ = [piece async for piece in answer]
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


async def test_the_thread_of_a_graph_is_on_the_record(sink: ListSink) -> None:
    engine = scripted_model(lambda _: "Sunny.", context_window=1024, sink=sink)
    agent: Any = create_agent(ChatPolar(engine=engine, max_tokens=20), [], checkpointer=InMemorySaver())
    ask = {"messages": [HumanMessage("Weather?")]}
    config: Any = {"configurable": {"thread_id": "t-7"}, "metadata": {"tenant": "acme"}}
    agent.invoke(ask, config)
    await agent.ainvoke(ask, config)
    assert [(record.tenant, record.tags["thread_id"]) for record in sink.records] == [("acme", "t-7")] * 2
    assert sink.records[1].tokens.input > sink.records[0].tokens.input, "the thread was not continued"
