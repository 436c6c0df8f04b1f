"""An endpoint that answers: from a call to choices of the engine, and from those to one body or a stream of events.

The stream carries what the body would: the same text, tokens, usage, finish reasons and cost. A writer decides what
either looks like. Knows no field of any API.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from polar_sdk.errors import PolarError
from polar_server.endpoints.idempotency import answer_once, key_of
from polar_server.errors import ClientLeftError, shutting_down
from polar_server.http.exchange import Exchange, raw_headers, read_body, send_json, watching
from polar_server.openai.facts import Facts
from polar_server.openai.fields import read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.types import Receive, Scope, Send

    from polar_sdk import Chunk, Generation
    from polar_server.openai.calls import Call, CallBody
    from polar_server.server import Server

_EVENTS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_KEEP_ALIVE: Final = b": keep-alive\n\n"


class Writer(Protocol):
    """Writes one answer down, either whole or in pieces."""

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The answer as one object, of its choices in order."""

    def opening(self) -> list[bytes]:
        """The events before the first piece."""

    def piece(self, index: int, chunk: Chunk) -> list[bytes]:
        """The events of a piece of a choice."""

    def closing(self) -> list[bytes]:
        """The events after the last piece."""

    def failure(self, error: BaseException) -> list[bytes]:
        """The last events of a stream that was interrupted."""


class Endpoint:
    """An ASGI app for one kind of answer.

    Args:
        server: What answers.
        model: Of a body.
        write: Makes what writes an answer.
    """

    def __init__(self, server: Server, model: type[CallBody], write: Callable[[Facts], Writer]) -> None:
        self._server, self._model, self._write = server, model, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call.

        Raises:
            ApiError: It cannot be answered; nothing was sent.
        """
        exchange = Exchange.of(scope)
        async with self._server.counted(exchange):
            await self._answer(exchange, receive, send)

    async def _answer(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        server, settings = self._server, self._server.settings

        def checked(content: dict[str, Any]) -> tuple[dict[str, Any], Call]:
            body, unknown = read(content, self._model, lenient=settings.lenient)
            server.metrics.unknown(unknown)
            return content, body.call(server.rules(exchange))

        content, call = await read_body(exchange, receive, settings.max_body, checked)
        exchange.facts |= {"model": call.model, "stream": call.stream, "choices": len(call.asks)}
        key = key_of(exchange.headers)
        if key is None:
            reply = self._begin(exchange, call)
            with watching(receive, reply.answer.leave):
                await reply.send(send)
            return
        begin = partial(self._begin, exchange, call, holds_back=True)
        # In a task of its own: the answer is for whoever comes back, also when this client has left.
        await asyncio.shield(server.answers.keep(answer_once(server, exchange, key, content, begin, send)))

    def _begin(self, exchange: Exchange, call: Call, *, holds_back: bool = False) -> _Reply:
        server = self._server
        answer = server.start(call, exchange, holds_back=holds_back)
        facts = Facts(call, answer, exchange, server.engine, server.token_bytes)
        return _Reply(server, facts, self._write(facts))


class _Reply:
    """The answer to one call, on its way to the client."""

    def __init__(self, server: Server, facts: Facts, writer: Writer) -> None:
        self._server, self._facts, self._writer = server, facts, writer
        self._call, self.answer = facts.call, facts.answer

    async def send(self, send: Send) -> bool:
        """Send the answer; True if all of it was sent, False if a stream ended in an error.

        Raises:
            Exception: What ended it before anything was sent.
        """
        if self._call.stream:
            return await self._stream(send)
        await self._whole(send)
        return True

    async def _whole(self, send: Send) -> None:
        """Wait for every choice, and send them as one JSON object."""
        generations: dict[int, Generation] = {}
        while arrived := await self._pieces():
            for index, chunk in arrived:
                if chunk.generation is not None:
                    generations[index] = chunk.generation
        for generation in generations.values():
            self._check_finished(generation)
        headers = {**self._facts.headers(), **self._facts.closing_headers()}
        body = self._writer.whole([generations[index] for index in sorted(generations)])
        await send_json(send, body, headers=headers)

    async def _stream(self, send: Send) -> bool:
        """Send pieces as they come; an error before the first is raised, a later one is an event."""
        patience = self._server.settings.keep_alive
        arrived = await self._pieces(patience)
        headers = raw_headers({**_EVENTS, **self._facts.headers()})
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        left = set(range(len(self._call.asks)))
        frames = self._writer.opening()
        try:
            while left:
                if not arrived:
                    frames.append(_KEEP_ALIVE)
                for index, chunk in arrived:
                    frames += self._frames(index, chunk, left)
                await send({"type": "http.response.body", "body": b"".join(frames), "more_body": True})
                frames = []
                arrived = await self._pieces(patience) if left else []
            await _send_end(send, self._writer.closing())
            return True
        except ClientLeftError:
            raise
        except Exception as error:  # the status is sent: what ended the stream is its last event
            self._server.log_unknown(error)
            await _send_end(send, self._writer.failure(error))
            return False

    def _frames(self, index: int, chunk: Chunk, left: set[int]) -> list[bytes]:
        """The events of one piece; takes a choice that ended out of `left`."""
        if chunk.generation is not None:
            self._check_finished(chunk.generation)
            left.discard(index)
        return self._writer.piece(index, chunk)

    async def _pieces(self, patience: float | None = None) -> list[tuple[int, Chunk]]:
        try:
            return await self.answer.pieces(patience)
        except PolarError as error:
            raise self._call.blamed(error) from error

    def _check_finished(self, generation: Generation) -> None:
        """Raise where an answer was stopped: by the server, or because nobody reads it."""
        if generation.finish_reason == "cancelled":
            raise shutting_down() if self.answer.stopped else ClientLeftError


async def _send_end(send: Send, frames: Sequence[bytes]) -> None:
    await send({"type": "http.response.body", "body": b"".join(frames)})
