"""One HTTP exchange: its id and clock, its body within limits, and its answer as JSON.

Knows ASGI, but not the content of requests.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette._utils import get_route_path  # the router's own: both must read the same path

from polar_sdk.reading import Unreadable, parse_object
from polar_sdk.usage import new_request_id
from polar_server.errors import ApiError, ClientLeftError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from starlette.types import Receive, Scope, Send

    from polar_server.access.stores import Key

_KEY: Final = "polar.exchange"
BODY_S: Final = 60.0
"""Time for the body of a request. Unit: seconds."""
_SMALL_BYTES: Final = 2**16
"""Size of a body that takes the event loop no time worth a thread."""
_MAX_NODES: Final = 2**18
"""Values of a body: Python takes some microseconds for each, however small."""
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A string, or the rest of the text where it does not end: every quote begins a match, so that one pass is enough."""
_large_bodies: Final = ThreadPoolExecutor(2, "polar-body")
"""Threads of their own: large bodies wait for each other, and nothing else waits for them."""
_Read = TypeVar("_Read")
_SAFE_ID: Final = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


@dataclass
class Exchange:
    """One call while it is answered."""

    method: str
    path: str
    """As the router reads it: without what the app is mounted under, on which the scope of a key must not depend."""
    headers: Mapping[str, str]
    """Headers of the request; the last one of a name counts."""
    peer: str | None = None
    """Address that the call came from; None = a socket of this machine."""
    request_id: str = field(default_factory=new_request_id)
    """Ours; of a call that computes, its id in the ledger."""
    started_ns: int = field(default_factory=time.perf_counter_ns)
    answer_headers: dict[str, str] = field(default_factory=dict)
    """Headers of the answer, whichever it becomes."""
    status: int | None = None
    """Status of the answer, once it began."""
    key: Key | None = None
    """The API key of the call, where the server asks for one."""
    counted: bool = False
    """Whether the limits of its key count it until its end."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the log: never a prompt or an answer."""

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        """The exchange that a scope belongs to; made at the first call."""
        state: dict[str, Any] = scope.setdefault("state", {})
        if _KEY not in state:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            peer = scope.get("client")
            state[_KEY] = cls(scope["method"], get_route_path(scope), headers, peer[0] if peer else None)
        exchange: Exchange = state[_KEY]
        return exchange

    @property
    def client_request_id(self) -> str | None:
        """The id that the client gave its call, if it is one that can be stored."""
        given = self.headers.get("x-request-id", "")
        return given if _SAFE_ID.fullmatch(given) else None

    @property
    def elapsed_ms(self) -> float:
        """Time since the call arrived. Unit: milliseconds."""
        return (time.perf_counter_ns() - self.started_ns) / 1e6


async def read_body(
    exchange: Exchange, receive: Receive, max_bytes: int, read: Callable[[dict[str, Any]], _Read]
) -> _Read:
    """The JSON object in a request's body, as `read` makes something of it.

    A large body is parsed and read in a thread, so that the event loop goes on meanwhile.

    Raises:
        ApiError: It is too large, compressed, nested too deeply, or not a JSON object; or `read` refuses it.
        ClientLeftError: The client left before it was complete.
    """
    content = await _content(exchange, receive, max_bytes)
    if len(content) <= _SMALL_BYTES:
        return read(_parsed(content))
    return await asyncio.get_running_loop().run_in_executor(_large_bodies, lambda: read(_parsed(content)))


def _parsed(content: bytes) -> dict[str, Any]:
    if len(content) > _MAX_NODES and _nodes(content) > _MAX_NODES:  # a shorter one cannot have that number
        why = f"the body has more than the {_MAX_NODES:,} values that are read; send less."
        raise ApiError(why, status=413, code="request_too_large")
    try:
        return parse_object(content, max_bytes=len(content))
    except Unreadable as error:
        raise ApiError(f"the body is {error.fault}; send a JSON object.", code="invalid_json") from error


def _nodes(content: bytes) -> int:
    """The number of values of a JSON text, about; quick, whatever it is."""
    strings = (content.count(b'"') - content.count(b'\\"')) // 4  # a value is two at most: its name and itself
    if strings > _MAX_NODES:
        return strings
    outside = _STRING.sub(b"", content)
    return outside.count(b",") + outside.count(b"[") + outside.count(b"{")


async def _content(exchange: Exchange, receive: Receive, max_bytes: int) -> bytes:
    if exchange.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another site may send other types from a browser on this machine without asking first.
        why = "a body is read with the header content-type: application/json only; send it."
        raise ApiError(why, status=415, code="unsupported_media_type")
    if exchange.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(
            "compressed bodies are not supported; send the body uncompressed.", status=415, code="unsupported_encoding"
        )
    declared = exchange.headers.get("content-length", "")
    if declared and "transfer-encoding" in exchange.headers:  # a proxy may have read the other of the two
        why = "Content-Length and Transfer-Encoding contradict each other; send one of them."
        raise ApiError(why, code="invalid_length", headers={"connection": "close"})
    too_large = ApiError(
        f"the body is larger than the {max_bytes:,} bytes that are accepted; send less.",
        status=413,
        code="request_too_large",
    )
    if declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise too_large
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(BODY_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                part = message.get("body", b"")
                size += len(part)
                if size > max_bytes:
                    raise too_large
                parts.append(part)
                more = message.get("more_body", False)
    except TimeoutError as error:
        why = f"the body did not end within {BODY_S:g} seconds; send it at once."
        raise ApiError(why, status=408, code="body_timeout", headers={"connection": "close"}) from error
    return b"".join(parts)


def packed_json(value: Any) -> bytes:
    """JSON without blanks, for events; half of a surrogate pair, which no text can hold, becomes `?`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


async def send_json(send: Send, body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """Answer with JSON."""
    content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
    await send_bytes(send, content, "application/json", status=status, headers=headers)


class JsonEndpoint:
    """An ASGI app whose answer is one JSON object.

    Args:
        answer: Makes it from a call, at once or later.
    """

    def __init__(self, answer: Callable[[Scope, Receive], dict[str, Any] | Awaitable[dict[str, Any]]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        answer = self._answer(scope, receive)
        await send_json(send, await answer if isawaitable(answer) else answer)


async def send_bytes(
    send: Send, content: bytes, kind: str, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    """Answer with a body that is known as a whole."""
    listed = {"content-type": kind, "content-length": str(len(content)), **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": raw_headers(listed)})
    await send({"type": "http.response.body", "body": content})


def raw_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI takes them; what no header can hold is replaced."""
    return [
        (name.encode("ascii"), _CONTROL.sub(" ", value).encode("latin-1", "replace")) for name, value in headers.items()
    ]


_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


@contextmanager
def watching(receive: Receive, on_leave: Callable[[], object]) -> Iterator[None]:
    """Call `on_leave` when the client closes the connection, or when this block ends early."""
    ended = False

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not ended:
            on_leave()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    except BaseException:
        on_leave()
        raise
    finally:
        ended = True
        watcher.cancel()
