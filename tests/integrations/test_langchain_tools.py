"""Tools and structured output of `ChatPolar`: what is bound, what the engine enforces, and what comes back."""

from __future__ import annotations

import asyncio
import threading
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core import exceptions as langchain
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

import langchain_polar
from langchain_polar import ChatPolar, PolarLLM
from polar_sdk import ListSink, NullSink
from polar_sdk.errors import IncompleteAnswerError, InvalidRequestError, PolarError
from polar_sdk.frameworks.call_reader import CallReader
from polar_sdk.frameworks.forms import AnswerForm
from polar_sdk.frameworks.tools import Tool, ToolUse, call_text, signature_of
from polar_sdk.testing import scripted_model, tiny_model
from tests.integrations.conftest import paths_of, replaced

if TYPE_CHECKING:
    from polar_sdk import PolarModel
    from polar_sdk.request.options import RequestOptions


@tool
def weather(city: str, days: int = 1) -> str:
    """Tell the weather."""
    return f"sunny for {days} days in {city}"


@tool
def now() -> str:
    """Tell the time."""
    return "12:00"


class Person(BaseModel):
    """Somebody."""

    name: str = Field(description="full name")
    age: int


class Point(TypedDict):
    x: int
    y: int


CALL = call_text("weather", {"city": "Köln", "days": 3})
BOTH_CALLS = CALL + "\n" + call_text("now", {})


def _chat(reply: str, **options: Any) -> ChatPolar:
    return ChatPolar(engine=scripted_model(lambda _: reply, context_window=2048), max_tokens=200, **options)


