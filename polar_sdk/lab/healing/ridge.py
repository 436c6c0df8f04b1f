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
    beside: tuple[Tensor, ...] = ()
    """Factors of a second map, of other inputs, that is added; empty if there is none."""


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

    def solve(
        self,
        strength: float,
        rank: int | None = None,
        sets: slice = slice(None),
        *,
        inputs: int | None = None,
        beside: int = 0,
    ) -> Affine:
        """One map to sets of outputs, side by side.

        Args:
            strength: Ridge penalty as a multiple of the mean variance of an input.
            rank: Maximum rank of the map: of all maps of that rank, the one whose outputs are nearest to the full
                map's. None = full.
            sets: Which; by default all.
            inputs: Number of inputs that the map reads, the first ones; None = all.
            beside: Maximum rank of a second map, which reads the other inputs; 0 = there is none.
        """
        count, own = max(self._count, 1), slice(inputs)
        input_mean, mean = self._inputs / count, torch.cat(self._outputs[sets]) / count
        gram = self._gram - count * torch.outer(input_mean, input_mean)
        cross = torch.cat(self._cross[sets], 1) - count * torch.outer(input_mean, mean)
        penalty = strength * gram.diagonal().mean().clamp(min=1e-12)
        gram += penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        added: Tensor = torch.zeros_like(cross)
        second: tuple[Tensor, ...] = ()
        if beside:
            # What the others explain of the outputs beyond the first inputs; these are then fitted to what is left.
            others = slice(inputs, None)
            shared = torch.linalg.solve(gram[own, own], gram[own, others])
            left = gram[others, others] - gram[others, own] @ shared
            map_of_others = torch.linalg.solve(left, cross[others] - shared.T @ cross[own])
            second = _factors(map_of_others, left, beside)
            whole = second[0] if len(second) == 1 else second[0] @ second[1]
            added, mean = gram[:, others] @ whole, mean - input_mean[others] @ whole
        weight = torch.linalg.solve(gram[own, own], (cross - added)[own])
        bias = mean - input_mean[own] @ weight
        first = _factors(weight, gram[own, own], rank)
        return Affine(_floats(first), bias.float(), _floats(second))


def _floats(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(factor.float().clone() for factor in factors)


def _factors(weight: Tensor, gram: Tensor, rank: int | None) -> tuple[Tensor, ...]:
    """A map, or two factors of that rank where it has more."""
    return (weight,) if rank is None or rank >= min(weight.shape) else _low_rank(weight, gram, rank)


def _low_rank(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (E, r) and (r, O): the weight projected onto the directions in which its outputs vary most."""
    outputs = torch.linalg.cholesky(gram).T @ weight
    directions = torch.linalg.svd(outputs, full_matrices=False).Vh[:rank]
    return weight @ directions.T, directions
