"""Run blocking engine calls from asyncio without blocking the loop, and stop them when their task is cancelled.

The engine itself is synchronous; a worker thread runs it, with the caller's context variables. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

    from polar_sdk.serving.request import Cancel


T = TypeVar("T")
_AHEAD = 2
"""Items made before the consumer asks for them: enough to hide the hand-over, little to waste where it leaves."""


class _AnyCancel:
    """Set when the task is cancelled, or when the caller's own cancel is."""

    def __init__(self, caller: Cancel | None) -> None:
        self._caller = caller
        self._own = threading.Event()

    def set(self) -> None:
        self._own.set()

    def is_set(self) -> bool:
        return self._own.is_set() or (self._caller is not None and self._caller.is_set())


async def run_in_thread(call: Callable[[Cancel], T], cancel: Cancel | None) -> T:
    """Run `call` in a thread; if the awaiting task is cancelled, ask it to stop and wait until it has.

    Waiting keeps the promise that after a cancellation nothing computes any more and the usage record is stored.
    """
    stop = _AnyCancel(cancel)
    worker = _in_own_thread(lambda: call(stop))
    try:
        return await asyncio.shield(worker)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([worker])
        if not worker.cancelled():
            worker.exception()  # retrieved, so that asyncio does not report it a second time
        raise


def _in_own_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run `call` in a thread of its own, with the caller's context.

    The event loop's few threads would let only so many requests reach the engine at a time.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, problem: BaseException | None) -> None:
        if problem is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(problem)

    def run() -> None:
        try:
            result = call()
        except BaseException as problem:  # handed to the awaiting task, whatever it is
            loop.call_soon_threadsafe(settle, None, problem)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=copy_context().run, args=(run,), name="polar-request").start()
    return future


class _End:
    """The end of a generator that ran in a thread, with the error that ended it, if any."""

    def __init__(self, problem: BaseException | None) -> None:
        self.problem = problem


async def iterate_in_thread(
    start: Callable[[Cancel], Generator[T, None, None]], cancel: Cancel | None
) -> AsyncIterator[T]:
    """Iterate a blocking generator in a thread, at the consumer's pace; leaving early stops it within one item."""
    stop = _AnyCancel(cancel)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[T | _End] = asyncio.Queue()
    finished = asyncio.Event()
    left = threading.Event()
    room = threading.Semaphore(_AHEAD)

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
        except BaseException as problem:  # handed to the consumer, whatever it is
            put(_End(problem))
        else:
            put(_End(None))
        loop.call_soon_threadsafe(finished.set)

    # A thread of its own: one of the loop's few would be held as long as the consumer pauses, and all of them by a
    # consumer that reads many streams in turn.
    threading.Thread(target=copy_context().run, args=(produce,), name="polar-stream").start()
    try:
        while not isinstance(item := await queue.get(), _End):
            room.release()
            yield item
        if item.problem is not None:
            raise item.problem
    finally:
        left.set()
        stop.set()
        room.release()  # wakes a producer that waits for room
        await finished.wait()
