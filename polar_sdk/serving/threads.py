"""Blocking engine calls in threads of their own: heavy work, and calls from asyncio, whose loop must not be blocked.

The engine itself is synchronous. Such a thread runs with the caller's context variables, and stops when the task that
awaits it is cancelled. Also here: how clean-up is kept from being interrupted, and from waiting for its own thread.
Knows nothing of models.
"""

from __future__ import annotations

import _thread
import asyncio
import ctypes
import gc
import threading
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import closing
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

    from polar_sdk.serving.request import Cancel


T = TypeVar("T")
AHEAD = 2
"""Number of pieces of a stream computed before its consumer requests them: enough to hide the handover, and little to
waste if it leaves."""
_LOOK_SECONDS: Final = 0.05
"""How often to look whether a thread has ended that was interrupted, and may not have said so."""


class InternalThread(threading.Thread):
    """A thread that serves every caller, and therefore may wait for none of them."""


class _Collector:
    """Which thread the cyclic garbage collector runs in now; it runs in one at a time.

    What it calls is the interpreter's own code: a signal handler may raise in the first step of a function of Python,
    and a collection of which only the start was noted would never seem to end.
    """

    def __init__(self) -> None:
        self._phases = OrderedDict[str, None](start=None, stop=None)
        """The last is where the collector is."""
        self._latest, self._here = SimpleNamespace(start=None), threading.local()
        """What the collector said of the collection that began last: in any thread, and in each."""
        gc.callbacks.append(self._phases.move_to_end)  # type: ignore[arg-type]  # what is said reads as `last=True`
        gc.callbacks.extend([partial(setattr, self._latest), partial(setattr, self._here)])

    @property
    def runs_here(self) -> bool:
        """Whether it runs in this thread."""
        running = next(reversed(self._phases)) == "start"
        return running and getattr(self._here, "start", None) is self._latest.start


_COLLECTOR: Final = _Collector()


class _AnyCancel:
    """Set when the task is cancelled, or when the caller's own cancel is. Takes no lock: finalisers set it."""

    def __init__(self, caller: Cancel | None) -> None:
        self._caller = caller
        self.left = False
        """Whether the task was cancelled or has left its stream."""

    def is_set(self) -> bool:
        return self.left or (self._caller is not None and self._caller.is_set())


class _Leave:
    """Tells a producer that its consumer has left: when called, or when collected with a consumer left unclosed."""

    def __init__(self, stop: _AnyCancel, room: SimpleQueue[None]) -> None:
        self._stop, self._room = stop, room

    def __call__(self) -> None:
        self._stop.left = True
        self._room.put(None)  # wakes a producer that waits for room

    __del__ = __call__


class _End:
    """The end of a stream that another thread produces."""


def may_wait() -> bool:
    """False where waiting for a request could be waiting for this very thread.

    That is so in a thread that serves every caller, and wherever the cyclic garbage collector is running: it runs
    finalisers in whatever thread allocates, which may hold any lock of ours, of a sink or of the user.
    """
    return not _COLLECTOR.runs_here and not isinstance(threading.current_thread(), InternalThread)


def start_detached(call: Callable[[], object], name: str) -> None:
    """Start a daemon thread without waiting until it runs: safe in finalisers and under signals.

    Raises:
        RuntimeError: No thread can be started; at the end of the process, none can.
    """
    _thread.start_new_thread(_start_internal, (call, name))


def _start_internal(call: Callable[[], object], name: str) -> None:
    InternalThread(target=call, name=name, daemon=True).start()


class Inbox(Generic[T]):
    """What callers hand over to one thread, which begins with the first item and ends after a while without any.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self.thread: threading.Thread | None = None
        """The one that serves now."""
        self._name = name
        self._items: SimpleQueue[T] = SimpleQueue()
        self._serving = threading.Lock()
        """Held by the thread as long as it serves."""

    @property
    def is_served(self) -> bool:
        """Whether the thread lives."""
        return self._serving.locked()

    def put(self, item: T, serve: Callable[[], None]) -> None:
        """Hand an item over. Waits for nothing: safe in finalisers, and where signals interrupt it, to be repeated.

        Args:
            item: What to hand over.
            serve: What a new thread runs: takes items, and returns when there are none for a while. Not kept here,
                where it would keep its owner alive.

        Raises:
            RuntimeError: No thread can be started. A later one finds the item.
        """
        self._items.put(item)
        self.start(serve)

    @property
    def put_quietly(self) -> Callable[[T], None]:
        """Adds an item without starting a thread: a method of the interpreter, which is one step of it."""
        return self._items.put

    def start(self, serve: Callable[[], None]) -> None:
        """Start the thread if it does not live."""
        if not self._serving.locked():  # two may be started: one of them ends at once
            start_detached(lambda: self._run(serve), self._name)

    def take(self, seconds: float | None = 0.0) -> T:
        """The oldest item.

        Args:
            seconds: How long to wait for it; None = for ever.

        Raises:
            queue.Empty: There is none.
        """
        return self._items.get(block=seconds != 0, timeout=seconds)

    def run_instead(self, call: Callable[[], object]) -> None:
        """Run a call in place of the thread, unless it lives."""
        if self._serving.acquire(blocking=False):
            try:
                call()
            finally:
                self._serving.release()

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


def run_uncut(call: Callable[[], T]) -> T:
    """Run a call that no signal handler can cut off; the first thing a handler raises meanwhile is raised at the end.

    Python runs signal handlers in the main thread. There the call runs in another thread, and elsewhere in place.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    result: Future[T] = Future()
    begun, ended = threading.Lock(), threading.Lock()
    context = copy_context()
    ended.acquire()

    def run() -> None:
        if begun.acquire(blocking=False):  # a handler may raise between the start of the thread and the note of it
            _fulfil(result, lambda: context.run(call))
            ended.release()

    interruption: BaseException | None = None
    started = False
    while True:
        try:
            if not started:
                try:
                    start_detached(run, "polar-record")
                except RuntimeError:
                    run()
                started = True
            with ended:
                break
        except BaseException as raised:  # whatever a handler raises
            interruption = interruption or raised
    try:
        value = result.result()
        if interruption is not None:
            raise interruption
        return value
    finally:
        del interruption  # its traceback refers to this frame


