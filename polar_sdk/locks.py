"""Locks that are free in a forked child: a fork copies a lock that another thread holds, but not that thread.

Knows only the standard library.
"""

from __future__ import annotations

import os
from typing import Any, Final, TypeVar
from weakref import WeakSet

L = TypeVar("L")
_LOCKS: Final[WeakSet[Any]] = WeakSet()


def renewed_in_child(lock: L) -> L:
    """The lock (of `threading.Lock` or `RLock`), which nobody holds in a child that this process forks.

    What it protects must be usable whenever a thread may stop: each change is one step of the interpreter, or the
    child begins anew.
    """
    _LOCKS.add(lock)
    return lock


def _renew() -> None:
    for lock in list(_LOCKS):
        lock._at_fork_reinit()  # as the standard library does with its own


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew)
