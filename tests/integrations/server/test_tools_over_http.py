"""Tools over HTTP: what a body asks for, what the model is told, and what comes back, whole and in pieces."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from pydantic import BaseModel

from polar_sdk.frameworks.tools import call_text
from polar_sdk.testing import scripted_model
from tests.integrations.server.conftest import RecordingSink, chat_body

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.integrations.server.conftest import Served

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
CALL = call_text("weather", {"city": "Köln", "days": 3})
BOTH = CALL + "\n" + call_text("now", {})


class Script:
    """Servers that answer what they are told to, and what they were asked."""

    def __init__(self, serve: Callable[..., Served], sink: RecordingSink) -> None:
        self._serve, self._sink = serve, sink
        self.prompts: list[Any] = []

    def __call__(self, reply: str) -> Served:
        """A server that answers `reply`."""

        def answer(prompt: Any) -> str:
            self.prompts.append(prompt)
            return reply

        return self._serve(engine=scripted_model(answer, context_window=4096, sink=self._sink))


@pytest.fixture
def script(serve: Callable[..., Served], sink: RecordingSink) -> Script:
    return Script(serve, sink)


def joined(events: Sequence[Any]) -> tuple[str, list[dict[str, Any]], str]:
    """Text, calls and finish reason of a stream of one choice; checks the rules on the way."""
    assert events[-1] == "[DONE]"
    text, calls, finish = "", list[dict[str, Any]](), None
    for event in events[:-1]:
        for choice in event["choices"]:
            assert finish is None, "a piece after the end"
            finish, delta = choice["finish_reason"], choice["delta"]
            if finish is not None:
                assert delta == {}
            text += delta.get("content") or ""
            for piece in delta.get("tool_calls", ()):
                if piece["index"] == len(calls):
                    assert set(piece) == {"index", "id", "type", "function"}
                    assert piece["function"]["arguments"] == ""
                    calls.append({"id": piece["id"], "type": piece["type"], "function": dict(piece["function"])})
                else:
                    assert set(piece) == {"index", "function"}
                    assert set(piece["function"]) == {"arguments"}
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    assert finish is not None
    return text, calls, finish


def named(calls: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    assert all(call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_calls_come_whole_and_in_pieces(script: Script, sink: RecordingSink) -> None:
    served = script(BOTH)
    body = chat_body(max_tokens=200, tools=[WEATHER, NOW], parallel_tool_calls=True)
    wanted = [("weather", {"city": "Köln", "days": 3}), ("now", {})]
    answer = served.chat(**body)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert named(choice["message"]["tool_calls"]) == wanted
    events = served.events(**body, stream_options={"include_usage": True})
    text, calls, finish = joined(events)
    assert (text, named(calls), finish) == ("", wanted, "tool_calls")
    assert events[-2]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert len(events) > 10, "arguments come as they are written"
    assert [record.outcome for record in sink.records] == ["completed"] * 2


def test_the_model_may_answer_with_text(script: Script) -> None:
    served = script("It is {nice}.")
    body = chat_body(max_tokens=60, tools=[WEATHER], logprobs=True)
    (choice,) = served.chat(**body)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "It is {nice}.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    events = served.events(**body)
    assert joined(events) == ("It is {nice}.", [], "stop")
    entries = [entry for event in events[:-1] for entry in (event["choices"][0]["logprobs"] or {}).get("content", ())]
    assert [entry["bytes"] for entry in entries] == [entry["bytes"] for entry in choice["logprobs"]["content"]]


def test_log_probabilities_go_with_what_the_model_wrote(script: Script) -> None:
    body = chat_body(max_tokens=200, tools=[WEATHER], logprobs=True)
    served = script(CALL)
    (choice,) = served.chat(**body)["choices"]
    assert bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"]).decode() == CALL
    events = served.events(**body)
    entries = [entry for event in events[:-1] for entry in (event["choices"][0]["logprobs"] or {}).get("content", ())]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == CALL


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "now"}}],
                },
            },
            {"now"},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_is_enforced_on_any_weights(served: Served, choice: Any, names: set[str], stream: bool) -> None:
    for seed in range(2):
        body = chat_body(max_tokens=120, tools=[WEATHER, NOW], tool_choice=choice, temperature=1, seed=seed)
        if stream:
            _, calls, finish = joined(served.events(**body))
        else:
            (found,) = served.chat(**body)["choices"]
            calls, finish = found["message"]["tool_calls"], found["finish_reason"]
        ((name, arguments),) = named(calls)
        assert finish == "tool_calls"
        assert name in names
        assert set(arguments) == ({"city", "days"} if name == "weather" else set())


def test_a_tool_may_have_the_name_of_a_mode(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "auto"}}
    body = chat_body(max_tokens=60, tools=[NOW, tool], tool_choice={"type": "function", "function": {"name": "auto"}})
    (choice,) = served.chat(**body)["choices"]
    assert named(choice["message"]["tool_calls"]) == [("auto", {})]


def test_without_a_choice_of_tools_the_model_hears_of_none(script: Script) -> None:
    served = script("hi")
    served.chat(tools=[WEATHER], tool_choice="none")
    served.chat(tools=[], parallel_tool_calls=False, tool_choice="auto")
    assert script.prompts == [[{"role": "user", "content": "hi"}]] * 2
    served.chat(tools=[WEATHER])
    assert "weather(city: string, days: integer): Tell the weather." in script.prompts[-1][0]["content"]


def test_calls_and_results_are_in_the_history(script: Script) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rom","days":1}'}}
    cut = {"id": "c2", "type": "function", "function": {"name": "now", "arguments": '{"a'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call, cut]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {
            "role": "tool",
            "tool_call_id": "c2",
            "content": [{"type": "text", "text": "12:"}, {"type": "text", "text": "0"}],
        },
        {"role": "assistant", "content": "Sunny.", "tool_calls": None},
        {"role": "user", "content": "Thanks"},
    ]
    script("hi").chat(messages=messages)
    assert script.prompts[0] == [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": call_text("weather", {"city": "Rom", "days": 1}) + "\n" + call_text("now", '{"a'),
        },
        {"role": "user", "content": "Result of weather: sunny"},
        {"role": "user", "content": "Result of now: 12:0"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks"},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_is_no_call_yet(script: Script, stream: bool) -> None:
    served = script(CALL)
    body = chat_body(max_tokens=200, tools=[WEATHER], stop=["ln"])
    if stream:
        text, calls, finish = joined(served.events(**body))
    else:
        (choice,) = served.chat(**body)["choices"]
        text, calls, finish = "", choice["message"]["tool_calls"], choice["finish_reason"]
    assert (text, finish) == ("", "stop")
    assert calls[0]["function"] == {"name": "weather", "arguments": '{"city": "Kö'}


def test_a_schema_and_tools_go_together(script: Script) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    body = chat_body(max_tokens=200, tools=[WEATHER], response_format=wanted)
    (choice,) = script('{"ok": true}').chat(**body)["choices"]
    assert (json.loads(choice["message"]["content"]), choice["finish_reason"]) == ({"ok": True}, "stop")
    assert "{ok: boolean}" in script.prompts[-1][0]["content"], "the model is told the schema"
    (choice,) = script(CALL).chat(**body)["choices"]
    assert named(choice["message"]["tool_calls"]) == [("weather", {"city": "Köln", "days": 3})]


def test_several_choices_have_calls_of_their_own(served: Served) -> None:
    body = chat_body(max_tokens=120, tools=[WEATHER], tool_choice="required", n=2, temperature=1, seed=3)
    choices = served.chat(**body)["choices"]
    ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2


CHOOSE_NOTHING = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}
DOUBLE = [NOW, NOW]


def tool_of(**changes: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {**WEATHER["function"], **changes}}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [NOW] * 129}, "tools"),
        ({"tools": DOUBLE}, "tools[1]"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": tool_of(name="two words")}, "tools[0].function.name"),
        ({"tools": tool_of(name="")}, "tools[0].function.name"),
        ({"tools": tool_of(description=5)}, "tools[0].function.description"),
        ({"tools": tool_of(strict="yes")}, "tools[0].function.strict"),
        ({"tools": tool_of(parameters=[])}, "tools[0].function.parameters"),
        ({"tools": tool_of(parameters={"type": "string"})}, "tools[0].function.parameters"),
        ({"tools": tool_of(parameters={"properties": {"a": {"type": "nothing"}}})}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "weather", "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "wether"}}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": CHOOSE_NOTHING, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "tool_choice": "required", "max_tokens": 3}, "max_tokens"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "messages[0].tool_calls[0].type"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}]},
            "messages[0].tool_calls[0].id",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "x", "arguments": {}}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "name": "x", "content": "x"}]}, "messages[0]"),
        ({"functions": [{"name": "x"}]}, "functions"),
    ],
)
def test_what_is_wrong_is_named(refusing: Served, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        status, _, body = refusing.call("POST", "/v1/chat/completions", chat_body(**{**fields, "stream": stream}))
        assert (status, body["error"]["param"]) == (400, param), body


# -- the client, unmodified --------------------------------------------------------------------------------------------


class Weather(BaseModel):
    """Tell the weather."""

    city: str
    days: int


def test_openai_python_calls_streams_and_parses(script: Script) -> None:
    served = script(CALL.replace('"weather"', '"Weather"'))
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    tool: Any = openai.pydantic_function_tool(Weather)
    with served.client() as client:
        made = client.chat.completions.create(model="tiny", messages=messages, tools=[tool], tool_choice="required")
        assert made.choices[0].message.tool_calls is not None
        (call,) = made.choices[0].message.tool_calls
        assert call.type == "function"
        assert Weather.model_validate_json(call.function.arguments) == Weather(city="Köln", days=3)
        parsed = client.chat.completions.parse(model="tiny", messages=messages, tools=[tool])
        assert parsed.choices[0].message.tool_calls is not None
        (read,) = parsed.choices[0].message.tool_calls
        assert read.function.parsed_arguments == Weather(city="Köln", days=3)
        with client.chat.completions.stream(model="tiny", messages=messages, tools=[tool]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        assert final.choices[0].message.tool_calls is not None
        (last,) = final.choices[0].message.tool_calls
        assert last.function.parsed_arguments == Weather(city="Köln", days=3)


def test_openai_python_parses_an_answer_by_its_schema(script: Script) -> None:
    served = script('{"city": "Rom", "days": 2}')
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    with served.client() as client:
        parsed = client.chat.completions.parse(model="tiny", messages=messages, response_format=Weather)
        assert parsed.choices[0].message.parsed == Weather(city="Rom", days=2)
        with client.chat.completions.stream(model="tiny", messages=messages, response_format=Weather) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == Weather(city="Rom", days=2)
