"""The HTTP example: in this process over the tiny model, and as a user runs it on the real one."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from langchain_polar import ChatPolar
from polar_billing import ALL_TENANTS, Ledger, Meter, Selection
from polar_sdk.testing import tiny_model
from tests.examples.conftest import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ACME, GLOBEX = {"X-API-Key": "key-of-acme"}, {"X-API-Key": "key-of-globex"}
WAIT_S = 60.0
"""Longer than anything here takes, on a machine that others use as well."""


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    ledger = Ledger(ledger_url)
    yield ledger
    ledger.close()


@pytest.fixture
def app(example: Callable[[str], Any], ledger: Ledger) -> Iterator[Any]:
    """The app over the tiny model, metered."""
    with Meter(ledger) as meter:
        chat = ChatPolar(engine=tiny_model(context_window=1024, sink=meter), max_tokens=600, temperature=1.0, seed=1)
        yield example("fastapi_app").build_app(chat, ledger)


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_each_caller_has_a_bill(app: Any, ledger: Ledger) -> None:
    async with _client(app) as client:
        asked = [
            await client.post("/ask", json={"question": "Hello"}, headers=caller) for caller in (ACME, ACME, GLOBEX)
        ]
        assert [answer.status_code for answer in asked] == [200, 200, 200]
        assert asked[0].headers["content-type"] == "text/plain; charset=utf-8"
        assert all(answer.text for answer in asked)
        bills = [(await client.get("/bill", headers=caller)).json() for caller in (ACME, GLOBEX)]
    assert [[row["requests"] for row in bill] for bill in bills] == [[2], [1]]
    stored = list(ledger.read(Selection(ALL_TENANTS)))
    assert [one.record.tenant for one in stored] == ["acme", "acme", "globex"]
    assert sum(one.record.flops.total for one in stored) == sum(row["flops"] for bill in bills for row in bill)


@pytest.mark.parametrize(
    ("caller", "body", "status"),
    [
        ({}, {"question": "Hello"}, 401),
        ({"X-API-Key": "key-of-nobody"}, {"question": "Hello"}, 401),
        (ACME, {"question": ""}, 422),
        (ACME, {"question": "a" * 2_001}, 422),
        (ACME, {}, 422),
    ],
)
async def test_a_call_that_is_refused_is_on_no_bill(
    app: Any, ledger: Ledger, caller: dict[str, str], body: dict[str, str], status: int
) -> None:
    async with _client(app) as client:
        assert (await client.post("/ask", json=body, headers=caller)).status_code == status
    assert list(ledger.read(Selection(ALL_TENANTS))) == []


async def test_a_caller_that_leaves_pays_for_what_ran(app: Any, ledger: Ledger) -> None:
    """httpx's transport gives an answer back when it is whole, so this speaks ASGI: it leaves after two pieces."""
    pieces: list[bytes] = []
    left = asyncio.Event()
    body = json.dumps({"question": "Hello"}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        if message := next(messages, None):
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and not left.is_set():
            pieces.append(message["body"])
            if len(pieces) == 2:
                left.set()

    headers = [(b"content-type", b"application/json"), (b"x-api-key", b"key-of-acme")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    await app({**scope, "path": "/ask", "query_string": b"", "headers": headers}, receive, send)
    record = (await asyncio.to_thread(_wait_for_record, ledger)).record
    assert (record.tenant, record.outcome) == ("acme", "cancelled")
    assert 2 <= record.tokens.output < 600
    assert record.flops.total > 0


def _wait_for_record(ledger: Ledger) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (stored := list(ledger.read(Selection(ALL_TENANTS)))):
        assert time.monotonic() < deadline, "nothing was recorded"
        time.sleep(0.01)
    return stored[0]


@pytest.mark.model
def test_it_serves_and_prints_the_bill_at_its_end(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "fastapi_app.py"), "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            with httpx.Client(base_url=_address(process), timeout=WAIT_S) as client:
                question = {"question": "What is the capital of France?"}
                assert "Paris" in client.post("/ask", json=question, headers=ACME).text
                _leave_early(client)
                _wait_for_bill(client)
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    bill = printed.partition("The bill, from the ledger\n")[2]
    assert re.search(r"^  acme +standard +1 requests .* USD$", bill, re.MULTILINE), printed
    assert re.search(r"^  globex +standard +1 requests .* USD  \(1 left early\)$", bill, re.MULTILINE), printed


def _address(process: subprocess.Popen[str]) -> str:
    """The address at which uvicorn says that it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found[0]
    raise AssertionError("the server ended before it listened")


def _leave_early(client: httpx.Client) -> None:
    story = {"question": "Tell me a long story about a clockmaker."}
    with client.stream("POST", "/ask", json=story, headers=GLOBEX) as answer:
        next(answer.iter_text())


def _wait_for_bill(client: httpx.Client) -> None:
    deadline = time.monotonic() + WAIT_S
    while [row["outcomes"] for row in client.get("/bill", headers=GLOBEX).json()] != [{"cancelled": 1}]:
        assert time.monotonic() < deadline, "the answer that was left is not on the bill"
        time.sleep(0.05)