def run_apart(call: Callable[[], T]) -> T:
    """Run heavy work in a thread that ends with it, and wait; its errors are raised here.

    libgomp keeps a pool for every thread that has ever run a parallel region, and once the pools hold more threads than
    there are cores, none of them may spin while it waits: a model loaded in the main thread then decodes at half speed
    in the engine's (`benchmarks/LOG.md`). The pool of a thread ends with it.

    What a signal handler raises here ends the work as it would end it in this thread, at its next line of Python, and
    is raised when the work has ended: a process must not end while a thread of its own is inside torch.

    Raises:
        RuntimeError: No thread can be started.
    """
    result: Future[T] = Future()
    begun, ended = threading.Lock(), threading.Event()
    worker: list[threading.Thread] = []
    context = copy_context()

    def run() -> None:
        if begun.acquire(blocking=False):  # a handler may raise between the start of the thread and the note of it
            worker.append(threading.current_thread())
            try:
                _fulfil(result, lambda: context.run(call))
            finally:
                ended.set()

    interruption: BaseException | None = None
    started, stop = False, False
    while not worker or worker[0].is_alive():  # until its pool is gone; `join` takes a thread for ended if interrupted
        try:
            if not started:
                threading.Thread(target=run, name="polar-load").start()
                started = True
            if stop and worker:
                stop = False
                _stop(worker[0])
            ended.wait(_LOOK_SECONDS)
        except BaseException as raised:  # whatever a handler raises
            if isinstance(raised, RuntimeError) and not started:
                raise
            interruption, stop = interruption or raised, True
    try:
        if interruption is not None:
            raise interruption
        return result.result()
    finally:
        del interruption  # its traceback refers to this frame


def _stop(thread: threading.Thread) -> None:
    """Raise `SystemExit` in a thread, at its next line of Python; there is no other way to interrupt a library."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


async def run_in_thread(call: Callable[[Cancel], T], cancel: Cancel | None) -> T:
    """Run `call` in a thread; if the awaiting task is cancelled, request it to stop and wait until it has.

    The wait ensures that after a cancellation nothing is computed any more and the usage record is stored, however
    often the task is cancelled (anyio cancels at every await). The first cancellation is raised.
    """
    stop = _AnyCancel(cancel)
    worker = _awaitable(lambda: call(stop), "polar-request")
    try:
        return await asyncio.shield(worker)
    except asyncio.CancelledError:
        stop.left = True
        await _ended(worker)
        raise


async def iterate_in_thread(
    start: Callable[[Cancel], Generator[T, None, None]], cancel: Cancel | None
) -> AsyncIterator[T]:
    """Iterate a blocking generator in a thread, at the consumer's pace; leaving early stops it within one item."""
    stop = _AnyCancel(cancel)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[T | _End] = asyncio.Queue()
    room: SimpleQueue[None] = SimpleQueue()  # not a semaphore, whose lock would not bear a finaliser
    for _ in range(AHEAD):
        room.put(None)

    def put(item: T | _End) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, item)

    def produce() -> None:
        try:
            with closing(start(stop)) as items:
                for item in items:
                    room.get()
                    if stop.left:
                        break
                    put(item)
        finally:
            put(_End())

    worker = _awaitable(produce, "polar-stream")
    leave = _Leave(stop, room)
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
        leave()
        later = await _ended(worker)
        try:
            if later is not None and cancelled is None:
                raise later
        finally:
            del later, cancelled  # their tracebacks refer to this frame


def _awaitable(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `call` in a thread of its own, for the running event loop.

    The loop's own few threads would allow only that many requests to reach the engine, and a consumer that pauses would
    occupy one of them.
    """
    return asyncio.wrap_future(_start(call, name)[1])


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


def _start(call: Callable[[], T], name: str) -> tuple[threading.Thread, Future[T]]:
    """Run `call` in a new thread, with the caller's context; the future gets its result or its error."""
    result: Future[T] = Future()

    def run() -> None:
        _fulfil(result, call)

    thread = threading.Thread(target=copy_context().run, args=(run,), name=name)
    thread.start()
    return thread, result


def _fulfil(result: Future[T], call: Callable[[], T]) -> None:
    """Run a call for a future, which gets its result or its error."""
    result.set_running_or_notify_cancel()  # from here on, nobody can cancel the future under the thread
    try:
        result.set_result(call())
    except BaseException as problem:  # handed to the waiting caller, whatever it is
        result.set_exception(problem)
