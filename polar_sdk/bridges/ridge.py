"""Ridge least squares in closed form: the map from the states before a segment to the states behind it.

What is fitted is the difference that the segment makes. Sums are kept in float64, so that states come in pack by pack
and none need be held. Position 0 is left out of the fit; it gets the mean of its own differences. Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polar_sdk.engine.bridge import Bridge

__all__ = ["Ridge", "unexplained"]


class Ridge:
    """Sums over pairs of states (N, E), from which a bridge is solved.

    Args:
        width: E.
        device: Where the states are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        exact = {"dtype": torch.float64 if device.type != "mps" else torch.float32, "device": device}
        self.count = 0
        """Pairs so far, position 0 left out."""
        self._inputs, self._moves = torch.zeros(width, **exact), torch.zeros(width, **exact)  # type: ignore[call-overload]
        self._gram, self._cross = torch.zeros(width, width, **exact), torch.zeros(width, width, **exact)  # type: ignore[call-overload]
        self._first, self._firsts = torch.zeros(width, **exact), 0  # type: ignore[call-overload]

    def add(self, before: Tensor, after: Tensor, positions: Tensor) -> None:
        """Take in states before and behind the segment, (N, E) each, at positions (N,)."""
        inputs, moves = before.float(), after.float() - before.float()
        later = positions != 0
        self._first += moves[~later].sum(0)
        self._firsts += int((~later).sum())
        inputs, moves = inputs[later], moves[later]
        self.count += len(inputs)
        self._inputs += inputs.sum(0)
        self._moves += moves.sum(0)
        self._gram += inputs.T @ inputs
        self._cross += inputs.T @ moves

    def solve(self, strength: float, rank: int | None = None) -> Bridge:
        """The bridge, in float32.

        Args:
            strength: Ridge penalty as a multiple of the mean variance of an input.
            rank: Most rank of the map: of all maps of that rank, the one whose outputs are nearest to the full map's.
                None = full.
        """
        count = max(self.count, 1)
        input_mean, move_mean = self._inputs / count, self._moves / count
        gram = self._gram - count * torch.outer(input_mean, input_mean)
        cross = self._cross - count * torch.outer(input_mean, move_mean)
        penalty = strength * gram.diagonal().mean().clamp(min=1e-12)
        ridged = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(ridged, cross)
        bias = move_mean - input_mean @ weight
        factors = (weight,) if rank is None or rank >= len(gram) else _low_rank(weight, ridged, rank)
        first = self._first / max(self._firsts, 1)
        return Bridge(tuple(factor.float().contiguous() for factor in factors), bias.float(), first.float())


def _low_rank(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (E, r) and (r, E): the weight projected on the directions in which its outputs vary most."""
    outputs = weight.T @ gram @ weight
    directions = torch.linalg.eigh(outputs).eigenvectors[:, -rank:]
    return weight @ directions, directions.T


def unexplained(before: Tensor, after: Tensor, carried: Tensor, positions: Tensor) -> tuple[float, float]:
    """Squared error of a bridge, and of a plain skip, over one pack: two sums over all but position 0.

    Args:
        before: States before the segment, (N, E).
        after: States that the segment gives, (N, E).
        carried: States that the bridge gives, (N, E).
        positions: (N,).
    """
    later = positions != 0
    wanted = after[later].float()
    bridge = (carried[later].float() - wanted).square().sum()
    skip = (before[later].float() - wanted).square().sum()
    return float(bridge), float(skip)
