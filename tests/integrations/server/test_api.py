"""Answers and refusals of each endpoint: status, code and the field at fault."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator

from polar_sdk.errors import BudgetExceededError, SinkError
from polar_sdk.reading import parse_object
from tests.integrations.server.conftest import JSON, WAIT_S, RecordingSink, chat_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integrations.server.conftest import Served


def test_models_are_listed_by_tier(served: Served) -> None:
    _, _, listed = served.call("GET", "/v1/models")
    assert [model["id"] for model in listed["data"]] == [
        "tiny",
        "tiny:economy",
        "tiny:standard",
        "tiny:premium",
        "tiny:exact",
    ]
    status, _, one = served.call("GET", "/v1/models/tiny:economy")
    assert status == 200
    assert one == next(model for model in listed["data"] if model["id"] == "tiny:economy")
    assert one["polar"]["program"] == "0 3-5"


@pytest.mark.parametrize("model", ["other", "tiny:", "tiny:none", "tiny:economy:exact", "TINY", "ti\u0000ny", "\ud800"])
def test_a_model_that_does_not_exist_is_404(refusing: Served, model: str) -> None:
    status, _, body = refusing.call("POST", "/v1/chat/completions", chat_body(model=model))
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")


def test_an_answer_says_what_it_cost_and_what_ran(served: Served, sink: RecordingSink) -> None:
    status, headers, body = served.call(
        "POST", "/v1/chat/completions", chat_body(model="tiny:economy"), {"x-request-id": "mine-1"}
    )
    (record,) = sink.records
    assert status == 200
    assert body["id"] == f"chatcmpl-{record.request_id}"
    assert body["usage"]["prompt_tokens"] == record.tokens.input
    assert body["usage"]["completion_tokens"] == record.tokens.output == 8
    assert body["usage"]["total_tokens"] == record.tokens.input + 8
    assert body["polar"]["program"] == record.program == "0 3-5"
    assert body["polar"]["flops"] == record.flops.total
    assert body["polar"]["saved"] == record.flops_saved
    assert body["polar"]["receipt"] == record.request_id
    assert body["cost_details"]["amount"] == f"0.{record.flops.total:012d}"
    assert headers["x-request-id"] == record.request_id
    assert headers["x-client-request-id"] == record.tags["client_request_id"] == "mine-1"
    assert headers["x-polar-program"] == "0 3-5"
    assert headers["x-polar-tier"] == "economy"
    assert headers["x-polar-cost"] == f"0.{record.flops.total:012d} EUR"
    assert int(headers["openai-processing-ms"]) >= 0
    assert headers["server-timing"].startswith("queue;dur=")


def test_compute_program_and_tags_travel_in_the_body(served: Served, sink: RecordingSink) -> None:
    served.chat(compute="economy", tags={"team": "search"}, user="ann", metadata={"run": "7"})
    served.chat(program="0-2 4-5")
    served.chat(service_tier="flex")
    by_tier, by_hand, by_service = sink.records
    assert (by_tier.tier, by_tier.program, by_tier.tenant) == ("economy", "0 3-5", "acme")
    assert by_tier.tags == {"team": "search", "user": "ann", "metadata.run": "7"}
    assert (by_hand.tier, by_hand.program) == (None, "0-2 4-5")
    assert by_service.tier == "economy"


def test_choices_differ_by_seed_and_are_billed_each(served: Served, sink: RecordingSink) -> None:
    body = served.chat(n=3, temperature=1.0, seed=5)
    again = served.chat(n=1, temperature=1.0, seed=6)
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert len(set(texts)) == 3
    assert texts[1] == again["choices"][0]["message"]["content"]
    assert body["usage"]["completion_tokens"] == 24
    assert body["usage"]["prompt_tokens"] == sink.records[0].tokens.input
    assert sorted(body["polar"]["receipts"]) == sorted(record.request_id for record in sink.records[:3])
    assert body["polar"]["flops"] == sum(record.flops.total for record in sink.records[:3])


def test_biases_and_penalties_steer_the_answer(served: Served) -> None:
    first, second = (str(served.server.engine.encode(letter)[0]) for letter in "AB")
    only = served.chat(logit_bias={first: 100})["choices"][0]["message"]["content"]
    assert only == "A" * 8
    body = served.chat(logit_bias={first: 60, second: 59}, frequency_penalty=2)
    assert set(body["choices"][0]["message"]["content"]) == {"A", "B"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_matches_its_schema(served: Served, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}}}
    body = chat_body(max_tokens=40, response_format=wanted)
    if stream:
        deltas = [event["choices"][0]["delta"].get("content", "") for event in served.events(**body)[:-1]]
        assert set(json.loads("".join(deltas))) == {"a"}
    else:
        assert set(json.loads(served.chat(**body)["choices"][0]["message"]["content"])) == {"a"}
    plain = served.chat(response_format={"type": "json_object"}, max_tokens=40)
    assert isinstance(json.loads(plain["choices"][0]["message"]["content"]), dict)


def test_logprobs_have_the_bytes_of_the_text(served: Served) -> None:
    body = served.chat(logprobs=True, top_logprobs=2, max_tokens=20)
    choice = body["choices"][0]
    entries = choice["logprobs"]["content"]
    joined = bytes(byte for entry in entries for byte in entry["bytes"])
    assert joined.decode("utf-8", "replace") == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert served.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 2**70}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": 5}, "stop"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "oracle", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "a", "format": "mp3"}}, "audio"),
    ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
    ({"store": True}, "store"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"compute": "cheap"}, "compute"),
    ({"compute": ["economy"]}, "compute"),
    ({"compute": 0.1}, "compute"),
    ({"model": "tiny:exact", "compute": "economy"}, "compute"),
    ({"program": "0-2 4-5", "compute": "economy"}, "program"),
    ({"program": "0-99"}, "program"),
    ({"program": "nonsense"}, "program"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"tags": {"key": "stolen"}}, "tags"),
    ({"tags": {"polar.downgraded_from": "x"}}, "tags"),
    ({"tags": {"a b": "line\nbreak"}}, "tags"),
    ({"tags": {"a": 1}}, "tags.a"),
    ({"user": 5}, "user"),
    ({"metadata": {str(place): "" for place in range(17)}}, "metadata"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS, ids=lambda value: json.dumps(value)[:40])
def test_a_bad_field_is_refused_by_name_and_costs_nothing(refusing: Served, fields: dict[str, Any], param: str) -> None:
    status, _, body = refusing.call("POST", "/v1/chat/completions", chat_body(**fields))
    assert (status, body["error"]["param"], body["error"]["type"]) == (400, param, "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": ["a"] * 17}, "n"),
    ],
)
def test_a_bad_field_of_a_text_completion_is_refused(refusing: Served, fields: dict[str, Any], param: str) -> None:
    status, _, body = refusing.call("POST", "/v1/completions", {"model": "tiny", "prompt": "a", **fields})
    assert (status, body["error"]["param"]) == (400, param)


@pytest.mark.parametrize("names", [("temperature", "n"), ("n", "temperature")])
def test_of_two_faults_the_first_in_the_body_is_named(refusing: Served, names: tuple[str, str]) -> None:
    wrong = dict.fromkeys(names, 9000)
    _, _, body = refusing.call("POST", "/v1/chat/completions", {**wrong, **chat_body()})
    assert body["error"]["param"] == names[0]


def test_a_prompt_that_does_not_fit_has_the_code_that_clients_match(refusing: Served) -> None:
    long = [{"role": "user", "content": "a" * 5_000}]
    status, _, body = refusing.call("POST", "/v1/chat/completions", chat_body(messages=long))
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", 400, "invalid_json"),
        (b'{"temperature": NaN, "model": "tiny"}', 400, "invalid_value"),
        (b" " * 70_000, 413, "request_too_large"),
    ],
)
def test_a_body_beyond_a_limit_is_refused(serve: Callable[..., Served], body: bytes, status: int, code: str) -> None:
    served = serve(max_body=65_536)
    found, _, answer = served.call("POST", "/v1/chat/completions", body)
    assert (found, answer["error"]["code"]) == (status, code)


def test_a_body_of_too_many_values_is_refused_unread(refusing: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes Python some microseconds: 4 MiB of empty lists held the event loop for seconds."""
    read_by: list[str] = []

    def parse(content: bytes, **limits: Any) -> dict[str, Any]:
        read_by.append(threading.current_thread().name)
        return parse_object(content, **limits)

    monkeypatch.setattr("polar_server.http.exchange.parse_object", parse)
    for value in (b"[],", b'"",', b'"' * 4):
        many = b'{"model": "tiny", "messages": [' + value * 1_000_000 + b"[]]}"
        status, _, body = refusing.call("POST", "/v1/chat/completions", many)
        assert (status, body["error"]["code"], read_by) == (413, "request_too_large", [])
    half = b'{"model": ' + b'"\\' * 1_000_000  # a string that begins everywhere and ends nowhere
    assert refusing.call("POST", "/v1/chat/completions", half)[2]["error"]["code"] == "invalid_json"
    read_by.clear()
    text = chat_body(messages=[{"role": "user", "content": 'a,[{"' * 200_000}])
    assert refusing.call("POST", "/v1/chat/completions", text)[2]["error"]["code"] == "context_length_exceeded"
    assert read_by[0].startswith("polar-body"), "large bodies are read beside the event loop"
    refusing.call("POST", "/v1/chat/completions", b"{")
    assert not read_by[1].startswith("polar-body")


