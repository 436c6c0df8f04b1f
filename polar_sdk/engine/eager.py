"""Kernels: what runs a layer's parts. Here the plain ones; `compiled.py` has those from the compiler.

Whoever runs a layer asks for kernels and does not see which he got. Knows weights and activations only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from polar_sdk.engine.attention import attend_row

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.family import Family
    from polar_sdk.engine.types import AttentionKind, Projected, Rotary, Weights


class Kernels(Protocol):
    """The parts of a layer, ready to run."""

    pages: bool
    """Whether `decode` can be used."""

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        """The part before attention, (N, E)."""
        ...

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        """The part after attention, (N, E) and (N, H × d)."""
        ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
        """Attention of the last T positions of one row (T, H, d) over its keys and values (G, S, d); (T, H × d)."""
        ...

    def decode(
        self,
        w: Weights,
        x: Tensor,
        index: Tensor | None,
        rotary: Rotary,
        kind: AttentionKind,
        store: Tensor,
        table: Tensor,
        at: Tensor,
    ) -> Tensor:
        """A whole layer for one token of some of the rows (B, E); returns the states of all, (B, E).

        Args:
            w: The layer.
            x: The states of all rows.
            index: Which rows, (M,); None = all.
            rotary: Of all rows.
            kind: Of attention.
            store: Of pages.
            table: Pages of those rows, (M, n).
            at: Their positions, (M,).
        """
        ...

    def head(self, ends: Weights, x: Tensor) -> Tensor:
        """Float32 logits (M, V) of (M, E)."""
        ...


class EagerKernels:
    """The family's functions as they stand."""

    pages = False

    def __init__(self, family: Family) -> None:
        self._family = family

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        """The part before attention."""
        return self._family.project(x, rotary, w)

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        """The part after attention."""
        return self._family.finish(x, mixed, w)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
        """Attention in the middle, by torch's kernels."""
        return attend_row(query, keys, values, kind)

    def decode(
        self,
        w: Weights,
        x: Tensor,
        index: Tensor | None,
        rotary: Rotary,
        kind: AttentionKind,
        store: Tensor,
        table: Tensor,
        at: Tensor,
    ) -> Tensor:
        """Not offered: uncompiled, attention over pages would copy them; rows attend one by one instead."""
        raise NotImplementedError

    def head(self, ends: Weights, x: Tensor) -> Tensor:
        """Logits."""
        return self._family.logits(x, ends)
