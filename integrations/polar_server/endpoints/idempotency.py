"""Calls with an `Idempotency-Key`: one computes, the others get its answer, byte for byte.

A call with a key is computed to its end even if its client leaves: a client that sends a key intends to return for the
answer. Only a whole answer is kept; after an error the call may be tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any, Final, Protocol

from polar_server.errors import ApiError
from polar_server.http.exchange import raw_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import Message, Send

    from polar_server.answers import Answer
    from polar_server.http.exchange import Exchange
    from polar_server.server import Server

_MAX_KEY_CHARACTERS: Final = 255
_KEEP_AGAIN_S: Final = 0.5
"""When a store that could not keep a reply is asked again. Unit: seconds."""


class Reply(Protocol):
    """An answer that was begun, on its way to the client."""

    answer: Answer

    async def send(self, send: Send) -> bool:
        """Send the answer; True if all of it was sent, False if a stream ended in an error."""


async def answer_once(
    server: Server,
    exchange: Exchange,
    key: str,
    content: Mapping[str, Any],
    begin: Callable[[], Reply],
    send: Send,
) -> None:
    """Answer a call that may come again: by the first call that claims its key, and then from what was kept.

    A claim is always followed by an answer or given up, so this runs in a task that no client's leaving cancels.

    Args:
        server: Has the store.
        exchange: The call.
        key: Of the caller; each API key has its own.
        content: The body.
        begin: Begins the answer, whose records are held back.
        send: To the client.

    Raises:
        ApiError: The key belongs to another call, or to one that is still being answered.
    """
    store, tenant = server.replies, server.tenant(exchange)
    if exchange.key is not None:  # what one key was answered is not another's to read
        key = f"{exchange.key.key_id}\0{key}"
    state, kept = await asyncio.to_thread(lambda: store.claim(tenant, key, _fingerprint(exchange.path, content)))
    if state == "done" and kept is not None:
        await _send_again(kept, exchange, send)
        return
    if state != "claimed":
        raise _refusal(state)
    copy, whole = _Copy(send), False
    reply: Reply | None = None
    try:
        reply = begin()
        whole = await reply.send(copy)
    finally:
        try:
            if whole:
                await _keep(server, tenant, key, copy.packed(exchange.request_id))
            else:
                await asyncio.to_thread(store.give_up, tenant, key)
        finally:
            if reply is not None:
                await reply.answer.store_records()
            await copy.finish()


async def _keep(server: Server, tenant: str, key: str, reply: bytes) -> None:
    """Keep a reply before it is billed, however long the store is away; a server that ends waits no longer.

    So a call is not billed twice whose server is killed: it is billed as completed only when whoever sends it again
    gets this reply.
    """
    while not await asyncio.to_thread(server.replies.keep, tenant, key, reply):
        if server.answers.draining:
            return
        await asyncio.sleep(_KEEP_AGAIN_S)


def key_of(headers: Mapping[str, str]) -> str | None:
    """The caller's key, or None.

    Raises:
        ApiError: It is empty or too long.
    """
    key = headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= _MAX_KEY_CHARACTERS:
        raise ApiError(
            f"Idempotency-Key has {len(key)} characters; use 1 to {_MAX_KEY_CHARACTERS}.", param="idempotency-key"
        )
    return key


def _fingerprint(path: str, body: Mapping[str, Any]) -> str:
    """Hash of a call, whatever the order of its fields."""
    text = json.dumps([path, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _refusal(state: str) -> ApiError:
    """The refusal of a call whose key is taken: `other` or `running`."""
    if state == "other":
        message = "this Idempotency-Key belongs to a call with another body; make a new key for every call."
        return ApiError(message, status=409, code="idempotency_key_reused", headers={"x-should-retry": "false"})
    message = "the call with this Idempotency-Key is still being answered; try again in a moment."
    headers = {"x-should-retry": "true", "retry-after": "1"}
    return ApiError(message, status=409, code="idempotency_key_in_use", headers=headers)


class _Copy:
    """An ASGI `send` that keeps a copy, and goes on when nobody listens any more.

    The end of the answer waits for `finish`: a caller that has all of it and asks again finds it kept.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._listening = True
        self._head: dict[str, Any] = {}
        self._body: list[bytes] = []
        self._last: Message | None = None

    async def __call__(self, message: Message) -> None:
        """Send, and keep."""
        if message["type"] == "http.response.start":
            headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in message["headers"]]
            self._head = {"status": message["status"], "headers": headers}
        else:
            self._body.append(message.get("body", b""))
            if not message.get("more_body", False):
                self._last = message
                return
        await self._pass_on(message)

    async def finish(self) -> None:
        """Send the end of the answer, where there is one."""
        if self._last is not None:
            await self._pass_on(self._last)

    async def _pass_on(self, message: Message) -> None:
        if self._listening:
            try:
                await self._send(message)
            except OSError:  # what servers raise for a closed connection
                self._listening = False

    def packed(self, request_id: str) -> bytes:
        """The answer as it is kept."""
        head = json.dumps({**self._head, "request_id": request_id})
        return head.encode() + b"\n" + b"".join(self._body)


async def _send_again(packed: bytes, exchange: Exchange, send: Send) -> None:
    """Send a kept answer, under the id of the request that it belongs to."""
    head, _, body = packed.partition(b"\n")
    said = json.loads(head)
    exchange.request_id = str(said["request_id"])
    headers = raw_headers({**dict(said["headers"]), "idempotent-replayed": "true"})
    await send({"type": "http.response.start", "status": said["status"], "headers": headers})
    await send({"type": "http.response.body", "body": body})
