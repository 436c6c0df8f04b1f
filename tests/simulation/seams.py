"""Simulated `threading`, `time`, `os` and clock, which the product's modules see while a world runs.

`install` replaces these names in every module of the product, once per process of the simulator; nothing of the
product is changed, and what is not simulated is the real thing. Each lock, wait, sleep and thread is a seam; they do
what the real ones of their names do.
"""

from __future__ import annotations

import datetime as datetime_module
import os
import queue
import random
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from tests.simulation.world import Killed, Process, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import ModuleType


_PRODUCT = ("polar_sdk", "polar_billing")
_NOBODY: Final = World("nobody")


def world() -> World:
    """The world whose schedule runs; between schedules, one in which nobody moves."""
    return World.now_in or _NOBODY


def is_dead() -> bool:
    """Whether the process that moves was killed."""
    task = world().current
    return task is not None and task.process.dead


class Lock:
    """`threading.Lock`; released by any thread, as the real one."""

    def __init__(self) -> None:
        self._taken = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        here = world()
        if not self._taken:
            here.step("lock")
        if self._taken and not (  # or another thread was first
            blocking and here.wait(lambda: not self._taken, None if timeout < 0 else timeout, "lock")
        ):
            return False
        self._taken = True
        return True

    def release(self) -> None:
        if not self._taken:
            raise RuntimeError("release unlocked lock")
        self._taken = False

    def release_wholly(self) -> int:
        """Free it however often it was taken; returns how often."""
        self.release()
        return 1

    def take_again(self, depth: int) -> None:
        """Undo `release_wholly`; in a dead process nobody else is left to take it."""
        if not is_dead():
            self.acquire()
        self._taken = True

    def locked(self) -> bool:
        return self._taken

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    """`threading.RLock`."""

    def __init__(self) -> None:
        super().__init__()
        self._owner: object = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = world().current
        if self._depth and self._owner is me:
            self._depth += 1
            return True
        if not super().acquire(blocking, timeout):
            return False
        self._owner, self._depth = me, 1
        return True

    def release(self) -> None:
        if self._owner is not world().current:
            raise RuntimeError("cannot release un-acquired lock")
        self._depth -= 1
        if not self._depth:
            self._owner = None
            super().release()

    def release_wholly(self) -> int:
        depth, self._depth, self._owner = self._depth, 0, None
        Lock.release(self)
        return depth

    def take_again(self, depth: int) -> None:
        super().take_again(depth)
        self._owner, self._depth = world().current, depth


class Event:
    """`threading.Event`."""

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return world().wait(lambda: self._set, timeout, "event")


class Condition:
    """`threading.Condition`."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = RLock() if lock is None else lock
        self._waiting: deque[Event] = deque()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        notified = Event()
        self._waiting.append(notified)
        depth = self._lock.release_wholly()
        try:
            return world().wait(notified.is_set, timeout, "condition")
        finally:
            if notified in self._waiting:
                self._waiting.remove(notified)
            self._lock.take_again(depth)

    def wait_for(self, ready: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = None if timeout is None else world().now + timeout
        while not (result := ready()):
            left = None if deadline is None else deadline - world().now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiting))):
            self._waiting.popleft().set()

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class SimpleQueue:
    """`queue.SimpleQueue`; `put` is no seam, since finalisers may call it."""

    def __class_getitem__(cls, _: object) -> type[SimpleQueue]:
        return cls

    def __init__(self) -> None:
        self._items: deque[Any] = deque()

    def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
        self._items.append(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not self._items and not (block and world().wait(lambda: bool(self._items), timeout, "queue")):
            raise queue.Empty
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


class Thread:
    """`threading.Thread`."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        self._target, self._args, self._kwargs = target, tuple(args), dict(kwargs or {})
        self.name, self.daemon = name or "thread", bool(daemon)
        self._task: Any = None

    @property
    def ident(self) -> int | None:
        return None if self._task is None else int(self._task.ident)

    def start(self) -> None:
        here = world()
        if here is _NOBODY:
            raise RuntimeError("can't start new thread")  # as at the end of an interpreter
        here.step(f"start {self.name}")
        self._task = here.spawn(here.process, self.run, self.name)
        self._task.thread = self

    def run(self) -> None:
        if self._target is not None:
            self._target(*self._args, **self._kwargs)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done

    def join(self, timeout: float | None = None) -> None:
        world().wait(lambda: not self.is_alive(), timeout, "join")


