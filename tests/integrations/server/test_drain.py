"""How a server ends: answers finish, or stop; either way every one of them is recorded."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

from tests.integrations.server.conftest import RecordingSink, chat_body
from tests.integrations.server.test_disconnects import endless, read_events, send_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integrations.server.conftest import Served


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
