"""Ridge regression in closed form, from sums that are filled pack by pack, so that no states need to be held.

Products are taken in float32 and summed in float64. Several sets of outputs may share one Gram matrix: its
factorisation is by far the most expensive part of a solution. Knows tensors only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Affine(NamedTuple):
    """y = x W + b, in float32."""

    weight: tuple[Tensor, ...]
    """(E, O), or its two factors (E, r) and (r, O)."""
    bias: Tensor
    """(O,)."""


class RidgeSums:
    """Sums over pairs of inputs (N, E) and outputs, from which affine maps are solved.

    Args:
        width: E.
        outputs: Width of each set of outputs.
        device: Where the pairs are.
    """

    def __init__(self, width: int, outputs: Sequence[int], device: torch.device) -> None:
        exact = {"dtype": torch.float64 if device.type != "mps" else torch.float32, "device": device}
        self.count = 0
        """Pairs added so far."""
        self._inputs = torch.zeros(width, **exact)  # type: ignore[call-overload]
        self._gram = torch.zeros(width, width, **exact)  # type: ignore[call-overload]
        self._outputs = [torch.zeros(size, **exact) for size in outputs]  # type: ignore[call-overload]
        self._cross = [torch.zeros(width, size, **exact) for size in outputs]  # type: ignore[call-overload]

    def add(self, inputs: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add N pairs: inputs (N, E), and each set of outputs (N, O)."""
        inputs = inputs.float()
        self.count += len(inputs)
        self._inputs += inputs.sum(0)
        self._gram += inputs.T @ inputs
        for place, values in enumerate(outputs):
            self._outputs[place] += values.float().sum(0)
            self._cross[place] += inputs.T @ values.float()

    def solve(self, strength: float, rank: int | None = None) -> list[Affine]:
        """The map to each set of outputs.

        Args:
            strength: Ridge penalty as a multiple of the mean variance of an input.
            rank: Maximum rank of the maps: of all maps of that rank, the one whose outputs are nearest to the full
                map's. None = full.
        """
        count = max(self.count, 1)
        input_mean = self._inputs / count
        gram = self._gram - count * torch.outer(input_mean, input_mean)
        penalty = strength * gram.diagonal().mean().clamp(min=1e-12)
        ridged = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        means = [total / count for total in self._outputs]
        crosses = [
            cross - count * torch.outer(input_mean, mean) for cross, mean in zip(self._cross, means, strict=True)
        ]
        widths = [cross.shape[1] for cross in crosses]
        weights = torch.linalg.solve(ridged, torch.cat(crosses, 1)).split(widths, 1)
        return [_affine(weight, mean, input_mean, ridged, rank) for weight, mean in zip(weights, means, strict=True)]


def _affine(weight: Tensor, mean: Tensor, input_mean: Tensor, gram: Tensor, rank: int | None) -> Affine:
    bias = mean - input_mean @ weight
    factors = (weight,) if rank is None or rank >= min(weight.shape) else _low_rank(weight, gram, rank)
    return Affine(tuple(factor.float().contiguous() for factor in factors), bias.float())


def _low_rank(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (E, r) and (r, O): the weight projected onto the directions in which its outputs vary most."""
    outputs = weight.T @ gram @ weight
    directions = torch.linalg.eigh(outputs).eigenvectors[:, -rank:]
    return weight @ directions, directions.T
