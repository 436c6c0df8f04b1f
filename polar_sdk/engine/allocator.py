"""The C library's allocator: how many arenas threads share, and whether freed memory is given back or kept.

All of it concerns glibc, Linux's usual C library; others have no such settings, and nothing happens there.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
"""Constants of glibc's malloc.h."""
_BLOCKS: Final = 65536
"""glibc's default: so many blocks may lie outside the heap."""
_LARGE: Final = 32 << 20
"""Size from which a block lies outside the heap, as high as glibc raises it by itself. Unit: bytes."""
_OF_FREED: Final = ("mmap_max", "mmap_threshold", "trim_threshold")
"""Tunables of glibc that decide whether freed memory is kept."""

_keeping = 0
"""Number of blocks of code that want freed memory kept."""


def keep_few_arenas() -> None:
    """Have threads share two arenas of memory: with one for each thread, each keeps what it has free.

    With 32 callers that added 7 % to the memory of a process within four minutes.
    """
    if not _is_set("MALLOC_ARENA_MAX", "arena_max"):
        _set(_ARENA_MAX, 2)


def give_back_freed_memory() -> None:
    """Give memory that was freed back to the system.

    Loading and packing a model free about as much as a quarter of its weights, in pieces that nothing later asks for.
    """
    _call("malloc_trim", 0)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Keep freed memory for what is allocated next while the block runs, and give it back afterwards.

    glibc gives every large block back at once. Whoever allocates the like again, as each step of a training does, gets
    it from the system page by page, each zeroed first: training the maps of a 0.5B model spent 30 % of its time on
    that, and takes a tenth more memory without (`benchmarks/LOG.md`). Blocks may be nested; the outermost counts.
    """
    global _keeping  # noqa: PLW0603  the allocator is the process's as well
    if any(_is_set(f"MALLOC_{tunable.upper()}_", tunable) for tunable in _OF_FREED):
        yield
        return
    _keeping += 1
    _set(_MMAP_MAX, 0)
    _set(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        _keeping -= 1
        if not _keeping:
            _set(_MMAP_MAX, _BLOCKS)
            _set(_MMAP_THRESHOLD, _LARGE)
            _set(_TRIM_THRESHOLD, 2 * _LARGE)
            give_back_freed_memory()


def _is_set(variable: str, tunable: str) -> bool:
    """Whether the user has set it for glibc."""
    return variable in os.environ or tunable in os.environ.get("GLIBC_TUNABLES", "")


def _set(setting: int, value: int) -> None:
    _call("mallopt", setting, value)


def _call(function: str, *arguments: int) -> None:
    """Call a function of the C library, where it has it: only glibc does."""
    with suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)
