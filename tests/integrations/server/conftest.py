"""A server over the tiny model on a real socket: uvicorn in a thread, on a free port of this machine."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest

from polar_billing.access.keys import ApiKeys
from polar_billing.ledger.ledger import Ledger
from polar_sdk import ListSink, PolarModel
from polar_sdk.testing import tiny_model
from polar_server import Settings, build
from polar_server.deployment.uvicorn_server import UvicornServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_sdk import UsageRecord
    from polar_server.server import Server

JSON = {"content-type": "application/json"}
"""The header of every body."""
WAIT_S = 20.0
"""Longer than anything here takes, on a machine that others use as well."""


class RecordingSink(ListSink):
    """Keeps records and marks, and wakes whoever waits for records; can hold requests up before they run."""

    wants_marks = True

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[UsageRecord] = []
        self.gate = threading.Event()
        """Requests wait for it before they are admitted."""
        self.gate.set()
        self.asked = threading.Semaphore(0)
        """Released once per request that asks to be admitted."""
        self._change = threading.Condition()

    def reserve(self, bound: Any) -> int:
        self.asked.release()
        assert self.gate.wait(WAIT_S)
        return super().reserve(bound)

    def receipt(self, record: UsageRecord) -> Any:
        return {"cost": f"0.{record.flops.total:012d}", "currency": "EUR", "price_book": "t1"}

    def mark(self, record: UsageRecord) -> None:
        self.marks.append(record)

    def emit(self, record: UsageRecord) -> Any:
        with self._change:
            self.records.append(record)
            self._change.notify_all()
        return self.receipt(record)

    def wait_for(self, count: int) -> list[UsageRecord]:
        """The records, when there are so many."""
        with self._change:
            assert self._change.wait_for(lambda: len(self.records) >= count, WAIT_S), f"{len(self.records)} of {count}"
        return self.records


class Served:
    """A running server, and calls of it."""

    def __init__(self, settings: Settings) -> None:
        self.app = build(settings)
        self.server: Server = self.app.state.server
        self.uvicorn = UvicornServer(self.app, host="127.0.0.1", port=0)
        started = threading.Event()
        self.uvicorn.on_start = lambda _: started.set()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.uvicorn.serve()), daemon=True)
        self.thread.start()
        assert started.wait(WAIT_S)
        self.url = self.uvicorn.url
        self.port = int(self.url.rpartition(":")[2])
        self.base_url = f"{self.url}/v1"

    @property
    def records(self) -> list[UsageRecord]:
        """Records of its sink."""
        sink: Any = self.server.sink.inner
        records: list[UsageRecord] = sink.records
        return records

    def signal(self) -> None:
        """Act as on SIGTERM."""
        self.uvicorn.handle_exit(15, None)

    def close(self) -> None:
        """End, at once."""
        if self.thread.is_alive():
            self.signal()
            self.signal()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()

    def client(self) -> openai.OpenAI:
        """openai-python, unmodified."""
        return openai.OpenAI(base_url=self.base_url, api_key="none", max_retries=0, timeout=WAIT_S)

    def connect(self) -> http.client.HTTPConnection:
        """A connection of one's own."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON (or text) of one call."""
        connection = self.connect()
        content = body if isinstance(body, (bytes, str)) or body is None else json.dumps(body)
        connection.request(method, path, content, {**JSON, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read().decode()
        found = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return answer.status, found, json.loads(text) if is_json and text else text

    def chat(self, **fields: Any) -> dict[str, Any]:
        """A whole chat answer."""
        status, _, body = self.call("POST", "/v1/chat/completions", chat_body(**fields))
        assert status == 200, body
        answer: dict[str, Any] = body
        return answer

    def events(self, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
        """The events of a stream, as JSON; the last one is `[DONE]` where the stream ended well."""
        status, _, text = self.call("POST", path, {**body, "stream": True})
        assert status == 200, text
        return [parse_event(event) for event in text.split("\n\n") if event and not event.startswith(":")]


def parse_event(event: str) -> Any:
    """The data of one server-sent event."""
    assert event.startswith("data: "), event
    data = event.removeprefix("data: ")
    return data if data == "[DONE]" else json.loads(data)


def bearer(text: str) -> dict[str, str]:
    """The header with an API key."""
    return {"authorization": f"Bearer {text}"}


def chat_body(**fields: Any) -> dict[str, Any]:
    """The body of a chat call of the tiny model."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **fields}


@pytest.fixture(scope="session")
def tiny() -> PolarModel:
    """Weights that all servers of these tests share."""
    return tiny_model(context_window=4096)


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def serve(tiny: PolarModel, sink: RecordingSink) -> Iterator[Callable[..., Served]]:
    """Start servers that end with the test."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Served:
            engine = settings.pop("engine", None) or PolarModel(
                tiny.loaded, policy=tiny.policy, sink=settings.pop("sink", sink), tenant="acme"
            )
            served = Served(Settings(engine=engine, **{"name": "tiny", "drain": 0.0, **settings}))
            stack.callback(served.close)
            return served

        yield start


@contextmanager
def shared_server(tiny: PolarModel, **settings: Any) -> Iterator[Served]:
    """A server for all tests of a module."""
    engine = PolarModel(tiny.loaded, policy=tiny.policy, sink=ListSink(), tenant="acme")
    served = Served(Settings(engine=engine, **{"name": "tiny", "drain": 0.0, **settings}))
    yield served
    served.close()


@pytest.fixture(scope="module")
def refusing(tiny: PolarModel) -> Iterator[Served]:
    """One server for many calls that it refuses: none of them is recorded."""
    with shared_server(tiny) as served:
        yield served
    assert served.records == []


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    with Ledger(ledger_url) as ledger:
        yield ledger


@pytest.fixture
def keys(ledger: Ledger) -> ApiKeys:
    return ApiKeys(ledger)


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """One server with the default settings."""
    return serve()
