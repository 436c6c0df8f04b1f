"""Values that the engine's functions pass to each other: weights, rotary pairs, queries, keys, values, plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Weights = dict[str, Any]
"""Weights of one layer by name: a `Product`, a tensor, or None."""
Rotary = tuple["Tensor", "Tensor"]
"""Cosine and sine of each packed token, (N, 1, r) each, r ≤ d; of size 0 where positions enter elsewhere."""
Projected = tuple["Tensor", "Tensor", "Tensor"]
"""Queries (N, H, d), keys and values (N, G, d), ready for attention."""


def pick(rotary: Rotary, index: Tensor) -> Rotary:
    """Cosine and sine of the tokens at `index`."""
    cos, sin = rotary
    return (cos.index_select(0, index), sin.index_select(0, index)) if cos.numel() else rotary


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


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The operations of a family's layers, for the native library, where it has them all.

    A norm, queries with keys and values, norms of heads if there are weights `head_norms`, positions, attention,
    output, a norm if there is one `attn_after`; then a norm, the feed-forward, a norm if there is one `mlp_after`.

    Attributes:
        norm: `rms`, `offset_rms` (its weight is an offset from 1) or `layer`.
        eps: Added to mean squares or variances.
        activation: Of the feed-forward, as configurations name it.
        gated: Whether gates are multiplied with what they let through (`gate_up`), rather than one matrix (`up`).
        parallel: Whether the feed-forward reads the layer's input, as attention does.
    """

    norm: Literal["rms", "offset_rms", "layer"]
    eps: float
    activation: str
    gated: bool = True
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """How a layer attends.

    Attributes:
        scale: Factor on the scores.
        window: Number of keys that a query sees, its own included; None = all up to its own.
        softcap: Scores pass through cap × tanh(score / cap); None = unchanged.
        rope: Index of the layer's table among the family's rotary tables.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    rope: int = 0
