"""Locks that a forked child can take, whoever held them in the parent.

A fork copies a lock that another thread holds, and not that thread: in the child nobody would ever free it. Knows only
the standard library.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import cached_property
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
