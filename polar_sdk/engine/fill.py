"""A fill: a map fitted to write the keys and values of a segment of layers. Pure arithmetic, no fitting here.

A prompt token that is filled does not run the layers of the segment. One map reads its state where the segment begins
and gives, for every layer of the segment, its keys before their turn by position (and after their norm, where the
family has one), and its values. It is affine, in the state alone or in the state and some hidden units of it. Where
layers run after the segment, a second map, the *carry*, gives the state that they read; without one it is the state
that the segment began with. Knows tensors and FLOPs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.products import times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


EPS = 1e-6
"""Added to the mean square of a state before its root."""


def rms(x: Tensor) -> Tensor:
    """Root mean square of states (N, E), in float32; (N, 1)."""
    return (x.float().square().mean(-1, keepdim=True) + EPS).sqrt()


def normalise(x: Tensor) -> Tensor:
    """States (N, E) divided by their root mean square: what a fill reads."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def reads(x: Tensor, hidden: Sequence[Tensor]) -> Tensor:
    """What a map with these hidden units multiplies, (N, E + H), of states (N, E)."""
    state = normalise(x)
    return torch.cat((state, times(state, *hidden).relu()), -1) if hidden else state


@dataclass(frozen=True)
class Fill:
    """Keys and values = [n, max(0, n U + u)] W + b with n = normalise(x), for the L layers of a segment.

    Attributes:
        weight: W, (E + H, L × 2 × G × d), or its two factors (E + H, r) and (r, L × 2 × G × d).
        bias: b, (L, 2, G, d): for each layer its keys, then its values.
        hidden: U (E, H) and u (H,) of H hidden units; empty where there are none.
        carry: V (E + H, E) and v (E,): the state after the segment is x + rms(x) ([n, max(0, n U + u)] V + v). Empty
            where states pass unchanged.
    """

    weight: tuple[Tensor, ...]
    bias: Tensor
    hidden: tuple[Tensor, ...] = ()
    carry: tuple[Tensor, ...] = ()

    @property
    def layers(self) -> int:
        """Number of layers that it writes, L."""
        return self.bias.shape[0]

    @property
    def flops(self) -> int:
        """FLOPs per filled token: 2 per multiply-accumulate of the products."""
        return sum(2 * factor.numel() for factor in (*self.hidden[:1], *self.weight, *self.carry[:1]))

    @property
    def width(self) -> int:
        """Size of the states that it reads, E."""
        return self.weight[0].shape[0] - self.units

    @property
    def units(self) -> int:
        """Number of hidden units, H."""
        return self.hidden[0].shape[1] if self.hidden else 0

    @property
    def rank(self) -> int | None:
        """The r of a low-rank map; None for a map of full rank."""
        return None if len(self.weight) == 1 else self.weight[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: those of the hidden units, the weight's factors, the bias, and those of the carry."""
        return (*self.hidden, *self.weight, self.bias, *self.carry)

    def of(self, tensors: Sequence[Tensor]) -> Fill:
        """A map of the same kind with other tensors, in the order of `tensors`."""
        first = len(self.hidden)
        bias = first + len(self.weight)
        return Fill(tuple(tensors[first:bias]), tensors[bias], tuple(tensors[:first]), tuple(tensors[bias + 1 :]))

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
        return self.of([tensor.to(device, dtype) for tensor in self.tensors])

    def at(self, device: torch.device) -> Fill:
        """The same map on a device; itself if it is there already."""
        return self if self.bias.device == device else self.to(self.bias.dtype, device)

    def layer(self, index: int) -> Fill:
        """The map of one of the layers alone, 0 … L − 1, without the carry."""
        width = self.bias[0].numel()
        columns = slice(index * width, (index + 1) * width)
        last = self.weight[-1][:, columns]
        return Fill((*self.weight[:-1], last), self.bias[index : index + 1], self.hidden)

    def __call__(self, x: Tensor) -> Tensor:
        """Keys and values (N, L, 2, G, d) for states (N, E) at the segment's entry."""
        return self._written(reads(x, self.hidden))

    def carried(self, x: Tensor) -> Tensor:
        """States (N, E) after the segment, for states at its entry; the same ones where there is no carry."""
        return self._carried(x, reads(x, self.hidden)) if self.carry else x

    def crossed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, and the states after the segment; hidden units are computed once for both."""
        read = reads(x, self.hidden)
        return self._written(read), self._carried(x, read) if self.carry else x

    def _written(self, read: Tensor) -> Tensor:
        for factor in self.weight:
            read = times(read, factor)
        return read.view(-1, *self.bias.shape).add_(self.bias)

    def _carried(self, x: Tensor, read: Tensor) -> Tensor:
        weight, bias = self.carry
        return x + (rms(x) * times(read, weight, bias).float()).to(x.dtype)
