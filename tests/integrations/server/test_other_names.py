"""Options beyond OpenAI's, under the names of vLLM and llama.cpp: each does what it says, or is refused by name."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk.frameworks.options import HTTP_NAMES, NEUTRAL, OPTIONS
from polar_server.openai.chat import ChatBody
from polar_server.openai.completions import TextBody
from polar_server.openai.responses import ResponseBody
from tests.integrations.server.conftest import chat_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integrations.server.conftest import RecordingSink, Served

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"regex": "[0-9]{3}"}, r"\d{3}"),
        ({"guided_regex": "[0-9]{3}"}, r"\d{3}"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, r"\d{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"choice": ["yes", "no"], "disable_any_whitespace": True}}, "yes|no"),
        ({"grammar": 'start: "a" | "bc"'}, "a|bc"),
        ({"grammar": 'root ::= "a" | "bc"'}, "a|bc"),
        ({"guided_grammar": 'root ::= "a" | "bc"'}, "a|bc"),
        ({"json_schema": SCHEMA}, r'\{"a": [12]\}'),
        ({"guided_json": json.dumps(SCHEMA)}, r'\{"a": [12]\}'),
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"a": [12]\}'),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 20}, r"\{.*\}"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, r'\{"a": [12]\}'),
    ],
)
def test_what_an_answer_must_match(served: Served, fields: dict[str, Any], allowed: str) -> None:
    import re

    answer = served.chat(**{"max_tokens": 12, **fields})["choices"][0]
    assert re.fullmatch(allowed, answer["message"]["content"], re.DOTALL)
    events = served.events(**chat_body(**{"max_tokens": 12, **fields}))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == answer["message"]["content"]


def test_every_endpoint_takes_them(served: Served, sink: RecordingSink) -> None:
    asked = {"model": "tiny", "choice": ["yes", "no"], "top_k": 5, "min_p": 0.1, "repeat_penalty": 1.2}
    _, _, text = served.call("POST", "/v1/completions", {**asked, "prompt": "a", "n_predict": 9})
    _, _, response = served.call("POST", "/v1/responses", {**asked, "input": "a", "num_predict": 9})
    assert text["choices"][0]["text"] in ("yes", "no")
    assert response["output"][0]["content"][0]["text"] in ("yes", "no")
    assert response["max_output_tokens"] == 9
    assert len(sink.records) == 2


def test_sampling_and_ends(served: Served) -> None:
    (end, *_) = served.server.engine.loaded.end_tokens
    ending = {"logit_bias": {str(end): 100}, "max_tokens": 5}
    assert served.chat(**ending)["usage"]["completion_tokens"] == 1
    assert served.chat(ignore_eos=True, **ending)["usage"]["completion_tokens"] == 5
    greedy = served.chat(temperature=0)["choices"]
    for alone in ({"top_k": 1}, {"min_p": 1.0}):
        assert served.chat(temperature=2, seed=3, **alone)["choices"] == greedy
    assert served.chat(temperature=2, seed=3, top_k=-1)["choices"] == served.chat(temperature=2, seed=3)["choices"]
    assert served.chat(repetition_penalty=0.01)["choices"] != greedy


def test_an_answer_that_repeats_itself_ends(served: Served, sink: RecordingSink) -> None:
    answer = served.chat(logit_bias={"65": 100}, stop_repeats=4, max_tokens=200)
    assert answer["polar"]["stopped_by"] == "repeats"
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 16)
    assert sink.records[0].tags["polar.stopped_by"] == "repeats"
    assert 'polar_stopped_requests_total{by="repeats"} 1.0' in served.call("GET", "/metrics")[2]


def test_log_probabilities_of_the_prompt(served: Served) -> None:
    ids = served.server.engine.encode("abc")
    body = {"model": "tiny:exact", "prompt": ["abc", "abd"], "prompt_logprobs": 2, "max_tokens": 1}
    _, _, text = served.call("POST", "/v1/completions", body)
    listed = text["choices"][0]["prompt_logprobs"]
    assert (listed[0], len(listed), len(text["choices"])) == (None, len(ids), 2)
    for token, places in zip(ids[1:], listed[1:], strict=True):
        assert places[str(token)]["decoded_token"] == chr(token + 33) or places[str(token)]["logprob"] < 0
        assert len(places) in (2, 3)
        assert sorted(one["rank"] for one in places.values() if one["rank"]) == [1, 2]
    chat = served.chat(model="tiny:exact", prompt_logprobs=0)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    status, _, refused = served.call("POST", "/v1/completions", {**body, "stream": True})
    assert (status, refused["error"]["param"]) == (400, "stream")


def test_usage_with_every_event(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, done = served.events(**chat_body(n=2, stream_options=options))
    assert done == "[DONE]"
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 16
    assert {event["usage"]["prompt_tokens"] for event in events} == {events[-1]["usage"]["prompt_tokens"]}


def test_errors_name_the_length_as_it_came(served: Served) -> None:
    body = {key: value for key, value in chat_body().items() if key != "max_tokens"}
    for path, field, rest in (
        ("/v1/chat/completions", "max_completion_tokens", body),
        ("/v1/chat/completions", "max_tokens", body),
        ("/v1/responses", "max_output_tokens", {"model": "tiny", "input": "a"}),
    ):
        _, _, refused = served.call("POST", path, {**rest, field: 10_000})
        assert (refused["error"]["code"], refused["error"]["param"]) == ("context_length_exceeded", field)
        assert refused["error"]["message"].startswith(f"{field}=10000")


@pytest.mark.parametrize("format_field", ["tools", "response_format"])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_a_length_that_is_too_short_for_the_form_is_blamed_and_one_that_is_not_is_named(
    field: str, format_field: str, served: Served
) -> None:
    schema = {"type": "object", "properties": {"day": {"enum": ["Sunday"]}}, "required": ["day"]}
    named = {"name": "day", "parameters": schema}
    asked: dict[str, Any]
    form: dict[str, Any]
    if field == "max_output_tokens":
        path, asked = "/v1/responses", {"model": "tiny", "input": "a"}
        tools, form = (
            {"type": "function", **named},
            {"text": {"format": {"type": "json_schema", "name": "day", "schema": schema}}},
        )
    else:
        path, asked = "/v1/chat/completions", {key: value for key, value in chat_body().items() if key != "max_tokens"}
        tools = {"type": "function", "function": named}
        form = {"response_format": {"type": "json_schema", "json_schema": {"name": "day", "schema": schema}}}
    asked |= {"tools": [tools], "tool_choice": "required"} if format_field == "tools" else form
    status, _, refused = served.call("POST", path, {**asked, field: 3})
    message = refused["error"]["message"]
    assert (status, refused["error"]["param"]) == (400, field)
    assert message.startswith(f"{field}=3 ")
    enough = max(map(int, re.findall(r"\d+", message)))
    assert served.call("POST", path, {**asked, field: enough - 1})[0] == 400
    assert served.call("POST", path, {**asked, field: enough})[0] == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"guided_regex": "(?<=a)b"}, "regex"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"repeat_penalty": "a"}, "repeat_penalty"),
        ({"n_predict": 0}, "n_predict"),
        ({"n_predict": 4, "max_tokens": 5}, "n_predict"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"chat_template": "x"}, "chat_template"),
        ({"min_p": 2}, "min_p"),
        ({"stop_repeats": 1}, "stop_repeats"),
        ({"choice": []}, "choice"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_it_came_under(
    refusing: Served, fields: dict[str, Any], param: str
) -> None:
    body = {key: value for key, value in chat_body(**fields).items() if key != "max_tokens" or "max_tokens" in fields}
    status, _, answer = refusing.call("POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_values_that_say_nothing_are_taken(served: Served) -> None:
    fields = {name: values[0] for name, (values, _) in NEUTRAL.items() if values}
    assert served.chat(**{**fields, "priority": None, "chat_template": None})["choices"]


def test_the_table_of_options_names_what_the_bodies_have() -> None:
    bodies: dict[str, Any] = {"completions_chat": ChatBody, "completions": TextBody, "responses": ResponseBody}
    for surface, body in bodies.items():
        for option in OPTIONS:
            name = option.on(surface)
            assert (name in body.model_fields) == (name is not None), (surface, option.name)
    assert set(HTTP_NAMES.values()) <= set(ChatBody.model_fields)


def test_tokens_of_texts_and_messages(served: Served, serve: Callable[..., Served]) -> None:
    engine = served.server.engine
    _, _, vllm = served.call("POST", "/tokenize", {"model": "tiny", "prompt": "aé", "return_token_strs": True})
    assert vllm["tokens"] == engine.encode("aé")
    assert (vllm["count"], vllm["max_model_len"], vllm["token_strs"][0]) == (len(vllm["tokens"]), 4096, "a")
    _, _, llama = served.call("POST", "/tokenize", {"content": "aé", "add_special": False})
    assert llama["tokens"] == vllm["tokens"]
    for path in ("prompt", "content"):
        assert served.call("POST", "/detokenize", {"tokens": llama["tokens"]})[2][path] == "aé"
    _, _, chat = served.call("POST", "/tokenize", {"messages": chat_body()["messages"]})
    assert chat["count"] == served.chat()["usage"]["prompt_tokens"]
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"prompt": "a", "model": "other"}),
        ("/tokenize", {"prompt": "word " * 100_000}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {}),
    ):
        assert served.call("POST", path, body)[0] in (400, 404), (path, body)