class InternalThread(Thread):
    """`polar_sdk.serving.threads.InternalThread`."""


def current_thread() -> Thread:
    """The thread that moves."""
    task = world().current
    if task is None:
        return _OUTSIDE
    if task.thread is None:
        task.thread = Thread(name=task.name)
        task.thread._task = task
    thread: Thread = task.thread
    return thread


_OUTSIDE = Thread(name="outside")
_MAIN = Thread(name="main")


class Namespace:
    """A module of which some names are simulated.

    Args:
        real: The module itself, for all other names.
        **simulated: The names.
    """

    def __init__(self, real: ModuleType, **simulated: object) -> None:
        self._real = real
        self.__dict__.update(simulated)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Datetime(type(datetime_module.datetime)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime_module.datetime)


class Datetime(datetime_module.datetime, metaclass=_Datetime):
    """`datetime.datetime`, whose `now` is the world's."""

    @classmethod
    def now(cls, tz: datetime_module.tzinfo | None = None) -> datetime_module.datetime:  # type: ignore[override]
        """The wall clock."""
        return world().wall.astimezone(tz)


class ChangesOfProcess:
    """`polar_billing.values.cached.Changes`, of which each process has its own."""

    @property
    def last(self) -> int:
        """Number of the last change that this process made."""
        task = world().current
        return 0 if task is None else task.process.changes.get(id(self), 0)

    def announce(self) -> None:
        world().process.changes[id(self)] = self.last + 1


class AtExit:
    """`atexit`, of a simulated process."""

    def register(self, call: Callable[..., object], *args: object) -> Callable[..., object]:
        """Call something when the process ends by itself."""
        task = world().current if World.now_in is not None else None
        if task is not None:
            task.process.at_exit.append(lambda: call(*args))
        return call


def exit_process(process: Process) -> None:
    """The process of the calling thread ends by itself: what it registered is called, the last first."""
    for call in reversed(process.at_exit):
        call()
    process.world.kill(process)
    raise Killed


def replacements() -> list[tuple[object, object]]:
    """Real things, and what stands for them."""
    import atexit

    seconds = {
        "monotonic": lambda: world().now,
        "perf_counter": lambda: world().now,
        "perf_counter_ns": lambda: int(world().now * 1e9),
        "clock_gettime_ns": lambda _clock: int(world().now * 1e9),
        "time": _seconds,
        "time_ns": lambda: int(world().wall.timestamp() * 1e6) * 1000,
        "sleep": lambda seconds: world().sleep(seconds),
    }
    threads: dict[str, object] = {
        "Lock": Lock,
        "RLock": RLock,
        "Condition": Condition,
        "Event": Event,
        "Thread": Thread,
        "current_thread": current_thread,
        "main_thread": lambda: _MAIN,
        "get_ident": lambda: current_thread().ident or 0,
    }
    draws = {name: _drawn(name) for name in ("uniform", "random", "choice", "randint", "shuffle")}
    return [
        (threading, Namespace(threading, **threads)),
        (time, Namespace(time, **seconds)),
        (random, Namespace(random, **draws)),
        (atexit, AtExit()),
        (queue.SimpleQueue, SimpleQueue),
        (datetime_module.datetime, Datetime),
    ]


def _seconds() -> float:
    return world().wall.timestamp()


def _drawn(name: str) -> Callable[..., Any]:
    def drawn(*args: Any) -> Any:
        return getattr(world().random, name)(*args)

    return drawn


def install(pairs: Iterable[tuple[object, object]], more: Iterable[ModuleType] = ()) -> None:
    """Put simulated things in the place of real ones, in every loaded module of the product.

    Args:
        pairs: The real thing and what stands for it.
        more: Modules of the standard library that the product waits in.
    """
    simulated = {id(real): stand_in for real, stand_in in pairs}
    for module in [*_modules(), *more]:
        for name, value in list(vars(module).items()):
            if id(value) in simulated and not name.startswith("__"):
                setattr(module, name, simulated[id(value)])


def _modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in _PRODUCT]


def pid() -> int:
    """Number of the process that moves."""
    task = None if World.now_in is None else World.now_in.current
    return os.getpid() if task is None else task.process.pid
