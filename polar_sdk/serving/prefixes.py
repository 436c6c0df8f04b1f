"""Shared prompt prefixes: keys and values that later requests use instead of computing them again.

A prefix serves another request only if tenant, program, bridges, fills and all its tokens are the same. Tenants never
share, so that neither the bill nor the timing of one reveals another's prompts.

Whole blocks of 64 tokens are shared directly. Of the block in which two prompts diverge, the tokens before that point
are copied: what a chat template or a chain puts first is the same in every prompt, and rarely ends at the end of a
block. A prompt's last block is kept for that, although its row continues to write after the prompt. If a program fills
layers, the last tokens of a prompt run them, but the same tokens in the middle of another prompt do not: so those are
neither kept nor shared. Knows rows and pages.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from polar_sdk.engine.hashes import hash_maps
from polar_sdk.engine.pages import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.row import Row
    from polar_sdk.serving.request import Request


LEAST_SHARED: Final = 16
"""Tokens from which a part of a block is worth copying, or keeping for what it has more than others."""
_MANY: Final = 34
"""Tokens that are left to run where weights are integers: with fewer, some processors round a product otherwise."""
_BRANCHES: Final = 8
"""Blocks after the same start that a prompt is compared with, the ones last used."""

_Key = bytes
"""A hash of tenant, program, bridges, fills and all tokens up to the end of the block."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A block that is kept."""

    pages: list[int]
    """The page of each visit."""
    tokens: Sequence[int]
    """Those of the block that may be used: 64, or fewer where a prompt ends."""
    before: _Key
    """The key of the block before it, or of none."""


