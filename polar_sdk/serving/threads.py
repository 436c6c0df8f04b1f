"""Blocking engine calls in threads of their own: heavy work, and calls from asyncio, whose loop must not be blocked.

The engine itself is synchronous. Such a thread runs with the caller's context variables, and stops when the task that
awaits it is cancelled. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import closing
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

    from polar_sdk.serving.request import Cancel


T = TypeVar("T")
AHEAD = 2
"""Number of pieces of a stream computed before its consumer requests them: enough to hide the handover, and little to
waste if it leaves."""


class _AnyCancel:
    """Set when the task is cancelled, or when the caller's own cancel is."""

    def __init__(self, caller: Cancel | None) -> None:
        self._caller = caller
        self._own = threading.Event()

    def set(self) -> None:
        self._own.set()

    def is_set(self) -> bool:
        return self._own.is_set() or (self._caller is not None and self._caller.is_set())


class _End:
    """The end of a stream that another thread produces."""


def run_apart(call: Callable[[], T]) -> T:
    """Run heavy work in a thread that ends with it, and wait; its errors are raised here.

    libgomp keeps a pool for every thread that has ever run a parallel region, and once the pools hold more threads than
    there are cores, none of them may spin while it waits: a model loaded in the main thread then decodes at half speed
    in the engine's (`benchmarks/LOG.md`). The pool of a thread ends with it.
    """
    thread, result = _start(call, "polar-load", daemon=True)
    value = result.result()
    thread.join()  # so that its pool is gone
    return value


async def run_in_thread(call: Callable[[Cancel], T], cancel: Cancel | None) -> T:
    """Run `call` in a thread; if the awaiting task is cancelled, request it to stop and wait until it has.

    The wait ensures that after a cancellation nothing is computed any more and the usage record is stored.
    """
    stop = _AnyCancel(cancel)
    worker = _awaitable(lambda: call(stop), "polar-request")
    try:
        return await asyncio.shield(worker)
    except asyncio.CancelledError:
        stop.set()
        await _ended(worker)
        raise


async def iterate_in_thread(
    start: Callable[[Cancel], Generator[T, None, None]], cancel: Cancel | None
) -> AsyncIterator[T]:
    """Iterate a blocking generator in a thread, at the consumer's pace; leaving early stops it within one item."""
    stop = _AnyCancel(cancel)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[T | _End] = asyncio.Queue()
    left = threading.Event()
    room = threading.Semaphore(AHEAD)

    def put(item: T | _End) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, item)

    def produce() -> None:
        try:
            with closing(start(stop)) as items:
                for item in items:
                    room.acquire()
                    if left.is_set():
                        break
                    put(item)
        finally:
            put(_End())

    worker = _awaitable(produce, "polar-stream")
    try:
        while not isinstance(item := await queue.get(), _End):
            room.release()
            yield item
        await asyncio.shield(worker)  # raises what ended the generator
    finally:
        left.set()
        stop.set()
        room.release()  # wakes a producer that waits for room
        await _ended(worker)


def _awaitable(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `call` in a thread of its own, for the running event loop.

    The loop's own few threads would allow only that many requests to reach the engine, and a consumer that pauses would
    occupy one of them.
    """
    return asyncio.wrap_future(_start(call, name)[1])


async def _ended(worker: asyncio.Future[T]) -> None:
    """Wait until a thread has ended, however it did."""
    await asyncio.wait([worker])
    if not worker.cancelled():
        worker.exception()  # retrieved, so that asyncio does not report it again


def _start(call: Callable[[], T], name: str, *, daemon: bool = False) -> tuple[threading.Thread, Future[T]]:
    """Run `call` in a new thread, with the caller's context; the future gets its result or its error."""
    result: Future[T] = Future()

    def run() -> None:
        result.set_running_or_notify_cancel()  # from here on, nobody can cancel the future under the thread
        try:
            result.set_result(call())
        except BaseException as problem:  # handed to the waiting caller, whatever it is
            result.set_exception(problem)

    thread = threading.Thread(target=copy_context().run, args=(run,), name=name, daemon=daemon)
    thread.start()
    return thread, result