def _calls(message: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


async def test_calls_come_whole_and_in_pieces() -> None:
    chat = _chat(BOTH_CALLS).bind_tools([weather, now], parallel_tool_calls=True)
    wanted = [("weather", {"city": "Köln", "days": 3}), ("now", {})]
    message = chat.invoke("Weather and time?")
    assert (_calls(message), message.content) == (wanted, "")
    assert len({call["id"] for call in message.tool_calls}) == 2
    chunks = list(chat.stream("Weather and time?"))
    assert sum(len(chunk.tool_call_chunks) for chunk in chunks if isinstance(chunk, AIMessageChunk)) > 5
    whole: Any = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert _calls(whole) == wanted
    assert _calls(await chat.ainvoke("?")) == wanted
    assert [_calls(each) for each in chat.batch(["a", "b"])] == [wanted, wanted]


def test_the_model_may_answer_with_text() -> None:
    chat = _chat("It is {nice}.").bind_tools([weather])
    message = chat.invoke("Hi")
    assert (message.content, message.tool_calls) == ("It is {nice}.", [])
    assert "".join(chunk.text for chunk in chat.stream("Hi")) == message.text


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("any", {"weather", "now"}),
        ("now", {"now"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_a_choice_is_enforced_on_any_weights(choice: Any, names: set[str]) -> None:
    chat = ChatPolar(engine=tiny_model(context_window=2048), max_tokens=300, temperature=2.0)
    message = chat.bind_tools([weather, now], tool_choice=choice).invoke("Hello", seed=1)
    assert message.tool_calls
    assert {call["name"] for call in message.tool_calls} <= names
    for call in message.tool_calls:
        {"weather": weather, "now": now}[call["name"]].invoke(call["args"])


def test_a_call_is_required_in_three_spellings() -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    forms = [AnswerForm.of({"tools": tools, "tool_choice": choice}).use for choice in ("any", "required", True)]
    assert forms[0] == forms[1] == forms[2] != AnswerForm.of({"tools": tools}).use


@pytest.mark.parametrize("choice", ["none", False])
def test_no_tools_means_text(choice: Any) -> None:
    assert _chat(CALL).bind_tools([weather], tool_choice=choice).invoke("Hello").text == CALL


@pytest.mark.parametrize("parallel", [None, False])
def test_an_answer_is_one_call_unless_said_otherwise(parallel: bool | None) -> None:
    message = _chat(BOTH_CALLS).bind_tools([weather, now], parallel_tool_calls=parallel).invoke("?")
    assert [call["name"] for call in message.tool_calls] == ["weather"]


def test_an_unknown_choice_and_two_of_a_name_are_refused() -> None:
    chat = _chat("")
    with pytest.raises(langchain.ModelInvalidRequestError, match="'weather'"):
        chat.bind_tools([weather], tool_choice="wether")
    with pytest.raises(langchain.ModelInvalidRequestError, match="'now'"):
        chat.bind_tools([now, now]).invoke("Hello")


def test_a_tool_with_a_schema_that_cannot_be_followed_is_refused_before_compute() -> None:
    sink = ListSink()
    chat = ChatPolar(engine=tiny_model(sink=sink))
    odd = {"name": "odd", "description": "", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    with pytest.raises(langchain.ModelInvalidRequestError):
        chat.bind_tools([odd], tool_choice="any").invoke("Hello")
    assert sink.records == []


def test_the_prompt_shows_signatures_and_history() -> None:
    seen: list[Any] = []

    def reply(prompt: Any) -> str:
        seen.append(prompt)
        return "Done."

    chat = ChatPolar(engine=scripted_model(reply, context_window=2048)).bind_tools([weather])
    call: Any = {"name": "weather", "args": {"city": "Köln"}, "id": "1"}
    chat.invoke(
        [
            HumanMessage("Weather?"),
            AIMessage("", tool_calls=[call]),
            ToolMessage("broken", tool_call_id="1", name="weather", status="error"),
        ]
    )
    (messages,) = seen
    assert "weather(city: string, days?: integer): Tell the weather." in messages[0]["content"]
    assert [message["content"] for message in messages[-3:]] == [
        "Weather?",
        '{"name": "weather", "arguments": {"city": "Köln"}}',
        "Error of weather: broken",
    ]
    assert [message["role"] for message in messages].count("system") == 1


def test_a_call_that_was_cut_off_is_an_error() -> None:
    chat = _chat(CALL).bind_tools([weather], tool_choice="any")
    for ask in (chat.invoke, lambda text, **options: list(chat.stream(text, **options))):
        with pytest.raises(langchain.OutputParserException, match="weather") as caught:
            ask("Hello", max_tokens=50, fit_max_tokens=False)
        assert isinstance(caught.value, IncompleteAnswerError)


def test_tokens_are_counted_with_tools() -> None:
    sink = ListSink()
    chat = ChatPolar(engine=tiny_model(sink=sink, context_window=2048), max_tokens=1)
    counted = chat.get_num_tokens_from_messages([HumanMessage("Hello")], tools=[weather])
    chat.bind_tools([weather]).invoke("Hello")
    assert counted == sink.records[0].tokens.input


# --- Structured output. ---


@pytest.mark.parametrize(
    ("method", "schema"),
    [
        ("json_schema", Person),
        ("json_schema", Point),
        ("json_schema", Person.model_json_schema()),
        ("function_calling", Person),
        ("json_mode", Point),
    ],
)
async def test_structured_output_is_of_the_schema_on_any_weights(method: Any, schema: Any) -> None:
    chat = ChatPolar(engine=tiny_model(context_window=2048), max_tokens=90).with_structured_output(
        schema, method=method, strict=True
    )
    answers = [chat.invoke("Who?"), await chat.ainvoke("Who?"), list(chat.stream("Who?"))[-1]]
    assert answers[0] == answers[1] == answers[2]
    if schema is Person:
        assert isinstance(answers[0], Person)
    else:
        assert set(answers[0]) == ({"x", "y"} if schema is Point else {"name", "age"})


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output_that_was_cut_off_is_an_error(method: Any) -> None:
    bound = _chat('{"name": "A very long name indeed", "age": 3}').with_structured_output(
        Person, method=method, max_tokens=25, fit_max_tokens=False
    )
    with pytest.raises(langchain.OutputParserException, match="length"):
        bound.invoke("Who?")
    with pytest.raises(langchain.OutputParserException):
        list(bound.stream("Who?"))


def test_the_raw_answer_comes_with_the_error() -> None:
    chat = _chat('{"name": "A very long name indeed", "age": 3}')
    whole = chat.with_structured_output(Person, include_raw=True).invoke("Who?")
    assert whole["parsed"] == Person(name="A very long name indeed", age=3)
    assert (whole["parsing_error"], whole["raw"].response_metadata["complete"]) == (None, True)
    cut = chat.with_structured_output(Person, include_raw=True, max_tokens=25, fit_max_tokens=False).invoke("Who?")
    assert cut["parsed"] is None
    assert isinstance(cut["parsing_error"], IncompleteAnswerError)
    assert cut["raw"].response_metadata["finish_reason"] == "length"


def test_what_a_class_refuses_beyond_its_schema_is_an_error() -> None:
    from pydantic import field_validator

    class Odd(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def _odd(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError("even")
            return value

    with pytest.raises(langchain.OutputParserException, match="Odd"):
        _chat('{"n": 4}').with_structured_output(Odd).invoke("?")


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema(), "strict": True}},
        Person.model_json_schema(),
        {"type": "json_object"},
    ],
)
def test_a_response_format_is_read_in_every_spelling(response_format: Any) -> None:
    chat = _chat('{"name": "A", "age": 3}').bind(response_format=response_format)
    assert chat.invoke("Who?").text == '{"name": "A", "age": 3}'


@pytest.mark.parametrize("reply", ['{"name": "A", "age": 3}', CALL])
def test_tools_and_a_response_format_go_together(reply: str) -> None:
    chat = _chat(reply).bind_tools([weather], response_format=Person.model_json_schema())
    message = chat.invoke("?")
    if reply == CALL:
        assert _calls(message) == [("weather", {"city": "Köln", "days": 3})]
    else:
        assert (message.text, message.tool_calls) == (reply, [])


def test_what_an_answer_must_match_is_an_option_of_both(engine: PolarModel) -> None:
    assert PolarLLM(engine=engine).invoke("?", choice=["yes", "no"]) in {"yes", "no"}
    assert ChatPolar(engine=engine, regex="[ab]{3}").invoke("?").text.strip("ab") == ""
    assert ChatPolar(engine=engine, regex="[ab]{3}").invoke("?", choice=["no"]).text == "no"


def test_a_wrong_method_is_refused(engine: PolarModel) -> None:
    with pytest.raises(InvalidRequestError, match="json_schema"):
        ChatPolar(engine=engine).with_structured_output(Person, method="xml")  # type: ignore[arg-type]


async def test_inputs_of_a_batch_decode_together() -> None:
    most = 0
    engine = tiny_model()
    lock = threading.Barrier(16, timeout=30)

    def together(tokens: Any, logits: Any) -> Any:
        nonlocal most
        most = max(most, len(engine.scheduler))
        return logits

    chat = ChatPolar(engine=engine, max_tokens=40)
    original = engine.generate

    def meet(prompt: Any, **options: Any) -> Any:
        lock.wait()  # all sixteen are asked at the same time, or this breaks
        return original(prompt, **{**options, "logits_hook": together})

    engine.generate = meet  # type: ignore[method-assign]
    assert len(chat.batch([f"Hello {index}" for index in range(16)])) == 16
    assert most == 16
    await asyncio.gather(*(chat.ainvoke(f"Hello {index}") for index in range(16)))


def test_a_registered_provider_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain.chat_models import base, init_chat_model

    monkeypatch.setattr(base, "_BUILTIN_PROVIDERS", dict(base._BUILTIN_PROVIDERS))
    assert langchain_polar.register()
    chat = init_chat_model("polar:some/model", max_tokens=5)
    assert isinstance(chat, ChatPolar)
    assert (chat.model, chat.max_tokens) == ("some/model", 5)
    monkeypatch.delattr(base, "_BUILTIN_PROVIDERS")
    assert not langchain_polar.register()


async def test_agents_call_tools_until_they_have_an_answer() -> None:
    from langchain.agents import create_agent
    from langchain.agents.structured_output import ProviderStrategy, ToolStrategy

    def reply(prompt: Any) -> str:
        last = prompt[-1]["content"]
        if last.startswith("Result of"):
            return '{"name": "Anna", "age": 42}' if "JSON of this form" in prompt[0]["content"] else "It is sunny."
        return CALL

    chat = ChatPolar(engine=scripted_model(reply, context_window=2048), max_tokens=150)
    agent: Any = create_agent(chat, [weather])
    state = await agent.ainvoke({"messages": [HumanMessage("Weather in Köln?")]})
    kinds = [message.type for message in state["messages"]]
    assert kinds == ["human", "ai", "tool", "ai"]
    assert state["messages"][2].content == "sunny for 3 days in Köln"
    assert state["messages"][-1].text == "It is sunny."
    strict: Any = create_agent(chat, [weather], response_format=ProviderStrategy(Person))
    assert strict.invoke({"messages": [HumanMessage("?")]})["structured_response"] == Person(name="Anna", age=42)

    def by_tool(prompt: Any) -> str:
        return call_text("Person", {"name": "Anna", "age": 42})

    chat = ChatPolar(engine=scripted_model(by_tool, context_window=2048), max_tokens=150)
    tooled: Any = create_agent(chat, [weather], response_format=ToolStrategy(Person))
    assert tooled.invoke({"messages": [HumanMessage("?")]})["structured_response"] == Person(name="Anna", age=42)


# --- The parts. ---


@settings(max_examples=80)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["f", "größe", 'a"b']), st.dictionaries(st.text(), st.text() | st.integers())),
        min_size=1,
        max_size=4,
    ),
    cuts=st.lists(st.integers(0, 400), max_size=20),
)
def test_calls_read_the_same_in_all_pieces(calls: list[tuple[str, dict[str, Any]]], cuts: list[int]) -> None:
    use = ToolUse(tuple(map(Tool, ["f", "größe", 'a"b'])))
    text = "\n".join(call_text(name, arguments) for name, arguments in calls)
    reader, streamed = CallReader(use), dict[int, str]()
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(borders):
        for piece in reader.push(text[start:end]):
            assert not isinstance(piece, str)
            streamed[piece[0]] = streamed.get(piece[0], "") + piece[2]
    assert [(call.name, call.values()) for call in reader.calls] == calls
    assert list(streamed.values()) == [call.arguments for call in reader.calls]
    assert reader.finish() == []


