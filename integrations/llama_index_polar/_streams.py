"""Streams: the engine's chunks as LlamaIndex responses, one event each, ended when their consumer leaves.

LlamaIndex's decorators wrap a stream in a generator of their own, which does not close the stream when it is
closed itself. Where a callback keeps the exception that ended it, as debug handlers do, the stream lives on:
its record would be missing, and an async one would compute to its end. So the wrapped stream is closed here.
"""

from __future__ import annotations

from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator

    from polar_sdk import Chunk, Generation

    Respond = Callable[[str, str | None, Generation | None], Any]
    Stream = Generator[Any, None, None]
    AsyncStream = AsyncGenerator[Any, None]


def responses(chunks: Iterator[Chunk], respond: Respond) -> Stream:
    """Chunks as responses; closing this generator closes the engine's, which ends the request."""
    text = ""
    with closing(cast("Generator[Chunk]", chunks)):
        for chunk in chunks:
            text += chunk.text
            if chunk.text or chunk.generation is not None:
                yield respond(text, chunk.text, chunk.generation)


async def aresponses(chunks: AsyncIterator[Chunk], respond: Respond) -> AsyncStream:
    """As `responses`, for an async stream."""
    text = ""
    async with aclosing(cast("AsyncGenerator[Chunk]", chunks)):
        async for chunk in chunks:
            text += chunk.text
            if chunk.text or chunk.generation is not None:
                yield respond(text, chunk.text, chunk.generation)


def report_stream(
    decorate: Callable[..., Any], start: Callable[[], Stream], llm: Any, *args: Any, **kwargs: Any
) -> Stream:
    """Start a stream under a LlamaIndex decorator; `llm` and the arguments are what its events tell."""
    stream: Stream | None = None

    def call(*_: Any, **__: Any) -> Stream:
        nonlocal stream
        stream = start()
        return stream

    reported: Stream = decorate(call)(llm, *args, **kwargs)
    return _closing_both(reported, cast("Stream", stream))


def _closing_both(reported: Stream, stream: Stream) -> Stream:
    with closing(stream), closing(reported):
        yield from reported


async def areport_stream(
    decorate: Callable[..., Any],
    start: Callable[[], Awaitable[AsyncStream]],
    llm: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncStream:
    """As `report_stream`, for an async stream."""
    stream: AsyncStream | None = None

    async def call(*_: Any, **__: Any) -> AsyncStream:
        nonlocal stream
        stream = await start()
        return stream

    reported: AsyncStream = await decorate(call)(llm, *args, **kwargs)
    return _aclosing_both(reported, cast("AsyncStream", stream))


async def _aclosing_both(reported: AsyncStream, stream: AsyncStream) -> AsyncStream:
    async with aclosing(stream), aclosing(reported):
        async for response in reported:
            yield response
