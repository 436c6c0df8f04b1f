"""A small fully connected network over standardised features: the trainable part of every learned router.

Pure tensors in a flat dictionary, as they lie in `router.safetensors`. Knows features and outputs, no programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F  # noqa: N812

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Network:
    """x ↦ W_n(… relu(W_0 standardised(x) + b_0) …) + b_n.

    Attributes:
        mean: Subtracted from the features, (F,).
        scale: Then multiplied with them, (F,).
        weights: Per layer (out, in).
        biases: Per layer (out,).
    """

    mean: Tensor
    scale: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    @classmethod
    def fresh(cls, features: Tensor, hidden: Sequence[int], outputs: int, seed: int) -> Self:
        """A new network for features like these, (M, F); the last layer starts at zero."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [features.shape[1], *hidden, outputs]
        weights = [torch.randn(b, a, generator=generator) * (2 / a) ** 0.5 for a, b in pairwise(sizes)]
        weights[-1].zero_()
        spread = features.std(0, unbiased=False)
        scale = torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), torch.zeros_like(spread))
        return cls(features.mean(0), scale, tuple(weights), tuple(torch.zeros(size) for size in sizes[1:]))

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (…, O) of features (…, F)."""
        x = (x - self.mean) * self.scale
        last = len(self.weights) - 1
        for at, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(x, weight, bias)
            if at < last:
                x = F.relu(x)
        return x

    @property
    def flops(self) -> int:
        """FLOPs of one prompt: 2 per multiply-accumulate of the products."""
        return sum(2 * weight.numel() for weight in self.weights)

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(tensor.numel() for tensor in (*self.weights, *self.biases))

    @property
    def trainable(self) -> list[Tensor]:
        """The tensors that training changes, in a fixed order."""
        return [*self.weights, *self.biases]

    def to(self, device: torch.device) -> Network:
        """The same network on a device."""
        move = [tensor.to(device) for tensor in (self.mean, self.scale, *self.weights, *self.biases)]
        count = len(self.weights)
        return Network(move[0], move[1], tuple(move[2 : 2 + count]), tuple(move[2 + count :]))

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are stored."""
        named = {"mean": self.mean, "scale": self.scale}
        named |= {f"weight.{at}": weight for at, weight in enumerate(self.weights)}
        named |= {f"bias.{at}": bias for at, bias in enumerate(self.biases)}
        return {name: tensor.detach().to("cpu", torch.float32).contiguous().clone() for name, tensor in named.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From stored tensors.

        Raises:
            ValueError: They do not make one network, or hold a value that is not finite.
        """
        count = sum(name.startswith("weight.") for name in tensors)
        try:
            weights = tuple(tensors[f"weight.{at}"] for at in range(count))
            biases = tuple(tensors[f"bias.{at}"] for at in range(count))
            mean, scale = tensors["mean"], tensors["scale"]
        except KeyError as error:
            raise ValueError(f"tensor {error} is missing") from error
        widths = [mean.shape[0], *(bias.shape[0] for bias in biases)]
        shapes = [tuple(weight.shape) for weight in weights]
        if not weights or scale.shape != mean.shape or shapes != [(b, a) for a, b in pairwise(widths)]:
            raise ValueError(f"the shapes {shapes} do not make one network")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("a tensor holds a value that is not finite")
        return cls(mean, scale, weights, biases)
