"""What the engine's functions pass to each other: weights, rotary pairs, queries, keys, values, kinds of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """How a layer attends; layers of one kind share their compiled code.

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
