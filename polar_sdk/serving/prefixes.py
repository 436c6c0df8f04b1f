"""Shared starts of prompts: full pages of keys and values that later requests may use instead of computing them again.

A page is good for another request only where tenant, program, bridges and all tokens up to its end are the same.
Tenants never share, so that neither bill nor timing of one tells of another's prompts. Knows rows and pages.
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
"""A hash over tenant, program, bridges and all tokens up to the end of the page."""


class PrefixCache:
    """Pages kept after their request, least recently used first out. Used by the scheduler's thread alone."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._kept: OrderedDict[_Key, list[int]] = OrderedDict()
        self._pages = [0] * len(decoder.placement.stores)
        """Pages kept in each store."""

    def lend(self, request: Request, row: Row) -> int:
        """Give a new row the longest kept start of its prompt; returns its tokens, 0 where there is none.

        At least one token of the prompt is left to run, since its logits are needed.
        """
        blocks = []
        for key in self._keys(request, len(request.tokens) - 1):
            if key not in self._kept:
                break
            self._kept.move_to_end(key)
            blocks.append(self._kept[key])
        if blocks:
            row.pages.adopt(blocks)
        return len(blocks) * PAGE

    def keep(self, request: Request, row: Row, share: float) -> None:
        """Keep the full pages of a prompt that has run, up to a share of the pages of each store."""
        pool = self._decoder.pool
        room = [int(share * size) for size in pool.sizes]
        if row.loops_stopped:
            return  # a loop was stopped in it: not what another request would compute
        for number, key in enumerate(self._keys(request, len(request.tokens))):
            block = row.pages.blocks[number]
            if key in self._kept:
                continue
            counts = pool.counts(block)
            left = [most - count for most, count in zip(room, counts, strict=True)]
            if min(left) < 0:
                return
            self._evict(left)
            pool.share(block)
            self._kept[key] = list(block)
            self._pages = [kept + count for kept, count in zip(self._pages, counts, strict=True)]

    def make_room(self, promised: Sequence[int]) -> None:
        """Let go of so many pages that those promised to running jobs, in each store, are there."""
        self._evict([size - most for size, most in zip(self._decoder.pool.sizes, promised, strict=True)])

    def _evict(self, most: Sequence[int]) -> None:
        pool = self._decoder.pool
        while self._kept and any(kept > limit for kept, limit in zip(self._pages, most, strict=True)):
            _, block = self._kept.popitem(last=False)
            pool.release(block)
            self._pages = [kept - count for kept, count in zip(self._pages, pool.counts(block), strict=True)]

    def _keys(self, request: Request, tokens: int) -> list[_Key]:
        """One key per full page of the first `tokens` tokens, each a hash over the key before it."""
        program = request.route.program
        start_of_all = (request.tenant, program.text, hash_bridges(self._decoder, [program]))
        key = hashlib.sha256(repr(start_of_all).encode()).digest()
        keys = []
        for start in range(0, tokens - PAGE + 1, PAGE):
            key = hashlib.sha256(key + array("q", request.tokens[start : start + PAGE]).tobytes()).digest()
            keys.append(key)
        return keys
