"""A bridge: a cheap map fitted to carry the hidden state over a segment of layers. Pure arithmetic, no fitting here.

The first position of a sequence has a state of its own, large and nearly the same for every prompt; a map fitted on the
others would be bent by it, so that position gets a constant instead. Knows tensors and FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Bridge"]


@dataclass(frozen=True)
class Bridge:
    """x ← x + x W + b, and at position 0 x ← x + c.

    Attributes:
        weight: (E, E), or its two factors (E, r) and (r, E).
        bias: b, (E,).
        first: c, (E,).
    """

    weight: tuple[Tensor, ...]
    bias: Tensor
    first: Tensor

    @property
    def flops(self) -> int:
        """FLOPs per token: 2 per multiply-accumulate of the products."""
        return sum(2 * factor.numel() for factor in self.weight)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Carry states (N, E) at positions (N,) over the segment."""
        moved = x
        for factor in self.weight:
            moved = moved @ factor
        return x + torch.where((positions == 0).unsqueeze(-1), self.first, moved + self.bias)
