"""Clients that leave and servers that end: compute stops within a token, and what ran is recorded, to the FLOP."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from polar_sdk import Program
from polar_sdk.testing import tiny_model
from polar_server.answers import Answer
from tests.integrations.server.conftest import JSON, WAIT_S, RecordingSink, chat_body

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polar_sdk import PolarModel, UsageRecord
    from polar_server.upstream.tiers import Tiers
    from tests.integrations.server.conftest import Served


def executed(served: Served, record: UsageRecord) -> int:
    """FLOPs of a record's tokens by the formula: the prompt, and a pass per token after the first."""
    cost = served.server.engine.decoder.cost
    program = Program.of(record.program)
    return cost.request(program, record.tokens.input, record.tokens.output, cached=record.tokens.cached).total


def endless(served: Served, **fields: Any) -> dict[str, Any]:
    """A call whose answer is the letter A for as long as it may be, one event per token."""
    letter = served.server.engine.encode("A")[0]
    return chat_body(**{"max_tokens": 2_000, "logit_bias": {str(letter): 100}, **fields})


def send_request(served: Served, body: dict[str, Any], headers: dict[str, str] | None = None) -> socket.socket:
    """Send a call, and read nothing."""
    content = json.dumps(body).encode()
    lines = {**JSON, "host": "test", "content-length": str(len(content)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S)
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + content)
    return connection


def computed(engine: PolarModel) -> int:
    """Tokens of the answers that have a place now."""
    return sum(len(job.tokens) for job in list(engine.scheduler._places.jobs))