class PrefixCache:
    """Blocks kept after their request; the least recently used is evicted first. For the scheduler's thread alone."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._branches: dict[_Key, OrderedDict[_Key, None]] = {}
        """The blocks last used after each block, or after none, `_BRANCHES` at most; parts of blocks are all here."""
        self._kept_pages = [0] * len(decoder.placement.stores)

    @property
    def kept_pages(self) -> Sequence[int]:
        """Number of pages kept in each store."""
        return self._kept_pages

    def lend(self, request: Request, row: Row) -> int:
        """Give a new row the longest kept start of its prompt; returns its number of tokens, which may be 0.

        At least one token of the prompt is left to run, because its logits are needed; all of them, where all are.
        Where weights are integers, more are.
        """
        whole, part, shared = self._found(request, row)
        if not request.idle:  # else what is evicted next would depend on who is audited
            for key in [*whole, *([] if part is None else [part])]:
                self._use(key)
        if whole:
            row.page_table.adopt([self._kept[key].pages for key in whole])
        if part is not None:
            row.page_table.copy(self._kept[part].pages, shared)
        return row.length

    def gain(self, request: Request, row: Row, other: Request) -> int:
        """How many more tokens of a prompt that has not begun could be lent if it waited for another one to have run.

        The other one is of the same tenant, and runs the same program.
        """
        if request.prompt_logprobs is not None:
            return 0
        whole, _, shared = self._found(request, row)
        return common_start(self._usable(request), _kept_of(other)) - len(whole) * PAGE - shared

    def keep(self, request: Request, row: Row, share: float) -> None:
        """Keep the blocks of a prompt that has run, up to a share of the pages of each store.

        Its last block, which is not full, is kept only where it goes on for long after what others have in common
        with it: else every short prompt would keep pages that no other one needs.
        """
        if row.loops_stopped:
            return  # with a loop stopped, the states are not what another request would compute
        usable = _kept_of(request)
        before, whole, blocks = self._root(request, row), 0, row.page_table.blocks
        for key, block in zip(self._keys(before, usable), blocks, strict=False):
            if key not in self._kept and not self._add(key, _Kept(list(block), usable[whole:][:PAGE], before), share):
                return
            before, whole = key, whole + PAGE
        rest = usable[whole:]
        if len(rest) - self._nearest(before, rest)[1] >= LEAST_SHARED:
            self._add(_hash(before, rest), _Kept(list(blocks[whole // PAGE]), rest, before), share)

    def make_room(self, promised: Sequence[int]) -> None:
        """Evict until the pages promised to running jobs are available in each store."""
        self._evict([size - pages for size, pages in zip(self._decoder.pool.sizes, promised, strict=True)])

    def forget(self) -> None:
        """Keep nothing, without giving pages back: in a forked child the pool begins anew."""
        self._kept.clear()
        self._branches.clear()
        self._kept_pages = [0] * len(self._kept_pages)

    def _add(self, key: _Key, kept: _Kept, share: float) -> bool:
        """Keep one more block; False if it alone is more than may be kept."""
        pool = self._decoder.pool
        counts = pool.counts(kept.pages)
        left = [int(share * size) - count for size, count in zip(pool.sizes, counts, strict=True)]
        if min(left) < 0:
            return False
        self._evict(left)
        pool.share(kept.pages)
        self._kept[key] = kept
        self._kept_pages = [before + count for before, count in zip(self._kept_pages, counts, strict=True)]
        self._use(key)
        return True

    def _use(self, key: _Key) -> None:
        """Note that a block is used now. Of those that may follow the same one, the first part of a block may go."""
        kept = self._kept[key]
        self._kept.move_to_end(key)
        branches = self._branches.setdefault(kept.before, OrderedDict())
        branches[key] = None
        branches.move_to_end(key)
        if len(branches) > _BRANCHES:
            oldest, _ = branches.popitem(last=False)
            if len(self._kept[oldest].tokens) < PAGE:
                self._drop(oldest)

    def _found(self, request: Request, row: Row) -> tuple[list[_Key], _Key | None, int]:
        """Blocks of a new row's prompt that are kept, the one that is kept in part, and how many tokens that has."""
        if request.prompt_logprobs is not None:
            return [], None, 0
        usable, whole, before = self._usable(request), [], self._root(request, row)
        for key in self._keys(before, usable):
            if key not in self._kept:
                break
            whole.append(key)
            before = key
        part, shared = self._nearest(before, usable[len(whole) * PAGE :])
        return (whole, part, shared) if shared >= LEAST_SHARED else (whole, None, 0)

    def _usable(self, request: Request) -> tuple[int, ...]:
        """The tokens of a prompt that need not run: what is left is computed as the whole prompt would be."""
        left = _MANY if self._decoder.precision.startswith("int") else 1
        return _kept_of(request)[: max(0, len(request.tokens) - left)]

    def _nearest(self, before: _Key, tokens: Sequence[int]) -> tuple[_Key | None, int]:
        """The block after this one that goes along with these tokens for longest, and for how many of them."""
        along = {key: common_start(self._kept[key].tokens, tokens) for key in self._branches.get(before, ())}
        return max(along.items(), key=lambda each: each[1], default=(None, 0))

    def _evict(self, limits: Sequence[int]) -> None:
        """Evict until at most this many pages are kept in each store."""
        while self._kept and any(kept > limit for kept, limit in zip(self._kept_pages, limits, strict=True)):
            self._drop(next(iter(self._kept)))

    def _drop(self, key: _Key) -> None:
        """Keep a block no longer."""
        pool, kept = self._decoder.pool, self._kept.pop(key)
        branches = self._branches.get(kept.before, OrderedDict())
        branches.pop(key, None)
        if not branches:
            self._branches.pop(kept.before, None)
        pool.release(kept.pages)
        self._kept_pages = [
            before - count for before, count in zip(self._kept_pages, pool.counts(kept.pages), strict=True)
        ]

    def _root(self, request: Request, row: Row) -> _Key:
        """Key of all that must be the same before the first token."""
        program = request.program
        common = (request.starts_of or request.tenant, program.text, hash_maps(self._decoder, [program]))
        return hashlib.sha256(repr(common).encode()).digest()

    @staticmethod
    def _keys(root: _Key, tokens: Sequence[int]) -> Iterator[_Key]:
        """One key per full block of these tokens, each hashed together with the key before it."""
        key = root
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            key = _hash(key, tokens[start : start + PAGE])
            yield key


def _kept_of(request: Request) -> tuple[int, ...]:
    """The tokens of a prompt that later ones may take over: all but those that its program runs and does not fill."""
    return request.tokens[: max(0, len(request.tokens) - request.program.tail)]


def _hash(before: _Key, tokens: Sequence[int]) -> _Key:
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens at the beginning that are the same."""
    same, end = 0, min(len(first), len(second))
    while same < end:  # by halves, since comparing tuples takes far less time than their tokens one by one
        middle = (same + end + 1) // 2
        if first[same:middle] == second[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same
