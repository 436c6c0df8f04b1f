"""Keys and values in pages: one pool per model, from which rows take pages as they grow.

A page holds 64 tokens of one *visit* of one row, so a layer that runs twice keeps two independent histories, and no
row pays for another's length. Pages are counted by their users, so that rows may share the start of a prompt. Pages
lie in one store per device, and a number names the same page everywhere.
Knows nothing of layers or programs: position among a program's visits is the only index.
"""

from __future__ import annotations

import bisect
import heapq
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Final

import torch

from polar_sdk.errors import CacheMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


PAGE: Final = 64
"""Tokens per page."""


class PagePool:
    """Stores of keys and values (P, 2, G, page, d), and which of their pages are free. Safe in several threads.

    A store is reserved at once and written as pages are first used: on a CPU, untouched pages take no memory. Low
    pages are given out first, so that a small load touches little.

    Args:
        sizes: For each store, where it lies and how many pages it has.
        kv_heads: G.
        head_dim: d.
        dtype: Of keys and values.
    """

    def __init__(
        self, sizes: Sequence[tuple[torch.device, int]], kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.stores = [
            torch.empty((pages, 2, kv_heads, PAGE, head_dim), dtype=dtype, device=device) for device, pages in sizes
        ]
        self.sizes = [pages for _, pages in sizes]
        """Pages of each store."""
        self.starts = [sum(self.sizes[:store]) for store in range(len(sizes))]
        """Number of the first page of each store."""
        self.size = sum(self.sizes)
        """Pages of all stores."""
        self._users = [0] * self.size
        self._clean = list(self.starts)
        """Pages of each store below it have been cleared."""
        self._free = [list(range(start, start + pages)) for start, pages in zip(self.starts, self.sizes, strict=True)]
        # Reentrant: a row collected as garbage gives its pages back in whichever thread that happens, this one too.
        self._lock = threading.RLock()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.stores[0][0].numel() * self.stores[0].element_size()

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return sum(map(len, self._free))

    def counts(self, pages: Sequence[int]) -> list[int]:
        """How many of these pages are in each store."""
        if len(self.stores) == 1:
            return [len(pages)]
        found = Counter(self._store(page) for page in pages)
        return [found[store] for store in range(len(self.stores))]

    def take(self, stores: Sequence[int]) -> list[int]:
        """Take one page of each of these stores, all or none.

        Raises:
            CacheMemoryError: Fewer are free.
        """
        with self._lock:
            for store, count in Counter(stores).items():
                if count > len(self._free[store]):
                    raise CacheMemoryError(
                        f"{count} pages of keys and values are needed and {len(self._free[store])} of "
                        f"{self.sizes[store]} are free.",
                        hint="Send fewer or shorter requests at once, or load the model with a larger kv_memory.",
                    )
            taken = [heapq.heappop(self._free[store]) for store in stores]
            for page in taken:
                self._users[page] = 1
            for store in set(stores):
                self._clear(store, max(page for page, where in zip(taken, stores, strict=True) if where == store) + 1)
        return taken

    def _clear(self, store: int, end: int) -> None:
        """Clear pages of a store up to `end` that were never used.

        Compiled attention weighs by 0 what it may not see, and what lies in new memory need not be a number.
        """
        if end > self._clean[store]:
            start = self.starts[store]
            self.stores[store][self._clean[store] - start : end - start].zero_()
            self._clean[store] = end

    def _store(self, page: int) -> int:
        return bisect.bisect_right(self.starts, page) - 1

    def share(self, pages: Sequence[int]) -> None:
        """Count one more user of each page."""
        with self._lock:
            for page in pages:
                self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one user less of each page; a page without users is free."""
        with self._lock:
            for page in pages:
                self._users[page] -= 1
                if self._users[page] == 0:
                    heapq.heappush(self._free[self._store(page)], page)


class PageTable:
    """The pages of one row, per visit, of which the first `length` tokens are filled.

    Args:
        pool: Where pages come from.
        stores: For each visit, which store its pages are in.
    """

    def __init__(self, pool: PagePool, stores: Sequence[int]) -> None:
        self._pool, self._stores = pool, stores
        self._starts = torch.tensor([pool.starts[store] for store in stores], dtype=torch.long)
        self.visits = len(stores)
        self.blocks: list[list[int]] = []
        """For every 64 tokens of the row, the page of each visit."""
        weakref.finalize(self, _give_back, pool, self.blocks)
        self._table: Tensor | None = None
        self.length = 0
        """Tokens whose keys and values every visit holds; advanced by the forward pass, not by a visit."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held, shared ones included."""
        return len(self.blocks) * self.visits * self._pool.page_bytes

    @property
    def table(self) -> Tensor:
        """`blocks` as a tensor, (blocks, visits)."""
        if self._table is None:
            self._table = torch.tensor(self.blocks, dtype=torch.long).view(-1, self.visits)
        return self._table

    def reserve(self, tokens: int) -> bool:
        """Make room for that many tokens in all; tells whether pages were added.

        Raises:
            CacheMemoryError: The pool has too few free pages; then nothing changed.
        """
        missing = -(-tokens // PAGE) - len(self.blocks)
        if missing <= 0:
            return False
        taken = self._pool.take(list(self._stores) * missing)
        self.blocks += [taken[at : at + self.visits] for at in range(0, len(taken), self.visits)]
        self._table = None
        return True

    def adopt(self, blocks: Sequence[list[int]]) -> None:
        """Begin with full pages that another row has filled."""
        assert not self.blocks
        self._pool.share([page for block in blocks for page in block])
        self.blocks += blocks
        self._table = None
        self.length = len(blocks) * PAGE

    def release(self) -> None:
        """Give all pages back; the row holds no history any more."""
        _give_back(self._pool, self.blocks)
        self._table = None

    def places(self, blocks: int) -> Tensor:
        """Place of each visit's page in its store, for the first `blocks` blocks, (blocks, visits)."""
        return torch.tensor(self.blocks[:blocks], dtype=torch.long) - self._starts

    def history(self, visit: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens of one visit, copied together, (G, length, d) each."""
        store, start = self._pool.stores[self._stores[visit]], self._pool.starts[self._stores[visit]]
        pages = [block[visit] - start for block in self.blocks[: -(-length // PAGE)]]
        _, _, heads, page, size = store.shape
        stacked = store[pages].permute(1, 2, 0, 3, 4).reshape(2, heads, len(pages) * page, size)
        return stacked[0, :, :length], stacked[1, :, :length]


def _give_back(pool: PagePool, blocks: list[list[int]]) -> None:
    pool.release([page for block in blocks for page in block])
    blocks.clear()
