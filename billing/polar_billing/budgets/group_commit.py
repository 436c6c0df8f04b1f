"""Group commit: calls that come while another one runs share the next run, which one of them makes for all.

Knows no SQL and no budgets: what a run does is passed in.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

A = TypeVar("A")
R = TypeVar("R")


class _Call(Generic[A, R]):
    """One call, and what came of it."""

    def __init__(self, argument: A) -> None:
        self.argument = argument
        self.outcome: tuple[R, None] | tuple[None, BaseException] | None = None


class GroupCommit(Generic[A, R]):
    """Runs calls in groups. Safe in several threads and after a fork.

    Args:
        run: Gets a function that returns the arguments of all calls, to be called once it is ready to serve: calls that
            come while it waits for a lock are served with the others. Returns their results, in the same order.
        shared: Errors of `run` that every call of the group raises. Any other belongs to the thread that ran it, as
            Ctrl-C does, and the other calls are run again.
        maximum: Calls of one group.
    """

    def __init__(
        self, run: Callable[[Callable[[], Sequence[A]]], Sequence[R]], *, shared: type[Exception], maximum: int = 100
    ) -> None:
        self._run, self._shared, self._maximum = run, shared, maximum
        self._start_anew()

    def _start_anew(self) -> None:
        """Start with no calls: at first, and in a forked child, where those of other threads are not."""
        self._process = os.getpid()
        self._running = threading.Lock()
        self._calls: list[_Call[A, R]] = []
        """Those that wait, in order, and some that have been served."""

    def __call__(self, argument: A) -> R:
        """Run a call, alone or with others; returns its result."""
        if self._process != os.getpid():
            self._start_anew()
        call: _Call[A, R] = _Call(argument)
        try:
            self._calls.append(call)
            while call.outcome is None:
                with self._running:
                    if call.outcome is None:
                        self._run_group()
        finally:
            with suppress(ValueError):
                self._calls.remove(call)
        result, error = call.outcome
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only where there is an error, or where that is the result

    def _run_group(self) -> None:
        for call in [call for call in self._calls if call.outcome is not None]:
            with suppress(ValueError):  # its caller has just woken, or was stopped before it could take it out
                self._calls.remove(call)
        group: list[_Call[A, R]] = []

        def take() -> Sequence[A]:
            group[:] = self._calls[: self._maximum]
            return [call.argument for call in group]

        try:
            results = self._run(take)
        except self._shared as error:
            for call in group or self._calls[: self._maximum]:
                call.outcome = None, error
        else:
            for call, result in zip(group, results, strict=True):
                call.outcome = result, None