def test_headers_and_bodies_that_do_not_end_hold_no_connection(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_server.deployment.uvicorn_server.HEADERS_S", 0.3)
    monkeypatch.setattr("polar_server.http.exchange.BODY_S", 0.3)
    served = serve()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    for sent, status in ((b"", b""), (head, b""), (head + b"content-length: 9\r\n\r\n{", b"408")):
        with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S) as connection:
            if sent:  # after another request
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                while not connection.recv(65_536).endswith(b"}"):
                    pass
                connection.sendall(sent)
            answer = b""
            while part := connection.recv(65_536):
                answer += part
        assert answer.partition(b"\r\n")[0][9:12] == status
    connection_of_one_that_waits = served.connect()
    for _ in range(2):
        connection_of_one_that_waits.request("GET", "/health")
        assert connection_of_one_that_waits.getresponse().read()
        time.sleep(0.6)  # between requests, a connection is kept
    connection_of_one_that_waits.close()


def test_a_chunked_body_is_counted_as_it_comes(serve: Callable[..., Served]) -> None:
    served = serve(max_body=65_536)
    connection = served.connect()
    connection.request("POST", "/v1/chat/completions", iter([b" " * 40_000] * 3), JSON, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_two_lengths_of_a_body_end_the_connection(refusing: Served) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", refusing.port), timeout=WAIT_S) as connection:
        connection.sendall(head + b"0\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_compressed_body_is_refused(refusing: Served) -> None:
    status, _, _ = refusing.call("POST", "/v1/chat/completions", b"x", {"content-encoding": "gzip"})
    assert status == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/files", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/none", 404),
    ],
)
def test_what_does_not_exist_is_a_json_error(refusing: Served, method: str, path: str, status: int) -> None:
    found, headers, body = refusing.call(method, path)
    assert found == status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "near"),
    [({"temprature": 1}, "temperature"), ({"guided_regx": "a"}, "guided_regex"), ({"zzzz": {}}, "remove it")],
)
def test_a_field_that_nobody_knows_is_refused_with_the_nearest(
    refusing: Served, serve: Callable[..., Served], fields: dict[str, Any], near: str
) -> None:
    status, _, body = refusing.call("POST", "/v1/chat/completions", chat_body(**fields))
    (name,) = fields
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "unknown_parameter", name)
    assert near in body["error"]["message"]
    lenient = serve(lenient=True)
    assert lenient.chat(**fields)["choices"]
    assert "polar_unknown_fields_total 1.0" in lenient.call("GET", "/metrics")[2]


