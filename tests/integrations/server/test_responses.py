"""`/v1/responses`: items in and out, the events that build them, and openai-python on top, unmodified."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseStreamEvent
from pydantic import TypeAdapter

from polar_sdk.frameworks.tools import call_text
from tests.integrations.server import test_tools_over_http as tools
from tests.integrations.server.test_tools_over_http import BOTH, CALL, Script, Weather

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integrations.server.conftest import RecordingSink, Served

WEATHER: dict[str, Any] = {"type": "function", **tools.WEATHER["function"]}
NOW: dict[str, Any] = {"type": "function", "name": "now", "parameters": None, "strict": None}
script = tools.script
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
_NEW = ("id", "created_at", "call_id", "polar", "item_id")
"""Fields that differ between two answers to the same call."""


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


def ask(served: Served, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "input": "hi", "max_output_tokens": 8, **fields}
    status, _, answer = served.call("POST", "/v1/responses", body)
    assert status == 200, answer
    Response.model_validate(answer)
    found: dict[str, Any] = answer
    return found


def stream(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; each is one that openai-python knows, in a row without gaps."""
    body = {"model": "tiny", "input": "hi", "max_output_tokens": 8, **fields, "stream": True}
    status, headers, text = served.call("POST", "/v1/responses", body)
    assert status == 200, text
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    events = []
    for block in text.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENTS.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The types of events, without `response.`, and repeated ones once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]


def built(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a client builds of deltas; checks each against what its `done` events say."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(json.loads(json.dumps(event["item"])))
        elif kind == "content_part.added":
            items[event["output_index"]]["content"].append(dict(event["part"]))
        elif kind == "output_text.delta":
            part = items[event["output_index"]]["content"][event["content_index"]]
            part["text"] += event["delta"]
            part["logprobs"] = part["logprobs"] + event["logprobs"]
        elif kind == "output_text.done":
            assert event["text"] == items[event["output_index"]]["content"][0]["text"]
        elif kind == "content_part.done":
            assert event["part"] == items[event["output_index"]]["content"][0]
        elif kind == "function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == items[event["output_index"]]["arguments"]
            assert event["name"] == items[event["output_index"]]["name"]
        elif kind == "output_item.done":
            assert event["item"] == {**items[event["output_index"]], "status": event["item"]["status"]}
            items[event["output_index"]] = event["item"]
    return items


def bare(value: Any) -> Any:
    """Without what is new in every answer."""
    if isinstance(value, list):
        return [bare(each) for each in value]
    if isinstance(value, dict):
        return {name: bare(each) for name, each in value.items() if name not in _NEW}
    return value


def test_a_text_comes_whole_and_in_events(script: Script, sink: RecordingSink) -> None:
    served = script("Hello you.")
    answer = ask(served, max_output_tokens=60)
    (item,) = answer["output"]
    assert (answer["object"], answer["status"], answer["store"]) == ("response", "completed", False)
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "Hello you.", "annotations": [], "logprobs": []}]
    (record,) = sink.records
    assert answer["id"] == f"resp_{record.request_id}"
    assert answer["usage"]["input_tokens"] == record.tokens.input
    assert answer["usage"]["output_tokens"] == record.tokens.output
    assert answer["polar"]["flops"] == record.flops.total
    assert answer["cost_details"]["amount"] == f"0.{record.flops.total:012d}"
    events = stream(served, max_output_tokens=60)
    assert kinds(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert len([event for event in events if event["type"] == "response.output_text.delta"]) > 5
    last = events[-1]["response"]
    assert last["output"] == built(events)
    assert bare(last["output"]) == bare(answer["output"])
    for response in (answer, last):  # the start of the prompt is known the second time
        for name in ("usage", "cost", "cost_details"):
            response.pop(name)
    assert bare(last) == bare(answer)


def test_calls_come_whole_and_in_events(script: Script) -> None:
    served = script(BOTH)
    fields = {"max_output_tokens": 200, "tools": [WEATHER, NOW], "parallel_tool_calls": True}
    answer = ask(served, **fields)
    first, second = answer["output"]
    assert [item["type"] for item in answer["output"]] == ["function_call"] * 2
    assert (first["name"], json.loads(first["arguments"])) == ("weather", {"city": "Köln", "days": 3})
    assert (second["name"], second["arguments"], second["status"]) == ("now", "{}", "completed")
    assert len({item["id"] for item in answer["output"]} | {item["call_id"] for item in answer["output"]}) == 4
    events = stream(served, **fields)
    one = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds(events) == ["created", "in_progress", *one, *one, "completed"]
    assert bare(events[-1]["response"]["output"]) == bare(answer["output"]) == bare(built(events))


def test_an_answer_that_is_too_long_is_incomplete(served: Served) -> None:
    fields = {"max_output_tokens": 3, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = ask(served, **fields)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    (part,) = answer["output"][0]["content"]
    assert (
        bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode("utf-8", "replace") == part["text"]
    )
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    events = stream(served, **fields)
    assert events[-1]["type"] == "response.incomplete"
    (again,) = events[-1]["response"]["output"][0]["content"]
    assert again["text"] == part["text"]
    assert [entry["token"] for entry in again["logprobs"]] == [entry["token"] for entry in part["logprobs"]]
    assert built(events) == events[-1]["response"]["output"]


def test_items_become_messages(script: Script) -> None:
    served = script("hi")
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Rom"}', "id": "fc_1"}
    items = [
        {"role": "developer", "content": "Be brief."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "content": [{"type": "output_text", "text": "Well.", "annotations": []}],
        },
        call,
        {**call, "call_id": "c2", "name": "now", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "12:00"}]},
        call,
    ]
    ask(served, input=items, instructions="You are Ann.")
    said = call_text("weather", {"city": "Rom"})
    assert script.prompts[-1] == [
        {"role": "system", "content": "You are Ann."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "\n".join(["Well.", said, call_text("now", {})])},
        {"role": "user", "content": "Result of weather: sunny"},
        {"role": "user", "content": "Result of now: 12:00"},
        {"role": "assistant", "content": said},
    ]


