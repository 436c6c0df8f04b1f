"""Maps that replace layers: bridges and fills. Knows tensors and FLOPs; the lab fits them.

A *bridge* carries the hidden state over a segment of layers. The state of the first position of a sequence is large and
nearly the same for every prompt. It would distort the map fitted to the others, so that position gets a constant.

A *fill* writes the keys and values of a segment for prompt tokens that do not run it. It reads their state where the
segment begins and gives, for every layer of the segment, its keys before their turn by position (and after their norm,
where the family has one), and its values. It is affine in the state, in the embedding that the token entered the model
with, and in some hidden units of the state; all but the first are optional. Where layers run after the segment, its
*carry* gives the state that they read; without one it is the state that the segment began with.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import torch

from polar_sdk.engine.products import times

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor


_EPS = 1e-6
"""Added to the mean square of a state before its root."""


def rms(x: Tensor) -> Tensor:
    """Root mean square of states (N, E), in float32; (N, 1)."""
    return (x.float().square().mean(-1, keepdim=True) + _EPS).sqrt()


def normalise(x: Tensor) -> Tensor:
    """States (N, E) divided by their root mean square, as a fill reads them."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + _EPS).rsqrt()).to(x.dtype)


def reads(x: Tensor, hidden: Sequence[Tensor]) -> Tensor:
    """The inputs (N, E + H) of a fill with these hidden units, from states (N, E)."""
    state = normalise(x)
    return torch.cat((state, times(state, *hidden).relu()), -1) if hidden else state


@dataclass(frozen=True)
class Map(ABC):
    """A fitted map that stands for a segment of layers.

    Attributes:
        weight: W, or its two factors (…, r) and (r, …).
        bias: b.
    """

    weight: tuple[Tensor, ...]
    bias: Tensor

    @property
    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """All tensors by name, in the order of the digest; those with two dimensions multiply."""

    @classmethod
    @abstractmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Self:
        """A map of named tensors.

        Raises:
            KeyError: One is missing.
            ValueError: Their shapes do not form a map.
        """

    @property
    def units(self) -> int:
        """Number of hidden units, H."""
        return self.parts["hidden.weight"].shape[1] if "hidden.weight" in self.parts else 0

    @property
    def width(self) -> int:
        """Size of the states that it reads, E."""
        return self.weight[0].shape[0] - self.units

    @property
    def rank(self) -> int | None:
        """The r of a low-rank map; None for a map of full rank."""
        return None if len(self.weight) == 1 else self.weight[0].shape[1]

    @property
    def flops(self) -> int:
        """FLOPs per token: 2 per multiply-accumulate of the products."""
        return sum(2 * part.numel() for part in self.parts.values() if part.dim() == 2)

    @cached_property
    def digest(self) -> str:
        """Hash of the map as float32; the same on every device. Certificates name it, so its order must not change."""
        digest = hashlib.sha256()
        for part in self.parts.values():
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def like(self, tensors: Iterable[Tensor]) -> Self:
        """A map of the same kind with other tensors, in the order of `parts`."""
        return self.of(dict(zip(self.parts, tensors, strict=True)))

    def to(self, dtype: torch.dtype, device: torch.device) -> Self:
        """The same map in another dtype, on another device."""
        return self.like(part.to(device, dtype) for part in self.parts.values())

    def at(self, device: torch.device) -> Self:
        """The same map on a device; itself if it is there already."""
        return self if self.bias.device == device else self.to(self.bias.dtype, device)


