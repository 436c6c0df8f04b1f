"""A bridge: a cheap map fitted to carry the hidden state over a segment of layers. Pure arithmetic, no fitting here.

The state of the first position of a sequence is large and nearly the same for every prompt. It would distort the map
fitted to the others, so that position gets a constant instead. Knows tensors and FLOPs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.products import times

if TYPE_CHECKING:
    from torch import Tensor


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

    @property
    def rank(self) -> int | None:
        """The r of a low-rank map; None for a map of full rank."""
        return None if len(self.weight) == 1 else self.weight[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: the weight's factors, the bias, and the constant of position 0."""
        return (*self.weight, self.bias, self.first)

    @cached_property
    def digest(self) -> str:
        """Hash of the map as float32; the same on every device."""
        digest = hashlib.sha256()
        for tensor in self.tensors:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, dtype: torch.dtype, device: torch.device) -> Bridge:
        """The same map in another dtype, on another device."""
        weight = tuple(factor.to(device, dtype) for factor in self.weight)
        return Bridge(weight, self.bias.to(device, dtype), self.first.to(device, dtype))

    def at(self, device: torch.device) -> Bridge:
        """The same map on a device; itself if it is there already."""
        return self if self.bias.device == device else self.to(self.bias.dtype, device)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Carry states (N, E) at positions (N,) over the segment."""
        product = x
        for factor in self.weight:
            product = times(product, factor)
        return x + torch.where((positions == 0).unsqueeze(-1), self.first, product + self.bias)
