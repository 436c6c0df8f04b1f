"""Kernels: what runs the parts of a layer. Here are those that nothing is compiled for; `compiled.py` has the others.

Callers use the protocol and never learn which implementation runs. Knows weights and activations only.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from polar_sdk.engine import native
from polar_sdk.engine.attention import attend_row, attend_some, write_pages
from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.types import pick

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.family import Family
    from polar_sdk.engine.types import AttentionKind, Projected, Rotary, Weights


class PagedTokens(NamedTuple):
    """One token each of M of the B rows, and where their histories are stored."""

    rows: Tensor | None
    """Which rows, (M,); None = all."""
    table: Tensor
    """Pages of those rows, (M, blocks)."""
    positions: Tensor
    """Positions of their tokens, (M,)."""


class Visits(NamedTuple):
    """Visits of n layers one after another, each for one token of some rows; the tokens of all stand in order."""

    layers: Tensor
    """Which layers, (n,)."""
    bounds: Tensor
    """Visit i is for the tokens from bounds[i] to bounds[i + 1], (n + 1,)."""
    rows: Tensor
    """Row of each token, (M,)."""
    table: Tensor
    """Pages of its row, (M, blocks)."""
    positions: Tensor
    """Its position, (M,)."""


class Compiled(IntEnum):
    """How much of a model is compiled; each of these includes those before it."""

    NOTHING = 0
    PRODUCTS = 1
    """Products and attention, which the native library has for all models."""
    ONE_ROW = 2
    """Answers, one row at a time."""
    ROWS = 3
    """Answers, any number of rows together."""
    ALL = 4
    """Prompts, too."""


class Kernels(Protocol):
    """The parts of a layer, ready to run."""

    compiled: Compiled
    """How much is compiled. Kernels of one decoder that agree in this compute the same."""
    independent: bool
    """Whether `decode` and `head` compute the same for a token, to the bit, whatever tokens are beside it."""

    at_once: bool
    """Whether `decode_layers` can be used."""

    def decodes(self, tokens: int) -> bool:
        """Whether `decode` can be used for that many tokens together."""
        ...

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        """The part before attention, (N, E)."""
        ...

    def keys_values(self, w: Weights, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values of `project`, (N, G, d) each, without the queries."""
        ...

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        """The part after attention, (N, E) and (N, H × d)."""
        ...

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor | None = None
    ) -> Tensor:
        """Attention of some tokens of one row (T, H, d) over its keys and values (G, S, d); (T, H × d).

        The tokens are those at `positions`, (T,), ascending; None = the last ones.
        """
        ...

    def decode(
        self, w: Weights, x: Tensor, rotary: Rotary, kind: AttentionKind, store: Tensor, tokens: PagedTokens
    ) -> Tensor:
        """A whole layer for one token of some of the rows; returns the states of all rows, (B, E).

        Args:
            w: Weights of the layer.
            x: States of all rows, (B, E).
            rotary: Of all rows.
            kind: How the layer attends.
            store: The pages, (P, 2, G, page, d).
            tokens: Which rows, and where their histories are.
        """
        ...

    def decode_layers(self, x: Tensor, visits: Visits, rotary: Sequence[Rotary], store: Tensor, done: Tensor) -> Tensor:
        """`decode` of several layers one after another, each for some of the rows; returns all states, (B, E).

        Args:
            x: States of all rows, (B, E).
            visits: Which layers, for which tokens.
            rotary: Of all rows, for each kind of layer.
            store: The pages, (P, 2, G, page, d).
            done: Counts the visits that have run, (1,), also where one fails.
        """
        ...

    def head(self, ends: Weights, x: Tensor) -> Tensor:
        """Float32 logits (M, V) of (M, E)."""
        ...


class EagerKernels:
    """The family's functions as they stand."""

    compiled = Compiled.NOTHING
    independent = False
    at_once = False

    def __init__(self, family: Family) -> None:
        self._family = family

    def decodes(self, tokens: int) -> bool:
        """Never: without a compiler, attention over pages would copy them."""
        return False

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        """The part before attention."""
        return self._family.project(x, rotary, w)

    def keys_values(self, w: Weights, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        key, value = self._family.keys_values(x, w)
        return self._family.turn(key, rotary), value

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        """The part after attention."""
        return self._family.finish(x, mixed, w)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor | None = None
    ) -> Tensor:
        """Attention by torch's kernels."""
        if positions is None:
            return attend_row(query, keys, values, kind)
        return attend_some(query, keys, values, kind, positions)

    def decode(
        self, w: Weights, x: Tensor, rotary: Rotary, kind: AttentionKind, store: Tensor, tokens: PagedTokens
    ) -> Tensor:
        """Not available."""
        raise NotImplementedError

    def decode_layers(self, x: Tensor, visits: Visits, rotary: Sequence[Rotary], store: Tensor, done: Tensor) -> Tensor:
        """Not available."""
        raise NotImplementedError

    def head(self, ends: Weights, x: Tensor) -> Tensor:
        """Logits."""
        return self._family.logits(x, ends)


class NativeKernels(EagerKernels):
    """The family's functions, whose products and attention are the native library's: all matrices are in panels."""

    compiled = Compiled.PRODUCTS

    def decodes(self, tokens: int) -> bool:
        """Where the library attends over pages."""
        return native.takes_heads(self._family.head_dim)

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        """The part before attention."""
        with native.used():
            return super().project(w, x, rotary)

    def keys_values(self, w: Weights, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        with native.used():
            return super().keys_values(w, x, rotary)

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        """The part after attention."""
        with native.used():
            return super().finish(w, x, mixed)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor | None = None
    ) -> Tensor:
        """Attention, native where the library takes the heads."""
        run = native.attend_prompt if native.takes_heads(query.shape[-1]) else super().attend
        return run(query, keys, values, kind, positions)

    def decode(
        self, w: Weights, x: Tensor, rotary: Rotary, kind: AttentionKind, store: Tensor, tokens: PagedTokens
    ) -> Tensor:
        """A whole layer for one token of some rows."""
        rows, table, positions = tokens
        before, angles = (x, rotary) if rows is None else (x.index_select(0, rows), pick(rotary, rows))
        query, key, value = self.project(w, before, angles)
        write_pages(store, table.gather(1, (positions // PAGE)[:, None])[:, 0], positions % PAGE, key, value)
        after = self.finish(w, before, native.attend_pages(query, store, table, positions, kind))
        return after if rows is None else x.index_copy(0, rows, after)

    def head(self, ends: Weights, x: Tensor) -> Tensor:
        """Logits."""
        with native.used():
            return super().head(ends, x)
