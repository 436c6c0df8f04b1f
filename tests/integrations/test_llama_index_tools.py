"""Tools, agents and structured output through LlamaIndex's `PolarLLM`."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel

from llama_index_polar import PolarLLM
from polar_sdk import ListSink
from polar_sdk.errors import IncompleteAnswerError, InvalidRequestError
from polar_sdk.frameworks.tools import call_text
from polar_sdk.testing import scripted_model, tiny_model


def weather(city: str, days: int = 1) -> str:
    """Tell the weather."""
    return f"sunny for {days} days in {city}"


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


WEATHER = FunctionTool.from_defaults(weather)
CALL = call_text("weather", {"city": "Köln", "days": 3})
HELLO = [ChatMessage("Hello")]


def _llm(reply: str, **options: Any) -> PolarLLM:
    return PolarLLM(engine=scripted_model(lambda _: reply, context_window=2048), max_tokens=150, **options)


async def test_calls_come_whole_and_in_pieces() -> None:
    llm = _llm(CALL)
    whole = llm.chat_with_tools([WEATHER], "Weather?")
    pieces = list(llm.stream_chat_with_tools([WEATHER], "Weather?"))
    later = await llm.achat_with_tools([WEATHER], "Weather?")
    for response in (whole, pieces[-1], later):
        (call,) = llm.get_tool_calls_from_response(response)
        assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Köln", "days": 3})
    blocks: list[Any] = [response.message.blocks[-1] for response in pieces if _has_call(response)]
    assert len({block.tool_call_id for block in blocks}) == 1
    assert str(llm.predict_and_call([WEATHER], "Weather?")) == "sunny for 3 days in Köln"


def _has_call(response: Any) -> bool:
    return any(isinstance(block, ToolCallBlock) for block in response.message.blocks)


def test_a_required_call_is_valid_on_any_weights() -> None:
    llm = PolarLLM(engine=tiny_model(context_window=2048), max_tokens=120, temperature=2.0)
    for seed in range(3):
        response = llm.chat_with_tools([WEATHER], "Hello", tool_required=True, seed=seed)
        (call,) = llm.get_tool_calls_from_response(response)
        assert WEATHER.call(**call.tool_kwargs).is_error is False


def test_text_is_no_call() -> None:
    llm = _llm("Sunny.")
    response = llm.chat_with_tools([WEATHER], "Weather?")
    assert response.message.content == "Sunny."
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="Sunny"):
        llm.get_tool_calls_from_response(response)


def test_a_call_that_was_cut_off_is_an_error() -> None:
    with pytest.raises(IncompleteAnswerError, match="weather"):
        _llm(CALL).chat_with_tools([WEATHER], "?", tool_required=True, max_tokens=50, fit_max_tokens=False)


async def test_structured_prediction_is_of_the_class_on_any_weights() -> None:
    sink = ListSink()
    llm = PolarLLM(engine=tiny_model(sink=sink, context_window=2048), max_tokens=120)
    prompt = PromptTemplate("Who is {name}?")
    one = llm.structured_predict(Person, prompt, name="Anna")
    two = await llm.astructured_predict(Person, prompt, name="Anna")
    assert len(sink.records) == 2
    last: Any = list(llm.stream_structured_predict(Person, prompt, name="Anna"))[-1]
    assert isinstance(one, Person)
    assert one == two == Person.model_validate(last.model_dump())
    assert Person.model_validate_json(llm.as_structured_llm(Person).complete("Who?").text)


def test_a_response_format_is_enforced() -> None:
    llm = PolarLLM(engine=tiny_model(context_window=2048), max_tokens=90)
    answer = llm.chat(HELLO, response_format=Person.model_json_schema())
    assert Person.model_validate_json(answer.message.content or "")
    assert answer.raw["complete"] is True
    assert llm.complete("?", choice=["yes", "no"]).text in {"yes", "no"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's workflows
async def test_an_agent_calls_tools_until_it_has_an_answer() -> None:
    def reply(prompt: Any) -> str:
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return "It is sunny." if last.startswith("Result of") else CALL

    sink = ListSink()
    engine = scripted_model(reply, context_window=2048, sink=sink)
    agent = FunctionAgent(tools=[WEATHER], llm=PolarLLM(engine=engine, max_tokens=120, tenant="acme"))
    answer = await agent.run("Weather in Köln?")
    assert str(answer) == "It is sunny."
    assert [record.tenant for record in sink.records] == ["acme", "acme"]


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'weather'"):
        _llm("").chat_with_tools([WEATHER], "?", tool_choice="wether")
