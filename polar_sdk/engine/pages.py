"""Keys and values in pages: one pool per model and device, from which rows take pages as they grow.

A page holds 64 tokens of one *visit* of one row, so a layer that runs twice keeps two independent histories, and no
row pays for another's length. Pages are counted by their users, so that rows may share the start of a prompt.
Knows nothing of layers or programs: position among a program's visits is the only index.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from typing import TYPE_CHECKING, Final

import torch

from polar_sdk.errors import CacheMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["PAGE", "PagePool", "PageTable"]

PAGE: Final = 64
"""Tokens per page."""


class PagePool:
    """A store of keys and values (P, 2, G, page, d), and which of its pages are free. Safe in several threads.

    The store is reserved at once and written as pages are first used: on a CPU, untouched pages take no memory. Low
    pages are given out first, so that a small load touches little.
    """

    def __init__(self, pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.store = torch.empty((pages, 2, kv_heads, PAGE, head_dim), dtype=dtype, device=device)
        self.size = pages
        self._users = [0] * pages
        self._clean = 0
        """Pages below it have been cleared."""
        self._free = list(range(pages))
        self._lock = threading.Lock()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.store[0].numel() * self.store.element_size()

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take that many pages, all or none.

        Raises:
            CacheMemoryError: Fewer are free.
        """
        with self._lock:
            if count > len(self._free):
                raise CacheMemoryError(
                    f"{count} pages of keys and values are needed and {len(self._free)} of {self.size} are free.",
                    hint="Send fewer or shorter requests at once, or load the model with a larger kv_memory.",
                )
            taken = [heapq.heappop(self._free) for _ in range(count)]
            for page in taken:
                self._users[page] = 1
            self._clear(max(taken, default=-1) + 1)
        return taken

    def _clear(self, end: int) -> None:
        """Clear pages up to `end` that were never used.

        Compiled attention weighs by 0 what it may not see, and what lies in new memory need not be a number.
        """
        if end > self._clean:
            self.store[self._clean : end].zero_()
            self._clean = end

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
                    heapq.heappush(self._free, page)


class PageTable:
    """The pages of one row, per visit, of which the first `length` tokens are filled."""

    def __init__(self, pool: PagePool, visits: int) -> None:
        self._pool = pool
        self.visits = visits
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
        taken = self._pool.take(missing * self.visits)
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

    def history(self, visit: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens of one visit, copied together, (G, length, d) each."""
        pages = [block[visit] for block in self.blocks[: -(-length // PAGE)]]
        _, _, heads, page, size = self._pool.store.shape
        stacked = self._pool.store[pages].permute(1, 2, 0, 3, 4).reshape(2, heads, len(pages) * page, size)
        return stacked[0, :, :length], stacked[1, :, :length]


def _give_back(pool: PagePool, blocks: list[list[int]]) -> None:
    pool.release([page for block in blocks for page in block])
    blocks.clear()
