"""Threads of the engine, and blocking engine calls in separate threads: loading, and calls from asyncio.

The engine itself is synchronous. A call from asyncio runs with its caller's context variables, and stops when the task
that awaits it is cancelled. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from contextlib import closing, suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from weakref import WeakSet, ref

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

    from polar_sdk.serving.request import Cancel


T = TypeVar("T")
AHEAD = 2
"""Number of pieces of a stream computed before its consumer requests them: enough to hide the handover, and little to
waste if it leaves."""
_LOOK_SECONDS: Final = 0.5
"""How often a producer that waits for its reader looks whether that is still there."""
_INBOXES: Final[WeakSet[Inbox[Any]]] = WeakSet()


class InternalThread(threading.Thread):
    """A thread that serves every caller, and therefore may wait for none of them."""


class Inbox(Generic[T]):
    """Items that callers leave to one thread, which starts with the first and ends after a while without any.

    Callers and the thread share no lock of Python: Ctrl-C may stop the main thread between two steps, and a lock that
    it left locked there would stop the thread, and with it every other caller. `SimpleQueue.put` is one step, which a
    finaliser may take, too, whatever its thread holds. In a forked child an inbox is empty.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.restart()
        _INBOXES.add(self)

    def restart(self) -> None:
        """Begin empty, without a thread."""
        self.thread: threading.Thread | None = None
        """The one that serves now."""
        self._items: SimpleQueue[T] = SimpleQueue()
        self._serving = threading.Lock()
        """Held by the thread as long as it serves."""
        self.resting = False
        """Whether the thread waits for the next item for ever; for a thread that says so."""

    @property
    def is_served(self) -> bool:
        """Whether the thread lives."""
        return self._serving.locked()

    def put(self, item: T, serve: Callable[[], None]) -> None:
        """Leave an item to the thread.

        Args:
            item: What to leave.
            serve: Run by a new thread: takes items, and returns when there are none for a while. Not kept here, where
                it would keep its owner alive.

        Raises:
            RuntimeError: No thread can be started. A later one finds the item.
        """
        self._items.put(item)
        self.start(serve)

    def start(self, serve: Callable[[], None]) -> None:
        """Start the thread if it does not live."""
        if not self._serving.locked():  # two may be started: one of them ends at once
            InternalThread(target=self._run, args=(serve,), name=self._name, daemon=True).start()

    def take(self, seconds: float | None = 0.0) -> T:
        """The oldest item.

        Args:
            seconds: How long to wait for it; None = for ever.

        Raises:
            queue.Empty: There is none.
        """
        return self._items.get(block=seconds != 0, timeout=seconds)

    def _run(self, serve: Callable[[], None]) -> None:
        while self._serving.acquire(blocking=False):
            self.thread = threading.current_thread()
            try:
                serve()
            finally:
                self.thread = None
                self._serving.release()
            if self._items.empty():  # else who has just put one in may have seen this thread alive
                return


def run_apart(call: Callable[[Cancel], T]) -> T:
    """Run heavy work in a thread that ends with it, and wait; its errors are raised here.

    libgomp keeps a pool for every thread that has ever run a parallel region, and once the pools hold more threads than
    there are cores, none of them may spin while it waits: a model loaded in the main thread then decodes at half speed
    in the engine's (`benchmarks/LOG.md`). The pool of a thread ends with it.

    Args:
        call: The work. What it is given is set when the caller was interrupted; the interruption is raised when the
            work has ended, since a process must not end while a thread of its own is inside torch.
    """
    stop = threading.Event()
    worker, result = _thread(lambda: call(stop), "polar-load")
    try:
        worker.start()
        return result.result()
    finally:
        stop.set()
        if worker.is_alive():
            worker.join()


class _Reader:
    """Held by who awaits a call or reads a stream, and by nothing else: it has left once this is gone.

    So no finaliser has to say so, which a signal could cut short.
    """


