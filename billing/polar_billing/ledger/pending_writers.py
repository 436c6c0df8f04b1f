"""Writers that store records a moment after they accepted them: readers of the ledger in this process wait for them.

Knows no spool.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import MutableSet


class Pending(Protocol):
    """A writer that may hold records back for a moment."""

    @property
    def lags(self) -> bool:
        """Whether it holds records back that their callers do not wait for."""

    def drain(self) -> None:
        """Return when every record submitted so far is stored, or safe on the disk."""


_lock: Final = threading.Lock()
_pending: Final[defaultdict[str, MutableSet[Pending]]] = defaultdict(weakref.WeakSet)


def register_pending(ledger: str, writer: Pending) -> None:
    """Note that a writer may hold records of a ledger back, for as long as it lives; by `Ledger.identity`."""
    with _lock:
        _pending[ledger].add(writer)


def drain(ledger: str) -> None:
    """Wait for every record on its way into a ledger in this process."""
    for writer in _writers(ledger):
        writer.drain()


def lags(ledger: str) -> bool:
    """Whether records are on their way into a ledger in this process that their callers do not wait for."""
    return any(writer.lags for writer in _writers(ledger))


def _writers(ledger: str) -> list[Pending]:
    with _lock:
        return list(_pending.get(ledger, ()))
