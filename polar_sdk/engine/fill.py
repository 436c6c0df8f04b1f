"""A fill: a map fitted to write the keys and values of a segment of layers. Pure arithmetic, no fitting here.

A prompt token that is filled does not run the layers of the segment. One affine map reads its state where the segment
begins and gives, for every layer of the segment, its keys before their turn by position (and after their norm, where
the family has one), and its values. Knows tensors and FLOPs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


EPS = 1e-6
"""Added to the mean square of a state before its root."""


def normalise(x: Tensor) -> Tensor:
    """States (N, E) divided by their root mean square: what a fill reads."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


@dataclass(frozen=True)
class Fill:
    """Keys and values = normalise(x) W + b, for the L layers of a segment.

    Attributes:
        weight: (E, L × 2 × G × d), or its two factors (E, r) and (r, L × 2 × G × d).
        bias: b, (L, 2, G, d): for each layer its keys, then its values.
    """

    weight: tuple[Tensor, ...]
    bias: Tensor

    @property
    def layers(self) -> int:
        """Number of layers that it writes, L."""
        return self.bias.shape[0]

    @property
    def flops(self) -> int:
        """FLOPs per filled token: 2 per multiply-accumulate of the products."""
        return sum(2 * factor.numel() for factor in self.weight)

    @property
    def rank(self) -> int | None:
        """The r of a low-rank map; None for a map of full rank."""
        return None if len(self.weight) == 1 else self.weight[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: the weight's factors and the bias."""
        return (*self.weight, self.bias)

    @cached_property
    def digest(self) -> str:
        """Hash of the map as float32; the same on every device."""
        digest = hashlib.sha256()
        for tensor in self.tensors:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, dtype: torch.dtype, device: torch.device) -> Fill:
        """The same map in another dtype, on another device."""
        return Fill(tuple(factor.to(device, dtype) for factor in self.weight), self.bias.to(device, dtype))

    def at(self, device: torch.device) -> Fill:
        """The same map on a device; itself if it is there already."""
        return self if self.bias.device == device else self.to(self.bias.dtype, device)

    def layer(self, index: int) -> Fill:
        """The map of one of the layers alone, 0 … L − 1."""
        width = self.bias[0].numel()
        columns = slice(index * width, (index + 1) * width)
        return Fill((*self.weight[:-1], self.weight[-1][:, columns]), self.bias[index : index + 1])

    def __call__(self, x: Tensor) -> Tensor:
        """Keys and values (N, L, 2, G, d) for states (N, E) at the segment's entry."""
        product = normalise(x)
        for factor in self.weight:
            product = product @ factor
        return product.view(-1, *self.bias.shape) + self.bias
