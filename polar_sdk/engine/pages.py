"""Keys and values in pages: one pool per model, from which rows take pages as they grow.

A page holds 64 tokens of one *visit* of one row, so a layer that runs twice keeps two independent histories, and no
row pays for another's length. Of a row whose program makes three visits, and which has 150 tokens::

              visit 0   visit 1   visit 2
    block 0   page 7    page 8    page 9     tokens 0 … 63, of all visits
    block 1   page 10   page 11   page 12    tokens 64 … 127
    block 2   page 31   page 32   page 33    tokens 128 … 149; 42 places of each page are empty

The users of a page are counted, so that rows may share the first blocks of a prompt. Pages are stored on one device
each, in its *store*; page numbers run through all stores. Knows nothing of layers or programs: the place among a
program's visits is the only index.
"""

from __future__ import annotations

import bisect
import heapq
import math
import mmap
import sys
import threading
import weakref
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

from polar_sdk.engine.large_pages import ask_for_large_pages
from polar_sdk.errors import CacheMemoryError
from polar_sdk.locks import renewed_in_child

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


PAGE: Final = 64
"""Tokens per page."""

_MAP_NORESERVE: Final = 0x4000
"""Linux's flag; Python names it from 3.13 on."""


class PagePool:
    """Stores of keys and values (P, 2, G, page, d), and which of their pages are free. Thread-safe.

    A store is reserved at once and written as pages are first used: on a CPU, untouched pages take no memory. Low
    numbers are given out first, so that a small load touches little.

    Args:
        sizes: For each store, its device and its number of pages.
        kv_heads: G.
        head_dim: d.
        dtype: Of keys and values.
    """

    def __init__(
        self, sizes: Sequence[tuple[torch.device, int]], kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.stores = [_reserve((pages, 2, kv_heads, PAGE, head_dim), dtype, device) for device, pages in sizes]
        self.sizes = [pages for _, pages in sizes]
        """Pages of each store."""
        self.starts = [sum(self.sizes[:store]) for store in range(len(sizes))]
        """Number of the first page of each store."""
        self.size = sum(self.sizes)
        """Pages of all stores."""
        self._users = [0] * self.size
        self._cleared = [
            start + pages if _maps(store.device) else start
            for start, pages, store in zip(self.starts, self.sizes, self.stores, strict=True)
        ]
        """For each store, the first page that may never have been cleared."""
        self._free = [list(range(start, start + pages)) for start, pages in zip(self.starts, self.sizes, strict=True)]
        # Reentrant: a row collected as garbage gives its pages back in whatever thread that happens, this one included.
        self._lock = renewed_in_child(threading.RLock())
        self._tables: weakref.WeakSet[PageTable] = weakref.WeakSet()

    def note(self, table: PageTable) -> None:
        """Know a row's pages, which a forked child does not keep."""
        self._tables.add(table)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.stores[0][0].numel() * self.stores[0].element_size()

    @property
    def free(self) -> int:
        """Number of pages that nobody uses."""
        return sum(map(len, self._free))

    def counts(self, pages: Sequence[int]) -> list[int]:
        """How many of these pages are in each store."""
        if len(self.stores) == 1:
            return [len(pages)]
        counts = Counter(self._store(page) for page in pages)
        return [counts[store] for store in range(len(self.stores))]

    def restart_after_fork(self) -> None:
        """In a forked child, where every page was used by something that goes on in the parent: all are free."""
        for table in list(self._tables):
            table.blocks.clear()
            table.length = 0
        self._users = [0] * self.size
        self._free = [list(range(start, start + pages)) for start, pages in zip(self.starts, self.sizes, strict=True)]

    def take(self, stores: Sequence[int]) -> list[int]:
        """Take one page of each of these stores, all or none.

        Raises:
            CacheMemoryError: Too few are free.
        """
        with self._lock:
            for store, count in Counter(stores).items():
                if count > len(self._free[store]):
                    raise CacheMemoryError(
                        f"{count} pages of keys and values are needed, but only {len(self._free[store])} of "
                        f"{self.sizes[store]} are free.",
                        hint="Send fewer or shorter requests at once, or load the model with a larger kv_memory.",
                    )
            taken = [heapq.heappop(self._free[store]) for store in stores]
            for page in taken:
                self._users[page] = 1
            for store in set(stores):
                last = max(page for page, owner in zip(taken, stores, strict=True) if owner == store)
                self._clear(store, last + 1)
        return taken

    def clear(self, pages: Sequence[int], start: int = 0, *, shared: bool = False) -> None:
        """Overwrite pages from that place on; those with more than one user only where `shared`."""
        for page in pages:
            if shared or self._users[page] == 1:
                store = self._store(page)
                self.stores[store][page - self.starts[store], :, :, start:].zero_()

    def _clear(self, store: int, end: int) -> None:
        """Clear the pages of a store before `end` that have never been used.

        Native attention gives weight 0 to what it may not see, but 0 × NaN is NaN, and new memory may hold NaN.
        """
        if end > self._cleared[store]:
            start = self.starts[store]
            self.stores[store][self._cleared[store] - start : end - start].zero_()
            self._cleared[store] = end

    def _store(self, page: int) -> int:
        return bisect.bisect_right(self.starts, page) - 1

    def share(self, pages: Sequence[int]) -> None:
        """Count one more user of each page."""
        with self._lock:
            for page in pages:
                self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one user fewer of each page; a page without users is free."""
        with self._lock:
            for page in pages:
                self._users[page] -= 1
                if self._users[page] == 0:
                    heapq.heappush(self._free[self._store(page)], page)


def _reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of memory that nobody needs to have before it is written: zeros if `_maps`, else uninitialised.

    A system that counts what it has promised promises a process's memory a second time when it forks. A store is half
    of the machine's free memory: with two models in a process every `fork` failed.

    Raises:
        CacheMemoryError: The system refuses that much.
    """
    if not _maps(device):
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise CacheMemoryError(
            f"the system refuses {size / 2**20:.0f} MiB for keys and values: {error.strerror}.",
            hint="Load the model with a smaller kv_memory, in bytes.",
        ) from error
    ask_for_large_pages(memory)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _maps(device: torch.device) -> bool:
    """Whether a store is mapped, so that its memory is zero when it is first read."""
    return device.type == "cpu" and sys.platform.startswith("linux")


class PageTable:
    """The pages of one row, per visit; the first `length` tokens are filled.

    Args:
        pool: Where pages come from.
        stores: For each visit, the store of its pages.
    """

    def __init__(self, pool: PagePool, stores: Sequence[int]) -> None:
        self._pool, self._stores = pool, stores
        self._starts = torch.tensor([pool.starts[store] for store in stores], dtype=torch.long)
        self.visits = len(stores)
        self._visits_in = [list(stores).count(store) for store in range(len(pool.sizes))]
        self.blocks: list[list[int]] = []
        """For every 64 tokens of the row, the page of each visit."""
        self._places = torch.empty((0, self.visits), dtype=torch.long)
        """The last result of `places`."""
        self._last: list[int] | None = None
        """The last block of it."""
        weakref.finalize(self, _give_back, pool, self.blocks)
        pool.note(self)
        self.length = 0
        """Tokens whose keys and values every visit holds; the forward pass advances it, not a visit."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held, shared ones included."""
        return len(self.blocks) * self.visits * self._pool.page_bytes

    @property
    def counts(self) -> list[int]:
        """Number of pages held in each store, shared ones included."""
        return [len(self.blocks) * visits for visits in self._visits_in]

    def reserve(self, tokens: int) -> bool:
        """Make room for that many tokens in all; returns whether pages were added.

        Raises:
            CacheMemoryError: The pool has too few free pages; nothing has changed then.
        """
        missing = -(-tokens // PAGE) - len(self.blocks)
        if missing <= 0:
            return False
        taken = self._pool.take(list(self._stores) * missing)
        self.blocks += [taken[start : start + self.visits] for start in range(0, len(taken), self.visits)]
        return True

    def adopt(self, blocks: Sequence[list[int]]) -> None:
        """Begin with blocks that another row has filled."""
        assert not self.blocks
        self._pool.share([page for block in blocks for page in block])
        self.blocks += blocks
        self.length = len(blocks) * PAGE

    def copy(self, block: Sequence[int], tokens: int) -> None:
        """Go on, after full blocks, with the first tokens of a block that another row has filled.

        Raises:
            CacheMemoryError: The pool has too few free pages; nothing has changed then.
        """
        assert self.length == len(self.blocks) * PAGE
        self.reserve(self.length + tokens)
        pairs = list(zip(self._stores, block, self.blocks[-1], strict=True))
        for number, (store, start) in enumerate(zip(self._pool.stores, self._pool.starts, strict=True)):
            here = [(other - start, own - start) for where, other, own in pairs if where == number]
            if here:
                others, owns = torch.tensor(here, device=store.device).unbind(1)
                begun = store[:, :, :, :tokens]
                begun[owns] = begun[others]
        self.length += tokens

    def release(self) -> None:
        """Give all pages back; the row has no history any more."""
        self.length = 0
        _give_back(self._pool, self.blocks)

    def shorten(self, tokens: int) -> None:
        """Drop what comes after the first N tokens; pages that held nothing else are freed."""
        self.length = tokens
        spare = self.blocks[-(-tokens // PAGE) :]
        if spare:
            del self.blocks[-(-tokens // PAGE) :]
            self._pool.release([page for block in spare for page in block])

    def clear_after(self, tokens: int) -> None:
        """Overwrite what comes after the first N tokens, at least a prompt, which others may use: see `clear`."""
        first = tokens // PAGE
        for number, block in enumerate(self.blocks[first:], start=first):
            self._pool.clear(block, max(tokens - number * PAGE, 0), shared=True)

    def clear(self, prompt: int) -> None:
        """Overwrite what no other row has, at most a prompt of N tokens: 0 × nan is nan in the next row."""
        self._pool.clear([page for block in self.blocks for page in block])
        self.clear_after(prompt)

    @property
    def places(self) -> Tensor:
        """Place within its store of the page of each block and visit, (blocks, visits)."""
        last = self.blocks[-1] if self.blocks else None
        if last is not self._last or len(self.blocks) != len(self._places):  # blocks come and go at the end only
            self._places = torch.tensor(self.blocks, dtype=torch.long).view(-1, self.visits) - self._starts
            self._last = last
        return self._places

    def history(self, visit: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens of one visit, copied together, (G, length, d) each."""
        store, start = self._pool.stores[self._stores[visit]], self._pool.starts[self._stores[visit]]
        pages = [block[visit] - start for block in self.blocks[: -(-length // PAGE)]]
        keys, values = histories(store, torch.tensor([pages], device=store.device), length)
        return keys[0], values[0]


def histories(store: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `length` tokens in the pages of each row, copied once, (B, G, length, d) each.

    Args:
        store: (P, 2, G, page, d).
        table: Pages of each row in order, (B, n).
        length: At most n pages.
    """
    _, _, groups, page, size = store.shape
    rows, blocks = table.shape
    places = table[:, None] * (2 * groups) + _heads(groups, table.device)  # (B, 2 × G, n): of one head in each page
    copied = store.view(-1, page * size).index_select(0, places.flatten())
    keys, values = copied.view(rows, 2, groups, blocks * page, size)[:, :, :, :length].unbind(1)
    return keys, values


@lru_cache(maxsize=64)
def _heads(groups: int, device: torch.device) -> Tensor:
    """Place of the keys and of the values of each head within a page, (2 × G, 1); made once and not for every layer."""
    return torch.arange(2 * groups, device=device)[:, None]


def _give_back(pool: PagePool, blocks: list[list[int]]) -> None:
    pool.release([page for block in blocks for page in block])
    blocks.clear()
