"""Shared starts of prompts: full blocks of keys and values that later requests use instead of computing them again.

A block serves another request only where tenant, program, bridges, fills and all tokens up to its end are the same, and
what runs the layers: compiled code and uncompiled code round differently.
Where a program fills layers, the last tokens of a prompt run them, and the same tokens in the middle of another prompt
do not: so a block that reaches into them is neither kept nor lent. Tenants never share, so that neither the bill nor
the timing of one reveals another's prompts. Knows rows and pages.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from polar_sdk.engine.hashes import hash_bridges
from polar_sdk.engine.pages import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.row import Row
    from polar_sdk.serving.request import Request


_Key = bytes
"""A hash of tenant, program, bridges, fills, kernels and all tokens up to the end of the block."""


class PrefixCache:
    """Blocks kept after their request; the least recently used is evicted first. For the scheduler's thread alone."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._kept: OrderedDict[_Key, list[int]] = OrderedDict()
        self._kept_pages = [0] * len(decoder.placement.stores)
        """Number of pages kept in each store."""

    def lend(self, request: Request, row: Row) -> int:
        """Give a new row the longest kept start of its prompt; returns its number of tokens, which may be 0.

        At least one token of the prompt is left to run, because its logits are needed; all of them, where all are.
        """
        if request.prompt_logprobs is not None:
            return 0
        blocks = []
        for key in self._keys(request, row, len(request.tokens) - max(1, request.route.program.tail)):
            if key not in self._kept:
                break
            self._kept.move_to_end(key)
            blocks.append(self._kept[key])
        if blocks:
            row.page_table.adopt(blocks)
        return len(blocks) * PAGE

    def keep(self, request: Request, row: Row, share: float) -> None:
        """Keep the full blocks of a prompt that has run, up to a share of the pages of each store."""
        pool = self._decoder.pool
        if row.loops_stopped:
            return  # with a loop stopped, the states are not what another request would compute
        limits = [int(share * size) for size in pool.sizes]
        for key, block in zip(
            self._keys(request, row, len(request.tokens) - row.program.tail), row.page_table.blocks, strict=False
        ):
            if key in self._kept:
                continue
            counts = pool.counts(block)
            left = [limit - count for limit, count in zip(limits, counts, strict=True)]
            if min(left) < 0:
                return
            self._evict(left)
            pool.share(block)
            self._kept[key] = list(block)
            self._kept_pages = [kept + count for kept, count in zip(self._kept_pages, counts, strict=True)]

    def make_room(self, promised: Sequence[int]) -> None:
        """Evict until the pages promised to running jobs are available in each store."""
        self._evict([size - pages for size, pages in zip(self._decoder.pool.sizes, promised, strict=True)])

    def forget(self) -> None:
        """Keep nothing, without giving pages back: in a forked child the pool begins anew."""
        self._kept.clear()
        self._kept_pages = [0] * len(self._kept_pages)

    def _evict(self, limits: Sequence[int]) -> None:
        """Evict until at most this many pages are kept in each store."""
        pool = self._decoder.pool
        while self._kept and any(kept > limit for kept, limit in zip(self._kept_pages, limits, strict=True)):
            _, block = self._kept.popitem(last=False)
            pool.release(block)
            self._kept_pages = [kept - count for kept, count in zip(self._kept_pages, pool.counts(block), strict=True)]

    def _keys(self, request: Request, row: Row, tokens: int) -> list[_Key]:
        """One key per full block of the first `tokens` tokens, each hashed together with the key before it."""
        program = request.route.program
        compiled = int(row.begin().compiled)
        common = (request.tenant, program.text, hash_bridges(self._decoder, [program]), compiled)
        key = hashlib.sha256(repr(common).encode()).digest()
        keys = []
        for start in range(0, tokens - PAGE + 1, PAGE):
            key = hashlib.sha256(key + array("q", request.tokens[start : start + PAGE]).tobytes()).digest()
            keys.append(key)
        return keys
