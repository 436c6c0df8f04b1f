"""Who still has records on the way into a ledger, so that whoever reads it in this process sees them.

A meter hands records to a thread that stores them a moment later. Reading the same ledger through another object
first waits for that. Knows neither meters nor stores.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import MutableSet


class Pending(Protocol):
    """Something that may hold records back."""

    def drain(self) -> None:
        """Return when every record handed over so far is stored, or kept in the spool."""


_lock: Final = threading.Lock()
_pending: Final[defaultdict[str, MutableSet[Pending]]] = defaultdict(weakref.WeakSet)


def register(ledger: str, pending: Pending) -> None:
    """Say that something may hold records of a ledger back, for as long as it lives."""
    with _lock:
        _pending[ledger].add(pending)


def drain(ledger: str) -> None:
    """Wait for every record on the way into a ledger in this process."""
    with _lock:
        waiting = list(_pending.get(ledger, ()))
    for one in waiting:
        one.drain()
