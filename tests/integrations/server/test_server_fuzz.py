"""Bodies, queries and bytes that no client would send: never a 5xx, never a traceback, and the engine lives on."""

from __future__ import annotations

import json
import urllib.parse
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_billing.access.accounts import Accounts
from polar_sdk import NullSink
from polar_sdk.testing import tiny_model
from polar_server import Settings
from polar_server.endpoints import account
from polar_server.openai.chat import ChatBody
from polar_server.openai.completions import TextBody
from polar_server.openai.responses import ResponseBody
from tests.integrations.conftest import paths_of, replaced
from tests.integrations.server.conftest import Served
from tests.integrations.server.test_responses import WEATHER as FLAT
from tests.integrations.server.test_tools_over_http import WEATHER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from polar_server.openai.calls import CallBody

_EXAMPLES = [12, pytest.param(500, marks=pytest.mark.long)]
_CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "properties": {}}}}
_BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {
        "model": "tiny",
        "max_tokens": 3,
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "x"}]},
        ],
        "tools": [WEATHER],
        "tool_choice": "auto",
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "stream": True,
        "stream_options": {"include_usage": True},
        "metadata": {"a": "b"},
    },
    "completions": {"model": "tiny", "prompt": ["ab", [1, 2]], "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2},
    "responses": {
        "model": "tiny",
        "max_output_tokens": 3,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
        "tools": [FLAT],
        "text": {"format": {"type": "text"}},
        "include": ["message.output_text.logprobs"],
        "stream": True,
    },
    "polar/quote": {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "x"}]},
}
_MODELS: dict[str, type[CallBody]] = {
    "chat/completions": ChatBody,
    "completions": TextBody,
    "responses": ResponseBody,
    "polar/quote": ChatBody,
}
_texts = st.text(st.characters(codec=None), max_size=8)  # lone surrogates, which JSON can escape, included
_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63, -(2**63), 2**70, 1e308, -0.0, 0.5]),
    _texts,
    st.sampled_from(["auto", "none", "function", "object", "tiny", "text", "user", "tool", "json_schema", "\0", ""]),
    st.just(_FORMAT),
)
_keys = st.one_of(
    _texts, st.sampled_from(["type", "name", "role", "content", "function", "parameters", "schema", "$ref"])
)
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3), max_leaves=8
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("ledger")
    engine = tiny_model(sink=NullSink(), context_window=512)
    accounts = Accounts(f"sqlite:///{folder / 'ledger.sqlite3'}")
    served = Served(Settings(engine=engine, name="tiny", drain=0.0, accounts=accounts))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(account, "_PAUSES_S", (0.0,))  # no record is on its way, and to wait for each takes an hour
        yield served
    status, _, body = served.call("POST", "/v1/completions", _BODIES["completions"])
    served.close()
    assert status == 200, body


def check(served: Served, method: str, path: str, content: bytes | None) -> None:
    """Send it; whatever it is, the answer is of a kind that clients know."""
    status, headers, body = served.call(method, path, content)
    shown = json.dumps(body) if isinstance(body, dict) else body
    assert status < 500, (status, shown, content)
    assert "Traceback" not in shown
    assert "internal_error" not in shown, (shown, content)
    if status >= 400:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert len(body["error"]["message"]) < 2_000
        assert headers["x-request-id"]


def many(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Run a function with so many examples."""

    def run(function: Callable[..., None]) -> None:
        settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(
            given(**strategies)(function)
        )()

    return run


@pytest.mark.parametrize("examples", _EXAMPLES)
@pytest.mark.parametrize("endpoint", list(_BODIES))
def test_a_changed_body_is_answered_or_refused(fuzzed: Served, endpoint: str, examples: int) -> None:
    fields = sorted(_MODELS[endpoint].model_fields)

    @many(examples, data=st.data())
    def change(data: st.DataObject) -> None:
        body: Any = _BODIES[endpoint]
        for _ in range(data.draw(st.integers(1, 2))):
            if data.draw(st.booleans()) and isinstance(body, dict):
                body = {**body, data.draw(st.sampled_from(fields)): data.draw(_values)}
            else:
                body = replaced(body, data.draw(st.sampled_from(paths_of(body))), data.draw(_values))
        check(fuzzed, "POST", f"/v1/{endpoint}", json.dumps(body).encode())


@pytest.mark.parametrize("examples", _EXAMPLES)
def test_a_damaged_body_is_answered_or_refused(fuzzed: Served, examples: int) -> None:
    @many(examples, data=st.data(), content=st.binary(max_size=40))
    def damage(data: st.DataObject, content: bytes) -> None:
        endpoint = data.draw(st.sampled_from(list(_BODIES)))
        whole = json.dumps(_BODIES[endpoint]).encode()
        start = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(start, len(whole)))
        check(fuzzed, "POST", f"/v1/{endpoint}", whole[:start] + content + whole[end:])


_NAMES = ["by", "month", "since", "until", "zone", "currency", "input_tokens", "max_tokens", "x"]
_QUESTIONS = {
    "path": st.sampled_from(["polar/usage", "polar/quote", "polar/receipts/", "models/", ""]),
    "names": st.lists(st.sampled_from(_NAMES), max_size=3),
    "values": st.lists(
        st.text(max_size=12) | st.sampled_from(["tier", "2026-11", "tag:x", "9999-12-31", "5"]), min_size=3, max_size=3
    ),
    "raw": st.binary(max_size=12),
}


@pytest.mark.parametrize("examples", _EXAMPLES)
def test_a_strange_question_is_answered_or_refused(fuzzed: Served, examples: int) -> None:
    @many(examples, **_QUESTIONS)
    def ask(path: str, names: list[str], values: list[str], raw: bytes) -> None:
        query = urllib.parse.urlencode(list(zip(names, values, strict=False)), errors="replace")
        tail = urllib.parse.quote(raw) if path.endswith("/") else ""
        check(fuzzed, "GET", f"/v1/{path}{tail}?{query}", None)
