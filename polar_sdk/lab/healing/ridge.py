"""Ridge regression in closed form, from sums that are filled pack by pack, so that no states need to be held.

Products are taken in float32 and summed in float64. Several sets of outputs share one Gram matrix. Knows tensors only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        device: Device of the pairs.
    """

    def __init__(self, width: int, outputs: Sequence[int], device: torch.device) -> None:
        exact = {"dtype": torch.float64 if device.type != "mps" else torch.float32, "device": device}
        self._count = 0
        self._inputs = torch.zeros(width, **exact)  # type: ignore[call-overload]
        self._gram = torch.zeros(width, width, **exact)  # type: ignore[call-overload]
        self._outputs = [torch.zeros(size, **exact) for size in outputs]  # type: ignore[call-overload]
        self._cross = [torch.zeros(width, size, **exact) for size in outputs]  # type: ignore[call-overload]

    def add_inputs(self, inputs: Tensor) -> None:
        """Add the inputs (N, E) of N pairs; each set of their outputs follows."""
        inputs = inputs.float()
        self._count += len(inputs)
        self._inputs += inputs.sum(0)
        self._gram += inputs.T @ inputs

    def add_outputs(self, place: int, inputs: Tensor, outputs: Tensor) -> None:
        """Add one set of outputs, (N, O), of pairs whose inputs were added."""
        outputs = outputs.float()
        self._outputs[place] += outputs.sum(0)
        self._cross[place] += inputs.float().T @ outputs

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, as they are stored."""
        outputs = {f"outputs.{place}": each for place, each in enumerate(self._outputs)}
        cross = {f"cross.{place}": each for place, each in enumerate(self._cross)}
        count = torch.tensor([self._count])
        return {"count": count, "inputs": self._inputs, "gram": self._gram, **outputs, **cross}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the sums to stored ones."""
        for name, each in self.tensors().items():
            if name != "count":
                each.copy_(tensors[name])
        self._count = int(tensors["count"])

    def solve(self, strength: float, rank: int | None = None, sets: slice = slice(None)) -> Affine:
        """One map to sets of outputs, side by side.

        Args:
            strength: Ridge penalty as a multiple of the mean variance of an input.
            rank: Maximum rank of the map: of all maps of that rank, the one whose outputs are nearest to the full
                map's. None = full.
            sets: Which; by default all.
        """
        count = max(self._count, 1)
        input_mean, mean = self._inputs / count, torch.cat(self._outputs[sets]) / count
        gram = self._gram - count * torch.outer(input_mean, input_mean)
        cross = torch.cat(self._cross[sets], 1) - count * torch.outer(input_mean, mean)
        penalty = strength * gram.diagonal().mean().clamp(min=1e-12)
        ridged = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(ridged, cross)
        bias = mean - input_mean @ weight
        factors = (weight,) if rank is None or rank >= min(weight.shape) else _low_rank(weight, ridged, rank)
        return Affine(tuple(factor.float().contiguous() for factor in factors), bias.float())


def _low_rank(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (E, r) and (r, O): the weight projected onto the directions in which its outputs vary most."""
    outputs = torch.linalg.cholesky(gram).T @ weight
    directions = torch.linalg.svd(outputs, full_matrices=False).Vh[:rank]
    return weight @ directions.T, directions
