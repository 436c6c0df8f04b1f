"""Run heavy work in a thread that ends with it.

libgomp keeps a pool for every thread that ever ran a parallel region, and once the pools hold more threads than there
are cores, none of them may spin while it waits: a model loaded in the main thread then decodes at half the speed in the
engine's (`benchmarks/LOG.md`). The pool of a thread that has ended is gone.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_apart"]

T = TypeVar("T")


def run_apart(call: Callable[[], T]) -> T:
    """Call in a thread of its own and wait for it; what it raises is raised here."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as problem:  # handed to the caller, whatever it is
            done.set_exception(problem)

    thread = threading.Thread(target=copy_context().run, args=(run,), name="polar-load", daemon=True)
    thread.start()
    result = done.result()
    thread.join()  # so that its pool is gone
    return result
