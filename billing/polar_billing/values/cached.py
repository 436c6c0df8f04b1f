"""A value that is read rarely and cached: read again after some time, or as soon as it changes in this process.

For what every request needs from a ledger and what seldom changes: the price books in force, who has budgets. Knows no
ledger.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")


class Changes:
    """Changes that this process makes itself, so that it sees them at once. One object per kind of value."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.last = 0

    def announce(self) -> None:
        """Say that such a value has changed in some ledger: it is read again wherever it is remembered."""
        self.last = next(self._numbers)


class CachedValue(Generic[Value]):
    """The value that was read last. Safe in several threads, which may read it twice."""

    def __init__(self, read: Callable[[], Value], changes: Changes) -> None:
        self._read = read
        self._changes = changes
        self._read_at = float("-inf")
        self._read_after = 0
        self.value: Value | None = None
        """None until it could be read."""
        self.failure: Exception | None = None
        """Why it could not be read the last time that it was tried without success."""

    def refresh(self, seconds: float) -> None:
        """Read the value if that is due; if it fails, the former one stays and is good for another period."""
        now, after = time.monotonic(), self._changes.last
        if now - self._read_at < seconds and self._read_after == after:
            return
        try:
            self.value = self._read()
        except Exception as error:
            self.failure = error
            raise
        finally:  # only now: until then another thread must not take the value for a new one
            self._read_at, self._read_after = now, after

    def known(self) -> Value:
        """The value that was read last; if it never could be, the error of that is raised."""
        if self.value is None:
            assert self.failure is not None, "refresh comes first"
            raise self.failure
        return self.value

    def forget(self) -> None:
        """Read it again next time, whatever the clock says."""
        self._read_at = float("-inf")