@pytest.fixture
def tokens_at_leave(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that had been computed whenever the server noticed that a client had left."""
    noted: list[int] = []
    leave = Answer.leave

    def noting(self: Answer) -> None:
        if not self._cancel.is_set():
            noted.append(computed(cast("Tiers", self._engine).engine))
        leave(self)

    monkeypatch.setattr(Answer, "leave", noting)
    return noted


@pytest.mark.parametrize("trials", [4, pytest.param(150, marks=pytest.mark.long)])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_at_a_random_moment_is_billed_what_ran(
    serve: Callable[..., Served], sink: RecordingSink, tokens_at_leave: list[int], stream: bool, trials: int
) -> None:
    served = serve()
    chance = random.Random(5)
    for trial in range(trials):
        wanted = chance.randrange(0, 24)  # 0: it leaves at once, whatever the server does then
        with send_request(served, endless(served, stream=stream, program="0-5")) as connection:
            if stream:
                read_events(connection, wanted)
            elif wanted:
                wait_for_tokens(served, wanted)
        record = sink.wait_for(trial + 1)[trial]
        assert (record.outcome, record.finish_reason) == ("cancelled", "cancelled")
        assert record.tokens.output < 2_000
        if record.tokens.output:
            assert record.flops.total == executed(served, record)
        else:
            assert record.flops.layers_decode == 0
        assert record.tokens.output <= tokens_at_leave[-1] + 1
    assert not served.server.sink.due
    assert len(served.server.engine.scheduler) == 0


def read_events(connection: socket.socket, count: int) -> None:
    """Read a stream up to so many events."""
    received = b""
    while received.count(b"data: ") < count:
        part = connection.recv(4096)
        assert part, received
        received += part


def wait_for_tokens(served: Served, count: int) -> None:
    """Wait until the one running job has so many tokens."""
    deadline = time.monotonic() + WAIT_S
    while computed(served.server.engine) < count:
        assert time.monotonic() < deadline
        time.sleep(0)


def test_a_client_that_leaves_before_admission_costs_nothing(serve: Callable[..., Served], sink: RecordingSink) -> None:
    served = serve()
    sink.gate.clear()
    connection = send_request(served, chat_body(stream=True))
    assert sink.asked.acquire(timeout=WAIT_S)
    connection.close()
    until_left(served)
    sink.gate.set()
    (record,) = sink.wait_for(1)
    assert (record.outcome, record.flops.total, record.tokens.output) == ("cancelled", 0, 0)


def until_left(served: Served) -> None:
    """Wait until the server has noticed that its one client left."""
    deadline = time.monotonic() + WAIT_S
    while not all(answer._cancel.is_set() for answer in served.server.answers._open):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_client_that_leaves_while_queued_costs_nothing(serve: Callable[..., Served], sink: RecordingSink) -> None:
    """Every row is taken, so the last request waits."""
    engine = tiny_model(sink=sink, context_window=4096)
    engine.scheduler.limits = replace(engine.scheduler.limits, max_rows=1)
    served = serve(engine=engine)
    letter, cancel = engine.encode("A")[0], threading.Event()

    def only_letters(tokens: Sequence[int], logits: Tensor) -> Tensor:
        logits[letter] += 100
        return logits

    # Not over HTTP, where a reader may pause on a busy machine: then its row gives way to the one that waits.
    options: dict[str, Any] = {"max_tokens": 2_000, "logits_hook": only_letters, "cancel": cancel}
    running = threading.Thread(target=engine.generate, args=("x",), kwargs=options)
    running.start()
    try:
        wait_for_tokens(served, 2)
        with send_request(served, chat_body()):
            while len(engine.scheduler) < 2:
                assert sink.records == []
        (record,) = sink.wait_for(1)
        assert (record.outcome, record.flops.total, record.tokens.output) == ("cancelled", 0, 0)
    finally:
        cancel.set()
        running.join()
    sink.wait_for(2)


def test_a_client_that_leaves_in_prefill_stops_it_after_a_piece(
    serve: Callable[..., Served], sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_model(sink=sink, context_window=4096)
    engine.scheduler.limits = replace(engine.scheduler.limits, prefill_alone=512, prefill_beside=512)
    served = serve(engine=engine)
    scheduler = engine.scheduler
    connections: list[socket.socket] = []
    run = scheduler._run_chunks

    def leaving(jobs: Any, chunks: Any) -> None:
        run(jobs, chunks)
        if connections:
            connections.pop().close()
            until_left(served)

    monkeypatch.setattr(scheduler, "_run_chunks", leaving)
    connections.append(send_request(served, chat_body(messages=[{"role": "user", "content": "a" * 3_000}])))
    (record,) = sink.wait_for(1)
    assert (record.outcome, record.tokens.output) == ("cancelled", 0)
    # Each layer was visited once: for one piece of 512 tokens, of six.
    assert record.visits.prefill == Program.of(record.program).visits(engine.depth)
    assert record.flops.layers_prefill > 0


def test_one_reader_that_is_slow_holds_up_nobody(serve: Callable[..., Served], sink: RecordingSink) -> None:
    """It reads nothing; its answer is computed to the end all the same, and others are served."""
    served = serve()
    with ExitStack() as stack:
        body = endless(served, stream=True, max_tokens=150)
        slow = [stack.enter_context(send_request(served, body)) for _ in range(3)]
        assert served.chat(max_tokens=4)["usage"]["completion_tokens"] == 4
        assert {record.outcome for record in sink.wait_for(4)} == {"completed"}
        for connection in slow:
            received = b""
            while b"[DONE]" not in received:
                received += connection.recv(65_536)


def test_answers_that_run_finish_and_new_ones_are_refused(serve: Callable[..., Served], sink: RecordingSink) -> None:
    served = serve(drain=20.0)
    sink.gate.clear()
    found: dict[str, Any] = {}
    asking = threading.Thread(target=lambda: found.update(served.chat(max_tokens=5)))
    asking.start()
    assert sink.asked.acquire()
    served.signal()
    waited_for = served.connect()
    while not served.server.answers.draining:
        pass
    waited_for.request("GET", "/ready")
    assert waited_for.getresponse().status == 503
    status, headers, body = served.call("POST", "/v1/chat/completions", chat_body())
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "shutting_down", "1")
    sink.gate.set()
    asking.join()
    served.thread.join()
    assert found["usage"]["completion_tokens"] == 5
    assert [record.outcome for record in sink.records] == ["completed"]
    waited_for.close()


def test_what_outlasts_the_drain_is_stopped_and_recorded(serve: Callable[..., Served], sink: RecordingSink) -> None:
    served = serve(drain=0.05)
    streams = [send_request(served, endless(served, stream=True, max_tokens=3_000)) for _ in range(3)]
    for connection in streams:
        read_events(connection, 3)
    served.signal()
    served.thread.join()
    assert [record.outcome for record in sink.records] == ["cancelled"] * 3
    assert not served.server.sink.due
    for connection in streams:
        rest = b""
        while part := connection.recv(65_536):
            rest += part
        connection.close()
        last = [line for line in rest.split(b"\n") if line.startswith(b"data: ")][-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        assert b"[DONE]" not in rest


def test_a_second_signal_ends_at_once(serve: Callable[..., Served], sink: RecordingSink) -> None:
    served = serve(drain=3_600.0)
    connection = send_request(served, endless(served, stream=True, max_tokens=3_000))
    read_events(connection, 3)
    served.signal()
    served.signal()
    served.thread.join()
    assert [record.outcome for record in sink.records] == ["cancelled"]
    connection.close()


def test_the_spool_is_flushed_last(serve: Callable[..., Served]) -> None:
    class Closing(RecordingSink):
        closed_after = -1

        def close(self) -> None:
            self.closed_after = len(self.records)

    sink = Closing()
    served = serve(sink=sink, drain=0.0)
    connection = send_request(served, endless(served, stream=True))
    read_events(connection, 2)
    served.signal()
    served.thread.join()
    assert sink.closed_after == 1
    connection.close()
