"""HTTP to upstream servers: which models they have, and streams of text completions.

One thread with its own event loop keeps the connections; what arrives is passed to the thread of the request through a
queue, so that this thread can stop waiting at any time. Knows OpenAI's wire format, and no tier.
"""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import httpx2

from polar_sdk.reading import Unreadable, parse_object
from polar_server.errors import ApiError
from polar_server.telemetry.traces import trace_headers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Mapping
    from concurrent.futures import Future

_CONNECT_S: Final = 5.0
_SILENCE_S: Final = 300.0
"""How long an upstream may say nothing at all, as while a request waits for its turn there. Unit: seconds."""
_MAX_EVENT_BYTES: Final = 2**20
_MAX_BODY_BYTES: Final = 4 * 2**20
_MAX_ERROR_BYTES: Final = 2**20
_MAX_TEXT: Final = 500
_LINE_END: Final = re.compile(rb"\r\n|\n|\r(?=[^\n])")
"""A CR at the end of what has arrived may be half of CR LF, and waits."""
_SOON: Final = {"retry-after": "1"}
_WORKER: Final = "polar-worker"
"""Header by which a vLLM with programs says which run of it answers (`polar_vllm.endpoint`)."""


class UpstreamError(ApiError):
    """A server behind this one failed, refused, or is gone."""

    def __init__(
        self, message: str, *, status: int = 502, code: str = "upstream_error", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, status=status, code=code, headers=headers)


@dataclass(frozen=True)
class Opened:
    """The upstream took the request: from here on it computes."""


@dataclass(frozen=True)
class Event:
    """One event of a stream."""

    data: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """The stream is over: well, or by an error."""

    error: UpstreamError | None
    """None if it ended as it should."""


News = Opened | Event | Ended


@dataclass(frozen=True)
class Served:
    """A model of an upstream."""

    model: str
    """Its id there."""
    counts_each: bool
    """Whether every event of a stream can say how many tokens there are so far."""
    worker: str | None = None
    """Which run of a vLLM with programs this is, whose files were compared; None = it is sent none."""


@dataclass(eq=False)
class Stream:
    """A request under way."""

    news: SimpleQueue[News] = field(default_factory=SimpleQueue)
    work: Future[None] | None = None

    def close(self) -> None:
        """Close the connection, on which the upstream stops computing."""
        if self.work is not None:
            self.work.cancel()


