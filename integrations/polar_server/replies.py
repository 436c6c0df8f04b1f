"""Replies to repeated requests: one computes, the others get its answer as it was sent, byte for byte.

A call with an `Idempotency-Key` is computed to its end although its client leaves: whoever sent the key means to come
back for the answer. Only a whole answer is kept; after an error the call may be tried again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Protocol

from polar_server.errors import ApiError
from polar_server.exchange import raw_headers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Message, Send

_MAX_KEY_CHARACTERS: Final = 255
_MAX_KEPT_BYTES: Final = 64 * 2**20


class ReplyStore(Protocol):
    """Where replies are kept; see `polar_billing.access.replies.Replies`. Calls may take as long as a database does.

    Whoever is told `claimed` calls `keep` or `give_up` afterwards.
    """

    def claim(self, tenant: str, key: str, fingerprint: str) -> tuple[str, bytes | None]:
        """`claimed`, `other`, `running`, or `done` with the answer."""
        ...

    def keep(self, tenant: str, key: str, answer: bytes) -> bool:
        """Keep the answer to a claimed request; False while the store cannot, which is to be asked again."""
        ...

    def give_up(self, tenant: str, key: str) -> None:
        """A claimed request has no answer to keep."""
        ...

    def close(self) -> None:
        """The server ends."""
        ...


class MemoryReplies:
    """Replies of one process, for a server without a ledger; the oldest make room for new ones."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[str, bytes | None]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def claim(self, tenant: str, key: str, fingerprint: str) -> tuple[str, bytes | None]:
        """As `ReplyStore`."""
        with self._lock:
            if (tenant, key) not in self._kept:
                self._kept[tenant, key] = (fingerprint, None)
                return "claimed", None
            known, answer = self._kept[tenant, key]
        if known != fingerprint:
            return "other", None
        return "running" if answer is None else "done", answer

    def keep(self, tenant: str, key: str, answer: bytes) -> bool:
        """As `ReplyStore`."""
        with self._lock:
            fingerprint, _ = self._kept[tenant, key]
            self._kept[tenant, key] = (fingerprint, answer)
            self._bytes += len(answer)
            for place, (_, old) in list(self._kept.items()):
                if self._bytes <= _MAX_KEPT_BYTES:
                    break
                if old is not None:
                    del self._kept[place]
                    self._bytes -= len(old)
        return True

    def give_up(self, tenant: str, key: str) -> None:
        """As `ReplyStore`."""
        with self._lock:
            self._kept.pop((tenant, key), None)

    def close(self) -> None:
        """As `ReplyStore`."""


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


def fingerprint_of(path: str, body: Mapping[str, Any]) -> str:
    """What tells a repeated call from another one, whatever the order of its fields."""
    text = json.dumps([path, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def refusal(state: str) -> ApiError:
    """What a call is told whose key is taken: `other` or `running`."""
    if state == "other":
        message = "this Idempotency-Key belongs to a call with another body; make a new key for every call."
        return ApiError(message, status=409, code="idempotency_key_reused", headers={"x-should-retry": "false"})
    message = "the call with this Idempotency-Key is still being answered; ask again in a moment."
    headers = {"x-should-retry": "true", "retry-after": "1"}
    return ApiError(message, status=409, code="idempotency_key_in_use", headers=headers)


class Copy:
    """An ASGI `send` that keeps a copy, and goes on when nobody listens any more.

    The end of the answer waits for `finish`: whoever has all of it and asks again finds it kept.
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


def request_id_of(packed: bytes) -> str:
    """The id of the request that a kept answer belongs to."""
    return str(json.loads(packed.partition(b"\n")[0])["request_id"])


async def send_again(packed: bytes, send: Send) -> None:
    """Send a kept answer."""
    head, _, body = packed.partition(b"\n")
    said = json.loads(head)
    headers = raw_headers({**dict(said["headers"]), "idempotent-replayed": "true"})
    await send({"type": "http.response.start", "status": said["status"], "headers": headers})
    await send({"type": "http.response.body", "body": body})