class _AnyCancel:
    """Set when the reader has left, or when the caller's own cancel is."""

    def __init__(self, reader: _Reader, caller: Cancel | None) -> None:
        self._reader, self._caller = ref(reader), caller

    @property
    def left(self) -> bool:
        """Whether the reader has left."""
        return self._reader() is None

    def is_set(self) -> bool:
        return self.left or (self._caller is not None and self._caller.is_set())


class _End:
    """The end of a stream that another thread produces."""


async def run_in_thread(call: Callable[[Cancel], T], cancel: Cancel | None) -> T:
    """Run `call` in a thread; if the awaiting task is cancelled, request it to stop and wait until it has.

    The wait ensures that after a cancellation nothing is computed any more and the usage record is stored, however
    often the task is cancelled (anyio cancels at every await). The first cancellation is raised.
    """
    reader = _Reader()
    stop = _AnyCancel(reader, cancel)
    worker = _awaitable(lambda: call(stop), "polar-request")
    try:
        return await asyncio.shield(worker)
    except asyncio.CancelledError:
        del reader
        await _ended(worker)
        raise


async def iterate_in_thread(
    start: Callable[[Cancel], Generator[T, None, None]], cancel: Cancel | None
) -> AsyncIterator[T]:
    """Iterate a blocking generator in a thread, at the consumer's pace; leaving early stops it within one item."""
    reader = _Reader()
    stop = _AnyCancel(reader, cancel)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[T | _End] = asyncio.Queue()
    room: SimpleQueue[None] = SimpleQueue()  # not a semaphore, whose lock a signal could leave locked
    for _ in range(AHEAD):
        room.put(None)

    def put(item: T | _End) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, item)

    def produce() -> None:
        try:
            with closing(start(stop)) as items:
                for item in items:
                    if not _has_room(room, stop):
                        break
                    put(item)
        finally:
            put(_End())

    worker = _awaitable(produce, "polar-stream")
    cancelled: asyncio.CancelledError | None = None
    try:
        while not isinstance(item := await queue.get(), _End):
            room.put(None)
            yield item
        await asyncio.shield(worker)  # raises what ended the generator
    except asyncio.CancelledError as raised:
        cancelled = raised
        raise
    finally:
        del reader
        room.put(None)  # wakes a producer that waits for it
        later = await _ended(worker)
        try:
            if later is not None and cancelled is None:
                raise later
        finally:
            del later, cancelled  # their tracebacks refer to this frame


def _has_room(room: SimpleQueue[None], stop: _AnyCancel) -> bool:
    """Wait until the reader has room for an item; False once it has left."""
    while not stop.left:
        with suppress(Empty):
            room.get(timeout=_LOOK_SECONDS)
            return not stop.left
    return False


def _awaitable(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `call` in a new thread, with the caller's context, for the running event loop.

    The loop's own few threads would allow only that many requests to reach the engine, and a consumer that pauses would
    occupy one of them.
    """
    worker, result = _thread(call, name)
    worker.start()
    return asyncio.wrap_future(result)


def _thread(call: Callable[[], T], name: str) -> tuple[threading.Thread, Future[T]]:
    """A thread to be started, which runs `call` with the caller's context, and the future of its result."""
    result: Future[T] = Future()

    def run() -> None:
        result.set_running_or_notify_cancel()  # from here on, nobody can cancel the future under the thread
        try:
            result.set_result(call())
        except BaseException as problem:  # handed to whoever waits, whatever it is
            result.set_exception(problem)

    return threading.Thread(target=copy_context().run, args=(run,), name=name), result


async def _ended(worker: asyncio.Future[T]) -> asyncio.CancelledError | None:
    """Wait until a thread has ended, however it did and however often this task is cancelled meanwhile.

    Returns:
        The first of those cancellations.
    """
    first: asyncio.CancelledError | None = None
    while not worker.done():
        try:
            await asyncio.wait([worker])
        except asyncio.CancelledError as raised:
            first = first or raised
    if not worker.cancelled():
        worker.exception()  # retrieved, so that asyncio does not report it again
    return first


def _restart_inboxes() -> None:
    for inbox in list(_INBOXES):
        inbox.restart()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_restart_inboxes)
