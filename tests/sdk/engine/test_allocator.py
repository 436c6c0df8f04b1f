"""glibc's allocator: what its threads share, and which freed memory is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import psutil
import pytest

from polar_sdk.engine.allocator import give_back_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")

MANY_THREADS = """
import ctypes, threading
import polar_sdk.engine
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(12)

def allocate():
    together.wait()
    for _ in range(200):
        assert libc.malloc(50_000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@glibc
@pytest.mark.parametrize(("setting", "arenas"), [({}, 2), ({"MALLOC_ARENA_MAX": "5"}, 5)])
def test_threads_share_few_arenas_of_memory(setting: dict[str, str], arenas: int) -> None:
    """12 threads have 12 or 16 of them, by the number of cores, where nothing is said."""
    clean = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", MANY_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | setting)
    assert done.stdout.count("<heap nr=") == arenas


@glibc
def test_freed_memory_is_given_back() -> None:
    process = psutil.Process()
    pieces = [bytes(100_000) for _ in range(1_000)]
    kept = pieces[::50]  # between those that go, so that what is free is no end of the heap
    full = process.memory_info().rss
    del pieces
    give_back_freed_memory()
    assert full - process.memory_info().rss > 50_000_000
    assert all(piece == bytes(100_000) for piece in kept)


FREED = """
import psutil, torch
from polar_sdk.engine.allocator import keeping_freed_memory

def kept():
    torch.ones(1 << 24)
    return (psutil.Process().memory_info().rss - before) >> 20

before = psutil.Process().memory_info().rss
torch.ones(1 << 10)
found = [kept()]
with keeping_freed_memory():
    with keeping_freed_memory():
        kept()
    found.append(kept())
print(*found, kept())
"""


@glibc
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"MALLOC_MMAP_MAX_": "65536"},
        {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9"},
    ],
)
def test_freed_memory_is_kept_where_it_is_wanted(setting: dict[str, str]) -> None:
    """Of blocks of 64 MiB, one of which is enough for all; a user's own setting stays."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FREED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | setting)
    outside, within, afterwards = map(int, done.stdout.split())
    assert outside < 32
    assert within < 32 if setting else 60 < within < 96
    assert afterwards < 32