def test_the_same_call_costs_the_same_as_a_chat(served: Served, sink: RecordingSink) -> None:
    served.chat(model="tiny:economy", tags={"team": "a"}, metadata={"run": "7"}, user="ann")
    ask(served, model="tiny:economy", tags={"team": "a"}, metadata={"run": "7"}, user="ann")
    chat, response = sink.records
    for name in ("tags", "tier", "program", "identity_flops"):
        assert getattr(chat, name) == getattr(response, name)
    assert chat.tokens.output == response.tokens.output
    _, _, quoted = served.call("POST", "/v1/polar/quote", {"model": "tiny", "input": "hi", "max_output_tokens": 8})
    assert quoted["requested"]["max_output_tokens"] == 8


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "x", "arguments": 5}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"include": ["file_search_call.results"]}, "include"),
    ({"include": "x"}, "include"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"text": {"format": {"type": "odd"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "odd"}}}}, "text.format"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": 5}, "text"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools[0].name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"instructions": 5}, "instructions"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: json.dumps(value)[:40])
def test_what_is_wrong_is_named(refusing: Served, fields: dict[str, Any], param: str) -> None:
    status, _, body = refusing.call("POST", "/v1/responses", {"model": "tiny", "input": "hi", **fields})
    assert (status, body["error"]["param"]) == (400, param), body


def test_a_stream_that_breaks_off_says_so(served: Served, sink: RecordingSink) -> None:
    maker = served.server.engine._maker

    class Failing(type(maker)):  # type: ignore[misc]
        def make(self, prompt: Any, options: Any) -> Any:
            def fail(tokens: Any, logits: Any) -> Any:
                if len(tokens) == 5:
                    raise RuntimeError("a secret of the server")
                logits[33] += 1e3
                return logits

            return super().make(prompt, {**options, "logits_hook": fail})

    served.server.engine._maker = Failing(**{name: getattr(maker, name) for name in maker.__dataclass_fields__})
    events = stream(served)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["code"] == "internal_error"
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"]["message"] == events[-2]["message"]
    assert "secret" not in json.dumps(events)
    (record,) = sink.wait_for(1)
    assert (record.outcome, record.tokens.output) == ("error", 5)


# -- the client, unmodified --------------------------------------------------------------------------------------------


def test_openai_python_creates_and_streams(script: Script, sink: RecordingSink) -> None:
    served = script("Hello you.")
    with served.client() as client:
        made = client.responses.create(model="tiny", input="hi", store=False, extra_body={"compute": "economy"})
        assert (made.output_text, made.status) == ("Hello you.", "completed")
        assert made.usage is not None
        assert made.usage.total_tokens == sink.records[0].tokens.input + sink.records[0].tokens.output
        assert sink.records[0].tier == "economy"
        with client.responses.stream(model="tiny", input=[{"role": "user", "content": "hi"}]) as events:
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            assert text == events.get_final_response().output_text == "Hello you."
        raw = client.responses.create(model="tiny", input="hi", stream=True)
        assert [event.type for event in raw][-1] == "response.completed"


def test_openai_python_calls_tools_and_answers_them(script: Script) -> None:
    served = script(CALL.replace('"weather"', '"Weather"'))
    tool = openai.pydantic_function_tool(Weather)["function"]
    listed: list[Any] = [{"type": "function", **tool}]
    with served.client() as client:
        parsed = client.responses.parse(model="tiny", input="hi", tools=listed, tool_choice="required")
        (call,) = parsed.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert json.loads(call.arguments) == {"city": "Köln", "days": 3}
        history: list[Any] = [
            {"role": "user", "content": "hi"},
            call.model_dump(exclude_none=True, exclude={"parsed_arguments"}),
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ]
        client.responses.create(model="tiny", input=history, tools=listed, tool_choice="none")
    assert script.prompts[-1][-1] == {"role": "user", "content": "Result of Weather: sunny"}


def test_openai_python_parses_an_answer_by_its_schema(script: Script) -> None:
    served = script('{"city": "Rom", "days": 2}')
    with served.client() as client:
        parsed = client.responses.parse(model="tiny", input="hi", text_format=Weather)
        assert parsed.output_parsed == Weather(city="Rom", days=2)
        with client.responses.stream(model="tiny", input="hi", text_format=Weather) as events:
            final = events.get_final_response()
        assert final.output_parsed == Weather(city="Rom", days=2)
        (message,) = final.output
        assert isinstance(message, ResponseOutputMessage)


def test_openai_python_sends_its_own_output_back(served: Served, client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="hi", max_output_tokens=4)
    history: list[Any] = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "go on"}]
    assert client.responses.create(model="tiny", input=history, max_output_tokens=4).output_text
