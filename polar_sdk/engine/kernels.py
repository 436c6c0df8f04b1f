"""Kernels: what runs the layers of a decoder: torch, torch with the library's products, or the library alone.

Callers use the protocol and do not know which implementation runs. Knows weights and activations only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from polar_sdk.engine import native
from polar_sdk.engine.attention import attend_row, attend_some, write_pages
from polar_sdk.engine.native.layers import Layers
from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.types import Visits, pick

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.family import Family
    from polar_sdk.engine.types import AttentionKind, LayerPlan, Projected, Rotary, Weights


class PagedTokens(NamedTuple):
    """One token each of M of the B rows, and where their histories are stored."""

    rows: Tensor | None
    """Which rows, (M,); None = all."""
    table: Tensor
    """Pages of those rows, (M, blocks)."""
    positions: Tensor
    """Positions of their tokens, (M,)."""


class Kernels(Protocol):
    """The parts of a layer, ready to run."""

    independent: bool
    """Whether `decode` and `head` compute the same for a token, to the bit, whatever tokens are beside it."""

    at_once: bool
    """Whether `decode_layers` can be used."""

    decodes: bool
    """Whether `decode` can be used."""

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


class TorchKernels:
    """The family's functions as they stand: the reference, and what runs where there is no library."""

    independent = at_once = decodes = False

    def __init__(self, family: Family) -> None:
        self._family = family

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
        """Not available: torch would copy the pages."""
        raise NotImplementedError

    def decode_layers(self, x: Tensor, visits: Visits, rotary: Sequence[Rotary], store: Tensor, done: Tensor) -> Tensor:
        """Not available."""
        raise NotImplementedError

    def head(self, ends: Weights, x: Tensor) -> Tensor:
        """Logits."""
        return self._family.logits(x, ends)


class NativeKernels(TorchKernels):
    """The family's functions, whose products and attention are the native library's: all matrices are in panels."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self.decodes = native.takes_heads(family.head_dim)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind, positions: Tensor | None = None
    ) -> Tensor:
        """Attention, native where the library takes the heads."""
        if torch.is_grad_enabled() or not native.takes_heads(query.shape[-1]):
            return super().attend(query, keys, values, kind, positions)
        return native.attend_prompt(query, keys, values, kind, positions)

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


class NativeLayers(NativeKernels):
    """Layers that are the native library's as a whole, one after another in one call where nothing is between them.

    Args:
        layers: Weights of each.
        family: What they compute.
        plan: The same as data.
    """

    def __init__(self, layers: Sequence[Weights], family: Family, plan: LayerPlan) -> None:
        super().__init__(family)
        self._layers = Layers(layers, family, plan)
        self.independent = self.at_once = self.decodes

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        """The part before attention."""
        if torch.is_grad_enabled():
            return super().project(w, x, rotary)
        heads, groups = self._family.heads, self._family.kv_heads
        qkv = self._layers.project(self._layers.place(w), x, rotary)
        return qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]

    def keys_values(self, w: Weights, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        if torch.is_grad_enabled():
            return super().keys_values(w, x, rotary)
        key, value = self._layers.keys_values(self._layers.place(w), x, rotary).chunk(2, dim=1)
        return key, value

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        """The part after attention."""
        if torch.is_grad_enabled():
            return super().finish(w, x, mixed)
        return self._layers.finish(self._layers.place(w), x, mixed)

    def decode(
        self, w: Weights, x: Tensor, rotary: Rotary, kind: AttentionKind, store: Tensor, tokens: PagedTokens
    ) -> Tensor:
        """A whole layer for one token of some rows."""
        rows = torch.arange(x.shape[0]) if tokens.rows is None else tokens.rows
        once = torch.tensor([self._layers.place(w)]), torch.tensor([0, len(rows)])
        visits = Visits(*once, rows, tokens.table, tokens.positions)
        angles = [rotary] * (kind.rope + 1)
        return self._layers.decode(x, visits, angles, store, torch.zeros(1, dtype=torch.long))

    def decode_layers(self, x: Tensor, visits: Visits, rotary: Sequence[Rotary], store: Tensor, done: Tensor) -> Tensor:
        """Several layers for one token of some rows each."""
        return self._layers.decode(x, visits, rotary, store, done)