class Client:
    """Connections to upstreams. Safe in several threads.

    Args:
        key: API key for them; None = they ask for none.
    """

    def __init__(self, key: str | None = None) -> None:
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx2.AsyncClient | None = None

    def served(self, base: str, wanted: str | None) -> Served:
        """The model to ask an upstream for.

        Args:
            base: Its URL, up to `/v1`.
            wanted: The id of the model; None = the only one, or the one at full depth of a PoLar server.

        Raises:
            UpstreamError: It cannot be reached, or does not say which model it has.
        """
        found: Served = self._submit(self._served(base, wanted)).result()
        return found

    def digests(self, base: str) -> dict[str, Any]:
        """The digests of an upstream that is sent programs; nothing if it knows of none.

        Raises:
            UpstreamError: It cannot be reached.
        """
        found: dict[str, Any] = self._submit(self._digests(base)).result()
        return found

    def complete(self, base: str, body: dict[str, Any], worker: str | None = None) -> Stream:
        """Ask for a streamed text completion; what becomes of it arrives in `news`.

        An answer of another worker than the one named is not taken: it ends with the code `upstream_restarted`.
        """
        stream = Stream()
        stream.work = self._submit(self._complete(base, body, trace_headers(), stream.news, worker))
        return stream

    def close(self) -> None:
        """Close all connections, and end the thread."""
        with self._starting:
            loop, self._loop = self._loop, None
            http, self._http = self._http, None
        if loop is not None and http is not None:
            asyncio.run_coroutine_threadsafe(http.aclose(), loop).result(_CONNECT_S)
            loop.call_soon_threadsafe(loop.stop)

    def _submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        with self._starting:
            if self._loop is None:
                self._loop = loop = asyncio.new_event_loop()
                self._http = httpx2.AsyncClient(
                    headers=self._headers,
                    timeout=httpx2.Timeout(_SILENCE_S, connect=_CONNECT_S),
                    limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
                    trust_env=False,
                )
                threading.Thread(target=_run, args=[loop], name="polar-upstream", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _served(self, base: str, wanted: str | None) -> Served:
        assert self._http is not None
        try:
            async with self._http.stream("GET", f"{base}/models", timeout=_CONNECT_S) as answer:
                content = await _content(answer, _MAX_BODY_BYTES)
        except httpx2.HTTPError as error:
            raise _unreachable(base, error) from error
        if answer.status_code != 200:
            raise _refused(base, answer.status_code, content, answer.headers)
        listed = _models(content)
        if wanted is None:
            exact = [one for one in listed if str(one.get("id", "")).endswith(":exact")]
            if len(listed) > 1 and len(exact) != 1:
                raise UpstreamError(
                    f"{base} has several models; name one of {', '.join(str(one.get('id')) for one in listed[:8])} "
                    "in --backend, as TIER=URL#MODEL.",
                    code="upstream_error",
                )
            listed = exact or listed
        else:
            listed = [one for one in listed if one.get("id") == wanted]
        if not listed or not isinstance(listed[0].get("id"), str):
            raise UpstreamError(f"{base} has no model {wanted or ''!r}; see its /v1/models.", code="upstream_error")
        return Served(listed[0]["id"], listed[0].get("owned_by") == "vllm")

    async def _digests(self, base: str) -> dict[str, Any]:
        assert self._http is not None
        try:
            async with self._http.stream("GET", f"{base}/polar/digests", timeout=_CONNECT_S) as answer:
                content = await _content(answer, _MAX_BODY_BYTES)
            return parse_object(content, max_bytes=_MAX_BODY_BYTES) if answer.status_code == 200 else {}
        except Unreadable:
            return {}
        except httpx2.HTTPError as error:
            raise _unreachable(base, error) from error

    async def _complete(
        self, base: str, body: dict[str, Any], headers: Mapping[str, str], news: SimpleQueue[News], worker: str | None
    ) -> None:
        assert self._http is not None
        taken = False
        try:
            async with self._http.stream("POST", f"{base}/completions", json=body, headers=headers) as answer:
                seen = answer.headers.get(_WORKER)
                if worker is not None and seen != worker and (seen is not None or answer.status_code == 200):
                    news.put(Ended(_restarted(base)))
                    return
                if answer.status_code != 200:
                    content = await _content(answer, _MAX_ERROR_BYTES)
                    news.put(Ended(_refused(base, answer.status_code, content, answer.headers)))
                    return
                taken = True
                news.put(Opened())
                news.put(await _relay(base, answer, news))
        except httpx2.ReadTimeout:
            news.put(Ended(UpstreamError(f"{base} did not answer in time.", status=504, code="upstream_timeout")))
        except (httpx2.HTTPError, OSError) as error:
            news.put(Ended(_lost(base) if taken else _unreachable(base, error)))
        except Exception as error:  # whatever it is, the request that waits must hear of it
            news.put(Ended(UpstreamError(f"{base}: {error}")))
            raise


async def _content(answer: httpx2.Response, most: int) -> bytes:
    """The body of an answer, or its start where it is larger than `most` bytes."""
    content = b""
    async for part in answer.aiter_bytes():
        content += part
        if len(content) > most:
            break
    return content


async def _lines(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """The lines of a stream of events; they end by CR, LF or both, and by none of Unicode's other line ends.

    Raises:
        Unreadable: One of them does not end.
    """
    rest = bytearray()
    async for part in answer.aiter_bytes():
        rest += part
        if b"\n" in part or b"\r" in part:  # looked at once, in however small parts a line comes
            *lines, last = _LINE_END.split(bytes(rest))
            rest = bytearray(last)
            for line in lines:
                yield line
        if len(rest) > _MAX_EVENT_BYTES:
            raise Unreadable(f"larger than the {_MAX_EVENT_BYTES:,} bytes that are read")
    yield bytes(rest)


async def _relay(base: str, answer: httpx2.Response, news: SimpleQueue[News]) -> Ended:
    """Hand the events of a stream on; returns how it ended."""
    try:
        async for line in _lines(answer):
            if not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                return Ended(None)
            data = parse_object(content, max_bytes=_MAX_EVENT_BYTES)
            if "error" in data:
                return Ended(_refused(base, 500, content, {}))
            news.put(Event(data))
    except Unreadable as error:
        return Ended(UpstreamError(f"{base} sent an event that is {error.fault}.", code="upstream_error"))
    return Ended(_lost(base))


def _lost(base: str) -> UpstreamError:
    return UpstreamError(f"{base} interrupted its answer; what it sent is billed.", code="upstream_lost")


def _models(content: bytes) -> list[dict[str, Any]]:
    try:
        found = parse_object(content, max_bytes=_MAX_BODY_BYTES).get("data")
    except Unreadable:
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


# -- errors ------------------------------------------------------------------------------------------------------------


def _unreachable(base: str, error: Exception) -> UpstreamError:
    """Nobody answers there."""
    kind = type(error).__name__
    message = f"{base} cannot be reached ({kind}); ask again in a moment."
    return UpstreamError(message, status=503, code="upstream_unavailable", headers=_SOON)


def _restarted(base: str) -> UpstreamError:
    message = f"{base} was restarted while this was asked; ask again."
    return UpstreamError(message, status=503, code="upstream_restarted", headers=_SOON)


def _refused(base: str, status: int, content: bytes, headers: Mapping[str, str]) -> UpstreamError:
    """The upstream answered with an error."""
    said, code = _said(content)
    if status in {400, 413, 422}:
        kept = code if code == "context_length_exceeded" or "context length" in said else None
        return UpstreamError(
            f"{base} refused: {said}", status=400, code="context_length_exceeded" if kept else "upstream_refused"
        )
    if status in {429, 503}:
        retry = {"retry-after": headers.get("retry-after", "1")}
        return UpstreamError(f"{base} is busy: {said}", status=503, code="overloaded", headers=retry)
    if status in {401, 403, 404}:
        said += " (check the URL and model of --backend, and POLAR_BACKEND_KEY)"
    return UpstreamError(f"{base} failed with status {status}: {said}")


def _said(content: bytes) -> tuple[str, str | None]:
    """The message and the code in an error's body."""
    try:
        body = parse_object(content, max_bytes=_MAX_ERROR_BYTES)
    except Unreadable:
        return "it did not say why.", None
    inner = body.get("error", body)
    inner = inner if isinstance(inner, dict) else {"message": inner}
    code = inner.get("code")
    return str(inner.get("message", "it did not say why."))[:_MAX_TEXT], code if isinstance(code, str) else None