@dataclass(frozen=True)
class Bridge(Map):
    """x ← x + x W + b, and at position 0 x ← x + c; W is (E, E), b is (E,).

    Attributes:
        first: c, (E,).
    """

    first: Tensor

    @property
    def parts(self) -> dict[str, Tensor]:
        """`weight.0` (`weight.1`), `bias`, `first`."""
        return {**_numbered(self.weight), "bias": self.bias, "first": self.first}

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Self:
        """See `Map.of`."""
        weight, bias, first = _factors(parts), parts["bias"], parts["first"]
        width = weight[0].shape[0]
        if not (width,) == weight[-1].shape[1:] == bias.shape == first.shape:
            shapes = [tuple(part.shape) for part in (*weight, bias, first)]
            raise ValueError(f"weight, bias and constant have shapes {shapes}")
        return cls(weight, bias, first)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Carry states (N, E) at positions (N,) over the segment."""
        moved = _through(x, self.weight) + self.bias
        return x + torch.where((positions == 0).unsqueeze(-1), self.first, moved)


@dataclass(frozen=True)
class Fill(Map):
    """Keys and values = [n, max(0, n U + u)] W + m T + b, for the L layers of a segment.

    Here n = normalise(x) of the state x, and m that of the token's embedding, as it enters the first layer. W is
    (E + H, L × 2 × G × d); b is (L, 2, G, d), for each layer its keys, then its values.

    Attributes:
        hidden: U (E, H) and u (H,) of H hidden units; empty if there are none.
        carry: V (E + H, E) and v (E,): the state after the segment is x + rms(x) ([n, max(0, n U + u)] V + v). Empty
            where states pass unchanged.
        token: T, (E, L × 2 × G × d), or its two factors; empty if embeddings are not read.
    """

    hidden: tuple[Tensor, ...] = ()
    carry: tuple[Tensor, ...] = ()
    token: tuple[Tensor, ...] = ()

    @property
    def parts(self) -> dict[str, Tensor]:
        """All tensors by name.

        `hidden.weight`, `hidden.bias`, `weight.0` (`weight.1`), `bias`, `carry.weight`, `carry.bias`, `token.0`
        (`token.1`), as far as there are.
        """
        hidden, carry = (
            {f"{name}.{part}": tensor for part, tensor in zip(("weight", "bias"), pair, strict=False)}
            for name, pair in (("hidden", self.hidden), ("carry", self.carry))
        )
        return {**hidden, **_numbered(self.weight), "bias": self.bias, **carry, **_numbered(self.token, "token")}

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Self:
        """See `Map.of`."""
        hidden, carry = (
            (parts[f"{name}.weight"], parts[f"{name}.bias"]) if f"{name}.weight" in parts else ()
            for name in ("hidden", "carry")
        )
        token = _factors(parts, "token") if "token.0" in parts else ()
        made = cls(_factors(parts), parts["bias"], hidden, carry, token)
        inputs, shapes = made.weight[0].shape[0], {name: tuple(part.shape) for name, part in parts.items()}
        if made.bias.dim() != 4 or made.bias.shape[1] != 2 or made.weight[-1].shape[1] != made.bias.numel():
            raise ValueError(f"weight and bias do not form keys and values: {shapes}")
        if hidden and (hidden[0].shape[0] + made.units != inputs or hidden[1].shape != hidden[0].shape[1:]):
            raise ValueError(f"hidden units do not fit {inputs} inputs: {shapes}")
        if carry and (carry[0].shape != (inputs, made.width) or carry[1].shape != (made.width,)):
            raise ValueError(f"the carry does not fit states of {made.width}: {shapes}")
        if token and (token[0].shape[0], token[-1].shape[1]) != (made.width, made.bias.numel()):
            raise ValueError(f"what it reads of the token does not fit states of {made.width}: {shapes}")
        return made

    def layer(self, index: int) -> Fill:
        """The map of one of the layers alone, 0 … L − 1, without the carry."""
        own = slice(index * self.bias[0].numel(), (index + 1) * self.bias[0].numel())
        weight, token = ((*each[:-1], each[-1][:, own]) if each else () for each in (self.weight, self.token))
        return Fill(weight, self.bias[index : index + 1], self.hidden, (), token)

    def __call__(self, x: Tensor, embedded: Tensor | None) -> Tensor:
        """Keys and values (N, L, 2, G, d) for states (N, E) at the segment's entry and, if read, embeddings (N, E)."""
        return self._written(reads(x, self.hidden), embedded)

    def carried(self, x: Tensor) -> Tensor:
        """States (N, E) after the segment, for states at its entry; the same ones where there is no carry."""
        return self._carried(x, reads(x, self.hidden)) if self.carry else x

    def crossed(self, x: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, and the states after the segment; hidden units are computed once for both."""
        read = reads(x, self.hidden)
        return self._written(read, embedded), self._carried(x, read) if self.carry else x

    def _written(self, read: Tensor, embedded: Tensor | None) -> Tensor:
        written = _through(read, self.weight)
        if self.token:
            assert embedded is not None, "a map that reads embeddings is given them"
            written = written + _through(normalise(embedded).to(read.dtype), self.token)
        return written.view(-1, *self.bias.shape).add_(self.bias)

    def _carried(self, x: Tensor, read: Tensor) -> Tensor:
        weight, bias = self.carry
        return x + (rms(x) * times(read, weight, bias).float()).to(x.dtype)


def _through(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The product of states (N, E) with a matrix, given as one or two factors."""
    for factor in factors:
        x = times(x, factor)
    return x


def _numbered(factors: Sequence[Tensor], name: str = "weight") -> dict[str, Tensor]:
    return {f"{name}.{index}": factor for index, factor in enumerate(factors)}


def _factors(parts: Mapping[str, Tensor], name: str = "weight") -> tuple[Tensor, ...]:
    found = tuple(parts[part] for part in sorted(parts) if part.startswith(f"{name}."))
    if not found:
        raise KeyError(f"{name}.0")
    if any(factor.dim() != 2 for factor in found) or any(a.shape[1] != b.shape[0] for a, b in pairwise(found)):
        raise ValueError(f"factors of shapes {[tuple(factor.shape) for factor in found]} do not form a product")
    return found
