"""Tiers that another server computes: answers and bills as of the engine's own, and what happens when it fails."""

from __future__ import annotations

import json
import socket
import threading
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.ledger.records import Selection
from polar_billing.metering.meter import Meter
from polar_billing.reports.formula import work_out
from polar_sdk import ListSink, PolarModel, Program
from polar_sdk.errors import ExportError, InvalidRequestError
from polar_sdk.programs.policy import Policy
from polar_sdk.testing import tiny_llama, tiny_policy, tiny_tokenizer
from tests.integrations.server.conftest import WAIT_S, RecordingSink, chat_body
from tests.integrations.server.test_disconnects import endless, executed, read_events, send_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integrations.server.conftest import Served

ECONOMY = "0 3-5"


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> PolarModel:
    """The program of economy as a model of its own, as an upstream loads it."""
    whole = tiny_llama(max_position_embeddings=4096)
    tiny = PolarModel.from_hf(whole, tiny_tokenizer(), policy=tiny_policy(6), ledger=None)
    folder = tiny.export(ECONOMY, tmp_path_factory.mktemp("exported") / "economy")
    return PolarModel.from_pretrained(folder, policy=tiny_policy(4), ledger=None, precision="float32")


@pytest.fixture
def upstream(serve: Callable[..., Served], smaller: PolarModel) -> Served:
    return serve(engine=PolarModel(smaller.loaded, policy=smaller.policy, sink=ListSink()))


@pytest.fixture
def front(serve: Callable[..., Served], upstream: Served) -> Served:
    return serve(backends={"economy": [upstream.url]})


def ask(served: Served, **fields: Any) -> tuple[int, dict[str, str], Any]:
    return served.call("POST", "/v1/chat/completions", chat_body(model="tiny:economy", **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "temperature": 1.2, "seed": 5},
        {"stop": ["e", "a", "\x01"]},
        {"max_tokens": 1},
        {"frequency_penalty": 1.5, "logit_bias": {"66": 4.0}},
    ],
)
def test_the_answer_and_its_bill_are_those_of_the_engine(
    front: Served, serve: Callable[..., Served], sink: RecordingSink, fields: dict[str, Any]
) -> None:
    own = serve()
    status, headers, relayed = ask(front, **{"max_tokens": 20, **fields})
    assert status == 200, relayed
    local = ask(own, **{"max_tokens": 20, **fields})[2]
    assert relayed["choices"] == local["choices"]
    assert relayed["polar"]["program"] == headers["x-polar-program"] == ECONOMY
    count = len(relayed["choices"])
    for there, here in zip(sink.records[:count], sink.records[count:], strict=True):
        assert there.tags.pop("polar.measured_by") == "upstream"  # type: ignore[attr-defined]
        assert there.device == "upstream"
        same = ("tenant", "tags", "tier", "program", "outcome", "finish_reason", "visits", "flops", "identity_flops")
        for name in (*same, "model", "model_fingerprint", "router"):
            assert getattr(there, name) == getattr(here, name) or here.tokens.cached or there.tokens.cached, name
        assert there.tokens.output == here.tokens.output
        assert there.flops.total == executed(front, there)
        assert work_out(there, front.server.engine.decoder.cost).difference == 0


def test_a_stream_carries_what_the_whole_answer_does(front: Served) -> None:
    whole = ask(front, max_tokens=12)[2]
    events = front.events(**chat_body(model="tiny:economy", max_tokens=12), stream_options={"include_usage": True})
    assert events.pop() == "[DONE]"
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 12
    assert len([event for event in events if event["choices"]]) > 5, "it came in pieces"


def test_other_tiers_run_here_and_models_say_what_runs_where(front: Served, upstream: Served) -> None:
    before = len(upstream.records)
    assert front.chat()["polar"]["tier"] == "standard"
    assert front.chat(model="tiny:exact")["polar"]["program"] == "0-5"
    assert front.chat(program=ECONOMY)["polar"]["tier"] is None
    assert len(upstream.records) == before
    entry = front.call("GET", "/v1/models/tiny:economy")[2]["polar"]
    assert (entry["program"], entry["certified"]) == (ECONOMY, False)
    _, _, quote = front.call("POST", "/v1/polar/quote", chat_body(model="tiny:economy"))
    assert (quote["requested"]["tier"], quote["requested"]["program"]) == ("economy", ECONOMY)


