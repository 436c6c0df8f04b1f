"""Streams: the same answer as without `stream`, in events that clients can rely on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.integrations.server.conftest import JSON, RecordingSink, chat_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integrations.server.conftest import Served

_BODIES = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=12)}
            ),
            max_size=3,
        ).map(lambda messages: [*messages, {"role": "user", "content": "ask"}]),
        "max_tokens": st.integers(1, 24),
        "n": st.integers(1, 3),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "temperature": st.sampled_from([0, 0.7, 1.5]),
        "model": st.sampled_from(["tiny", "tiny:economy", "tiny:exact"]),
    },
    optional={
        "stop": st.lists(st.sampled_from(["@", "A", "o", "\ufffd", "ab", " "]), min_size=1, max_size=3),
        "logprobs": st.just(True),
        "frequency_penalty": st.sampled_from([0.5, 2]),
    },
)


def joined(events: list[Any]) -> dict[str, Any]:
    """Put an answer together from a stream, as a client does; checks the rules on the way."""
    assert events[-1] == "[DONE]"
    *pieces, last = events[:-1]
    assert last["choices"] == []
    for name in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({event[name] for event in [*pieces, last]}) == 1
    choices: dict[int, dict[str, Any]] = {}
    for event in pieces:
        assert event["usage"] is None
        (choice,) = event["choices"]
        if choice["index"] not in choices:
            assert choice["delta"] == {"role": "assistant", "content": ""}
            choices[choice["index"]] = {"text": "", "finish": None, "logprobs": []}
            continue
        found = choices[choice["index"]]
        assert found["finish"] is None, "a piece after the end"
        found["finish"] = choice["finish_reason"]
        if choice["finish_reason"] is not None:
            assert choice["delta"] == {}
            continue
        found["text"] += choice["delta"]["content"]
        found["logprobs"] += (choice["logprobs"] or {}).get("content", [])
    return {"choices": [choices[index] for index in sorted(choices)], "usage": last["usage"], "polar": last["polar"]}


def whole(body: dict[str, Any]) -> dict[str, Any]:
    """The same of an answer that was not streamed."""
    choices = [
        {
            "text": choice["message"]["content"],
            "finish": choice["finish_reason"],
            "logprobs": (choice["logprobs"] or {}).get("content", []),
        }
        for choice in body["choices"]
    ]
    return {"choices": choices, "usage": body["usage"], "polar": body["polar"]}


def entries_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for choice in answer["choices"] for entry in choice["logprobs"]]


@pytest.fixture(scope="module")
def shared(tiny: Any) -> Any:
    """One server for all examples; starts of prompts are not kept, as they would make the second answer cheaper."""
    from dataclasses import replace

    from polar_sdk.testing import tiny_model
    from polar_server import Settings
    from tests.integrations.server.conftest import Served

    engine = tiny_model(sink=RecordingSink())
    engine.scheduler.limits = replace(engine.scheduler.limits, prefix_share=0.0)
    served = Served(Settings(engine=engine, name="tiny", drain=0.0))
    yield served
    served.close()


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.long)])
def test_a_stream_carries_what_the_whole_answer_does(shared: Served, examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(body=_BODIES)
    @example(
        body={  # the stop string breaks off a character
            "messages": [
                {"role": "user", "content": ""},
                {"role": "system", "content": ""},
                {"role": "system", "content": "\\°"},
                {"role": "user", "content": "ask"},
            ],
            "max_tokens": 5,
            "seed": 0,
            "temperature": 0.7,
            "model": "tiny",
            "logprobs": True,
            "stop": [" "],
        }
    )
    def compare(body: dict[str, Any]) -> None:
        streamed = joined(shared.events(**body, stream_options={"include_usage": True}))
        at_once = whole(shared.chat(**body))
        for answer in (streamed, at_once):
            for name in ("receipt", "receipts"):
                answer["polar"].pop(name)
        # In other company a row's sums may round differently.
        numbers = [[entry.pop("logprob") for entry in entries_of(answer)] for answer in (streamed, at_once)]
        assert streamed == at_once
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
        for choice in at_once["choices"]:
            if body.get("logprobs"):
                raw = bytes(byte for entry in choice["logprobs"] for byte in entry["bytes"])
                assert raw.decode("utf-8", "replace") == choice["text"]

    compare()


def test_text_completions_stream_the_same(served: Served) -> None:
    body = {"model": "tiny", "prompt": ["ab", "c"], "n": 2, "max_tokens": 9, "temperature": 1, "seed": 3, "echo": True}
    events = served.events("/v1/completions", **body)
    _, _, at_once = served.call("POST", "/v1/completions", body)
    texts = dict.fromkeys(range(4), "")
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert [texts[index] for index in range(4)] == [choice["text"] for choice in at_once["choices"]]


def test_usage_comes_only_when_asked_for_or_always(serve: Callable[..., Served]) -> None:
    plain = serve().events(**chat_body())
    assert not any("usage" in event for event in plain[:-1])
    assert plain[-2]["choices"][0]["finish_reason"] == "length"
    assert plain[-2]["polar"]["flops"] > 0
    assert plain[-2]["cost"] > 0
    assert not any("polar" in event for event in plain[:-2])
    always = serve(usage_always=True).events(**chat_body())
    assert always[-2]["usage"]["completion_tokens"] == 8


def test_headers_say_the_program_before_the_first_token(served: Served) -> None:
    _, headers, _ = served.call("POST", "/v1/chat/completions", chat_body(stream=True, model="tiny:economy"))
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-polar-program"] == "0 3-5"
    assert headers["x-polar-tier"] == "economy"


def test_an_error_before_the_first_token_is_an_http_error(served: Served, sink: RecordingSink) -> None:
    status, headers, body = served.call("POST", "/v1/chat/completions", chat_body(stream=True, program="0-99"))
    assert (status, body["error"]["param"]) == (400, "program")
    assert headers["content-type"] == "application/json"
    assert sink.records == []


def test_a_stream_that_waits_sends_comments(serve: Callable[..., Served], sink: RecordingSink) -> None:
    served = serve(keep_alive=0.01)
    sink.gate.clear()
    connection = served.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(chat_body(stream=True)), JSON)
    answer = connection.getresponse()
    assert answer.readline() == b": keep-alive\n"
    sink.gate.set()
    text = answer.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    connection.close()


def test_an_answer_out_of_time_is_408_or_an_event(serve: Callable[..., Served], sink: RecordingSink) -> None:
    served = serve(timeout=0.000_001)
    status, headers, body = served.call("POST", "/v1/chat/completions", chat_body())
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (408, "timeout", "false")
    assert sink.wait_for(1)[0].outcome == "cancelled"
