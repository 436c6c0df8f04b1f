"""Locks that neither a fork nor a signal leaves locked.

A fork copies a lock that another thread holds, and not that thread: in the child nobody would ever free it. A signal
handler that raises, as Ctrl-C does, may hit the main thread anywhere between two steps of the interpreter. `with lock:`
withstands that for the locks of `threading.Lock` and `RLock`, whose two ends are one step each; `threading.Condition`,
`Event` and `Barrier` are written in Python and may stay locked for ever. What another thread needs is therefore
protected by a plain lock, `Changes` or `Latch`. Knows only the standard library.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

A = TypeVar("A")
L = TypeVar("L")
R = TypeVar("R")
_LOCKS: Final[WeakSet[Any]] = WeakSet()


def renewed_in_child(lock: L) -> L:
    """The lock (of `threading.Lock` or `RLock`), which nobody holds in a child that this process forks.

    What it protects must be usable whenever a thread may stop: each change is one step of the interpreter, or the
    child begins anew.
    """
    _LOCKS.add(lock)
    return lock


class Latch:
    """Opens once and stays open. A waiter that is interrupted harms nobody."""

    def __init__(self) -> None:
        self._is_open = False
        self._gates: list[threading.Lock] = []

    @property
    def is_open(self) -> bool:
        """Whether it was opened."""
        return self._is_open

    def open(self) -> None:
        """Let everybody pass from now on."""
        self._is_open = True
        _open_all(self._gates)

    def wait(self) -> None:
        """Wait until it is open."""
        gate = _closed_gate()
        self._gates.append(gate)
        if not self._is_open:  # else it may have been opened just before it could see this gate
            gate.acquire()


class Changes:
    """Of something that `lock` protects, and that threads wait for: a condition variable that bears signals.

    Change it under `with changes.lock:` and call `notify` there. The lock is held for moments only, never while
    waiting.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._gates: list[threading.Lock] = []

    def notify(self) -> None:
        """Wake everybody who waits, to look again. With or without the lock."""
        _open_all(self._gates)

    def gate(self) -> threading.Lock:
        """For who holds the lock: what to acquire after it is released, to wait for the next change."""
        gate = _closed_gate()
        self._gates.append(gate)
        return gate

    def wait_for(self, ready: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait until something holds; called without the lock, which is held while `ready` looks.

        Args:
            ready: Whether it holds.
            timeout: How long to wait at most; None = for ever. Unit: seconds.

        Returns:
            Whether it held at the end. Another thread may have changed it since.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self.lock:
                if ready():
                    return True
                gate = self.gate()
            left = -1.0 if deadline is None else deadline - time.monotonic()
            if deadline is not None and left <= 0:
                return False
            gate.acquire(timeout=left)


class _Call(Generic[A, R]):
    """One call of `Together`."""

    def __init__(self, asked: A) -> None:
        self.asked = asked
        self.outcome: tuple[R, None] | tuple[None, BaseException] | None = None


class Together(Generic[A, R]):
    """Calls that come while another one runs share the next run, which one of them makes for all.

    Args:
        run: Calls what it is given, once it is ready to serve, and gets what each call asks, in the order in which they
            came; returns what each gets. Calls that come while it gets ready, as when it waits for a lock, are served
            with the others.
        shared: Errors of `run` that every call of that run raises. Whatever else it raises belongs to the thread that
            ran it, as Ctrl-C does, and what the others ask is run again.
        most: Calls of one run.
    """

    def __init__(
        self, run: Callable[[Callable[[], Sequence[A]]], Sequence[R]], *, shared: type[Exception], most: int = 100
    ) -> None:
        self._run, self._shared, self._most = run, shared, most
        self._start_anew()

    def _start_anew(self) -> None:
        """Start with no calls: at first, and in a forked child, where those of other threads are not."""
        self._process = os.getpid()
        self._turn = threading.Lock()
        """Held while one runs."""
        self._calls: list[_Call[A, R]] = []
        """Those that wait, in order, and some that have been served."""

    def __call__(self, asked: A) -> R:
        """What `run` returns for this."""
        if self._process != os.getpid():
            self._start_anew()
        call: _Call[A, R] = _Call(asked)
        try:
            self._calls.append(call)
            while call.outcome is None:
                with self._turn:
                    if call.outcome is None:
                        self._run_waiting()
        finally:
            with suppress(ValueError):
                self._calls.remove(call)
        result, error = call.outcome
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only where there is an error, or where that is the result

    def _run_waiting(self) -> None:
        """Run for those that wait, whoever runs."""
        for call in self._calls[:]:
            if call.outcome is not None:  # its caller has not woken yet, or was stopped before it could take it out
                with suppress(ValueError):
                    self._calls.remove(call)
        calls: list[_Call[A, R]] = []

        def take() -> Sequence[A]:
            calls[:] = self._calls[: self._most]
            return [call.asked for call in calls]

        try:
            results = self._run(take)
        except self._shared as error:
            for call in calls or self._calls[: self._most]:
                call.outcome = None, error
        else:
            for call, result in zip(calls, results, strict=True):
                call.outcome = result, None


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate


def _open_all(gates: list[threading.Lock]) -> None:
    """Each gate is opened before it is forgotten, so that a call that is cut off leaves nobody waiting."""
    for gate in list(gates):
        with suppress(RuntimeError):  # it is open: by a call that was cut off, or by another thread
            gate.release()
        with suppress(ValueError):
            gates.remove(gate)


def _renew() -> None:
    for lock in list(_LOCKS):
        lock._at_fork_reinit()  # as the standard library does with its own
    if sys.version_info < (3, 12):
        _renew_properties()


def _renew_properties() -> None:
    """Until Python 3.11 a cached property has one lock for all objects of its class."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("polar_sdk", "polar_billing", "polar_server") and module is not None:
            for kind in list(vars(module).values()):
                for attribute in list(vars(kind).values()) if isinstance(kind, type) else ():
                    if isinstance(attribute, cached_property):
                        attribute.lock = threading.RLock()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew)