def test_a_front_before_a_front(serve: Callable[..., Served], front: Served, sink: RecordingSink) -> None:
    outer = serve(backends={"economy": [f"{front.url}/v1#tiny:economy"]})
    assert ask(outer, max_tokens=9)[2]["choices"] == ask(front, max_tokens=9)[2]["choices"]
    assert [record.tags["polar.measured_by"] for record in sink.records] == ["upstream"] * 3
    assert len({record.flops.total for record in sink.records}) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_cut_is_billed_by_what_arrived(
    front: Served, upstream: Served, sink: RecordingSink, stream: bool
) -> None:
    body = endless(front, stream=stream, model="tiny:economy")
    with send_request(front, body) as connection:
        if stream:
            read_events(connection, 6)
        else:
            _wait_for(lambda: any(mark.tokens.output > 5 for mark in sink.marks))
    (record,) = sink.wait_for(1)
    assert (record.outcome, record.tags["polar.measured_by"]) == ("cancelled", "relay")
    assert 4 <= record.tokens.output < 2_000
    assert record.flops.total == executed(front, record)
    _wait_for(lambda: len(upstream.records) == 1)
    assert record.tokens.output <= upstream.records[0].tokens.output < 2_000, "it stopped there as well"
    assert not front.server.sink.due


def _wait_for(is_so: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    ],
)
def test_what_an_upstream_cannot_do_is_refused_by_name(
    front: Served, sink: RecordingSink, fields: dict[str, Any]
) -> None:
    status, _, body = ask(front, **fields)
    assert (status, body["error"]["param"]) == (400, next(iter(fields)))
    assert "economy" in body["error"]["message"]
    assert not sink.records


def test_nobody_there(serve: Callable[..., Served], sink: RecordingSink) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    served = serve(backends={"economy": [f"http://127.0.0.1:{port}"]})
    status, headers, body = ask(served)
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "upstream_unavailable", "1")
    assert (sink.records, served.server.sink.due) == ([], frozenset())
    assert served.chat()["polar"]["tier"] == "standard", "other tiers go on"