def test_a_model_has_several_names(serve: Callable[..., Served], sink: RecordingSink) -> None:
    served = serve(name=["one", "two"])
    _, _, listed = served.call("GET", "/v1/models")
    tiers = ("", ":economy", ":standard", ":premium", ":exact")
    assert [model["id"] for model in listed["data"]] == [f"{name}{tier}" for name in ("one", "two") for tier in tiers]
    for model in ("one", "two", "two:economy"):
        assert served.chat(model=model)["model"] == model
    assert [record.tier for record in sink.records][2] == "economy"
    assert served.call("POST", "/v1/chat/completions", chat_body(model="three"))[0] == 404


class _Refusing(RecordingSink):
    """A sink that raises: at `check`, or at the Nth reservation."""

    def __init__(self, error: Exception, *, at: int = 0) -> None:
        super().__init__()
        self._error, self._at = error, at
        self.reserved = 0
        self.released: list[str] = []

    def check(self) -> None:
        if not self._at:
            raise self._error

    def reserve(self, bound: Any) -> int:
        with self._change:
            self.reserved += 1
            if self.reserved == self._at:
                raise self._error
        return 0

    def release(self, tenant: str, request_id: str) -> None:
        self.released.append(request_id)


def test_no_record_possible_no_compute(serve: Callable[..., Served]) -> None:
    sink = _Refusing(SinkError("the disk is full."))
    served = serve(sink=sink)
    status, headers, body = served.call("POST", "/v1/chat/completions", chat_body())
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "metering_unavailable", "1")
    assert served.call("GET", "/ready")[0] == 503
    assert served.call("GET", "/health")[0] == 200
    assert sink.records == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_without_room_for_all_choices_runs_none(serve: Callable[..., Served], stream: bool) -> None:
    sink = _Refusing(BudgetExceededError("tenant 'acme' has 0 EUR left."), at=2)
    served = serve(sink=sink)
    status, headers, body = served.call("POST", "/v1/chat/completions", chat_body(n=4, stream=stream))
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (429, "insufficient_quota", "false")
    assert sink.records == []
    assert len(sink.released) == 3
    assert not served.server.sink.due


def test_the_document_describes_every_route_and_what_bodies_may_hold(served: Served) -> None:
    _, _, document = served.call("GET", "/openapi.json")
    for route in served.app.routes:
        path = route.path.replace(":path", "")  # type: ignore[attr-defined]
        assert path in document["paths"]
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator(schema)
    assert validator.is_valid(chat_body(stop=["a"], tags={"a": "b"}, logit_bias={"5": 1}, seed=1, store=False))
    for name, value in (("temperature", 3), ("n", 1.5), ("stop", [1]), ("tags", {"a": 1}), ("store", True)):
        assert not validator.is_valid(chat_body(**{name: value})), name
    assert not validator.is_valid({"model": "tiny"})