def test_a_text_that_looks_like_a_call_is_text() -> None:
    reader = CallReader(ToolUse((Tool("f"),)))
    pieces = [*reader.push('{"name": "g'), *reader.push('", "arguments": {}}'), *reader.finish()]
    assert "".join(map(str, pieces)) == reader.text == '{"name": "g", "arguments": {}}'
    assert reader.calls == []


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, "string"),
        ({"enum": ["a", 1]}, '"a" | 1'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string | null"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"type": "array", "items": {"type": "integer"}}, "[integer]"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "boolean"}}}, "boolean"),
        ({"$ref": "#/none"}, "any"),
        ({"type": "object", "properties": {"a": {}, "b": {"type": "null"}}, "required": ["a"]}, "{a: any, b?: null}"),
        ({"$ref": "#"}, "any"),
        (True, "any"),
        # No schemas, which the engine refuses by their grammar.
        ({"type": "object", "properties": {"a": {}}, "required": 5}, "{a?: any}"),
        ({"enum": 5}, "any"),
    ],
)
def test_signatures(schema: Any, text: str) -> None:
    assert signature_of(schema, schema if isinstance(schema, dict) else {}) == text


_FUNCTION: dict[str, Any] = {
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"anyOf": [{"type": "integer"}, {"enum": ["all"]}]}},
        "required": ["city"],
        "$defs": {"city": {"type": "array", "items": {"const": "x"}, "description": "where"}},
    },
}
_OPTIONS: dict[str, Any] = {
    "tools": [{"type": "function", "function": _FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "parallel_tool_calls": True,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "n", "description": "about", "schema": _FUNCTION["parameters"]},
    },
}
_ANYTHING = st.recursive(
    st.sampled_from([None, True, 5, -0.5, "", "auto", "weather", "object", "json_object", "#/$defs/city"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "$ref", "a"]), inner, max_size=2)
    ),
    max_leaves=3,
)


@cache
def _tiny() -> PolarModel:
    return tiny_model(sink=NullSink(), context_window=4096)


@settings(max_examples=80)
@given(st.data(), st.sets(st.sampled_from(sorted(_OPTIONS)), max_size=3))
def test_whatever_stands_for_tools_and_schemas_is_taken_or_refused(data: st.DataObject, dropped: set[str]) -> None:
    options: Any = {name: value for name, value in _OPTIONS.items() if name not in dropped}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths_of(options)[1:]))
        options = replaced(options, path, data.draw(_ANYTHING))
    try:
        form = AnswerForm.of(options)
        roles = form.teach([{"role": "user", "content": "How is the weather in Köln?"}])
        request: RequestOptions = {**form.options(), "max_tokens": 1}
        _tiny().generate(roles, **request)
    except PolarError:
        pass