def test_where_one_upstream_is_gone_another_one_answers(serve: Callable[..., Served], upstream: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    served = serve(backends={"economy": [f"http://127.0.0.1:{port}", upstream.url]})
    assert [ask(served)[0] for _ in range(3)] == [200] * 3
    first, second = served.server.tiers.backends["economy"].places
    assert (first.running, second.running, first.down_until > 0) == (0, 0, True)


class Scripted:
    """A server of OpenAI's API that answers completions as it is told."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.bodies: list[dict[str, Any]] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                received = b""
                while b"\r\n\r\n" not in received:
                    received += connection.recv(65_536)
                head, _, body = received.partition(b"\r\n\r\n")
                if head.startswith(b"GET /v1/models "):
                    listed = json.dumps({"data": [{"id": "m", "owned_by": "vllm"}]}).encode()
                    connection.sendall(_head(200, "application/json", len(listed)) + listed)
                    continue
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                while len(body) < length:
                    body += connection.recv(65_536)
                self.bodies.append(json.loads(body))
                connection.sendall(self._answer)

    def close(self) -> None:
        self._socket.close()


def _head(status: int, kind: str, length: int | None = None) -> bytes:
    size = "" if length is None else f"content-length: {length}\r\n"
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{size}connection: close\r\n\r\n".encode()


def _event(text: str, written: int | None = None, read: int = 4, cached: int | None = None) -> bytes:
    usage: dict[str, Any] | None = None if written is None else {"prompt_tokens": read, "completion_tokens": written}
    if usage is not None and cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    data = {"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": usage}
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n\n"


def _stream(*events: bytes) -> bytes:
    return _head(200, "text/event-stream") + b"".join(events) + b"data: [DONE]\n\n"


@pytest.fixture
def scripted() -> Iterator[Callable[[bytes], Scripted]]:
    made: list[Scripted] = []

    def make(answer: bytes) -> Scripted:
        made.append(Scripted(answer))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("counted", [True, False])
def test_an_upstream_that_breaks_off(
    serve: Callable[..., Served], scripted: Callable[[bytes], Scripted], sink: RecordingSink, counted: bool
) -> None:
    sent = b"".join(_event("AB", 3 * n if counted else None) for n in range(1, 6))
    there = scripted(_head(200, "text/event-stream") + sent)
    served = serve(backends={"economy": [there.url]})
    events = served.events(**chat_body(model="tiny:economy", max_tokens=100))
    assert events[-1]["error"]["code"] == "upstream_lost"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "AB" * 5
    (record,) = sink.records
    assert (record.outcome, record.error) == ("error", "UpstreamError")
    counts = (15, "upstream") if counted else (10, "relay")
    assert (record.tokens.output, record.tags["polar.measured_by"]) == counts
    assert (record.tokens.cached, record.tags["polar.unstated"]) == (0, "cached")
    assert record.flops.total == executed(served, record)
    assert there.bodies[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert there.bodies[0]["prompt"] == list(served.server.engine.prompt_tokens([{"role": "user", "content": "hi"}]))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("said", [(None, None), (None, 3), (3, 3), (0, 0)])
def test_cached_tokens_that_an_upstream_does_not_state_count_as_run(
    serve: Callable[..., Served],
    scripted: Callable[[bytes], Scripted],
    sink: RecordingSink,
    said: tuple[int | None, int | None],
    cut: bool,
) -> None:
    first, last = _event("A", 1, cached=said[0]), _event("", 1, cached=said[1])
    there = scripted(_head(200, "text/event-stream") + first if cut else _stream(first, last))
    served = serve(backends={"economy": [there.url]})
    ask(served)
    (record,) = sink.records
    known = said[0] if cut else said[1]
    assert (record.tokens.cached, record.tags.get("polar.unstated")) == (
        known or 0,
        "cached" if known is None else None,
    )
    assert record.flops.total == executed(served, record)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_lines_of_a_stream_end_by_cr_and_lf_alone(
    serve: Callable[..., Served], scripted: Callable[[bytes], Scripted], line_end: bytes
) -> None:
    text = "a\u2028b\u2029c\u0085d"
    there = scripted(_stream(_event(text), _event("e", 11)).replace(b"\n\n", line_end * 2))
    found = ask(serve(backends={"economy": [there.url]}), max_tokens=20)[2]
    assert found["choices"][0]["message"]["content"] == text + "e"


@pytest.mark.parametrize(
    ("events", "written", "disputed"),
    [
        ([_event("ABC", 5_008)], 3, "usage"),
        ([_event("ABC", 3, read=5_000)], 3, "usage"),
        ([_event("A" * 20), _event("", 0, read=0)], 8, "usage"),
        ([_event("AB", 2**70)], 2, "usage"),
        ([_event("AB", -1)], 2, "usage"),
        ([_event("AB", "many")], 2, "usage"),  # type: ignore[arg-type]
        ([_event("A")] * 1_000, 8, "length"),
        ([_event("A" * 100_000, 8)], 8, "length"),
        ([_event("A\\ud800B", 3).replace(b"\\\\", b"\\")], 3, None),
    ],
)
def test_an_upstream_is_believed_within_the_request(
    serve: Callable[..., Served],
    scripted: Callable[[bytes], Scripted],
    sink: RecordingSink,
    events: list[bytes],
    written: int,
    disputed: str | None,
) -> None:
    served = serve(backends={"economy": [scripted(_stream(*events)).url]})
    status, _, body = ask(served)
    assert status == 200
    (record,) = sink.records
    assert (record.tokens.input, record.tokens.output) == (4, written)
    assert record.flops.total == executed(served, record)
    assert record.tags.get("polar.disputed") == disputed
    assert record.tags["polar.measured_by"] == ("relay" if disputed else "upstream")
    assert served.server.sink.due == frozenset()
    longest = served.server.tiers.backends["economy"].longest_token
    text = body["choices"][0]["message"]["content"]
    assert len(text) <= (8 * longest if len(events) < 9 else 9), "no longer than was asked, in pieces and in characters"
    counted = f"polar_disputed_requests_total {float(disputed is not None)}"
    assert counted in served.call("GET", "/metrics")[2]


def test_a_line_that_does_not_end_ends_the_answer(
    serve: Callable[..., Served], scripted: Callable[[bytes], Scripted], sink: RecordingSink
) -> None:
    there = scripted(_head(200, "text/event-stream") + _event("A") + b"data: " + b"x" * 3_000_000)
    assert ask(serve(backends={"economy": [there.url]}))[2]["error"]["code"] == "upstream_error"
    assert [record.outcome for record in sink.records] == ["error"]


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, {"message": "maximum context length is 10", "code": 400}, (400, "upstream_refused")),
        (400, {"message": "too long", "code": "context_length_exceeded"}, (400, "context_length_exceeded")),
        (401, {"message": "no key"}, (502, "upstream_error")),
        (429, {"message": "busy"}, (503, "overloaded")),
        (500, {"message": "broken"}, (502, "upstream_error")),
        (503, {"message": "ends"}, (503, "overloaded")),
    ],
)
def test_errors_of_an_upstream(
    serve: Callable[..., Served],
    scripted: Callable[[bytes], Scripted],
    sink: RecordingSink,
    status: int,
    body: dict[str, Any],
    expected: tuple[int, str],
) -> None:
    content = json.dumps({"error": body}).encode()
    there = scripted(_head(status, "application/json", len(content)) + content)
    served = serve(backends={"economy": [there.url]})
    found, _, answer = ask(served)
    assert (found, answer["error"]["code"]) == expected
    assert body["message"] in answer["error"]["message"]
    assert (sink.records, served.server.sink.due) == ([], frozenset()), "nothing ran, nothing is held"


def test_a_time_limit_and_an_upstream_that_says_nothing(
    serve: Callable[..., Served], upstream: Served, sink: RecordingSink
) -> None:
    served = serve(backends={"economy": [upstream.url]}, timeout=0.3)
    status, _, body = served.call("POST", "/v1/chat/completions", endless(served, model="tiny:economy"))
    assert (status, body["error"]["code"]) == (408, "timeout")
    (record,) = sink.records
    assert record.outcome == "cancelled"
    assert record.flops.total == (executed(served, record) if record.tokens.output else 0)


def test_a_budget_holds_and_settles(serve: Callable[..., Served], upstream: Served, ledger_url: str) -> None:
    with Meter(ledger_url) as meter:
        served = serve(sink=meter, backends={"economy": [upstream.url]})
        cost = served.server.engine.decoder.cost
        most = cost.request(Program.parse(ECONOMY), 6, 8).total
        Budgets(meter.ledger).set(Budget("acme", Decimal(int(most * 1.5)).scaleb(-12)))
        assert ask(served)[0] == 200
        status, _, body = ask(served)
        assert (status, body["error"]["code"]) == (429, "insufficient_quota")
        (stored,) = meter.ledger.read(Selection("acme"))
        assert stored.record.tags["polar.measured_by"] == "upstream"
        (standing,) = Budgets(meter.ledger).standings("acme")
        assert (standing.held, standing.spent > 0) == (0, True)


@pytest.mark.parametrize(
    ("backends", "said"),
    [
        ({"cheap": ["http://a"]}, "no tier 'cheap'"),
        ({"economy": ["a:8000"]}, "not the URL of a server"),
        ({"economy": ["http://me:secret@a"]}, "not the URL of a server"),
    ],
)
def test_backends_that_cannot_be(serve: Callable[..., Served], backends: dict[str, list[str]], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        serve(backends=backends)


def test_a_program_that_no_plain_model_runs(serve: Callable[..., Served], tiny: PolarModel) -> None:
    policy = Policy.model_validate({"protected": [0], "tiers": {"economy": {"program": "0 1x2 3-5"}}})
    engine = PolarModel(tiny.loaded, policy=policy, sink=ListSink())
    with pytest.raises(ExportError, match="layer 1"):
        serve(engine=engine, backends={"economy": ["http://127.0.0.1:1"]})


def test_an_upstream_with_several_models_must_be_told_which(
    serve: Callable[..., Served], front: Served, tmp_path: Path
) -> None:
    served = serve(backends={"economy": [f"{front.url}#other"]})
    status, _, body = ask(served)
    assert (status, body["error"]["code"]) == (502, "upstream_error")
    assert "no model 'other'" in body["error"]["message"]
