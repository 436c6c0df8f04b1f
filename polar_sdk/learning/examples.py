"""What a router learns from: the features of prompts beside what every program of a menu did on them.

Pure tensors, cut out of a `RewardMatrix`. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from polar_sdk.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.router.counts import Loss
    from polar_sdk.search import RewardMatrix

__all__ = ["Examples", "losses"]


def losses(matrix: RewardMatrix, loss: Loss) -> Tensor:
    """(P, M) float32: 1 where a prompt is lost against identity under a program, −1 where it is gained; see `Loss`."""
    differs = (~matrix.agree).float()
    if loss == "differs":
        return differs
    drops = matrix.right[:, :1].float() - matrix.right.float()
    drops = torch.where(matrix.labelled.unsqueeze(1), drops, differs)
    return drops.clamp(min=0) if loss == "harms" else drops


@dataclass(frozen=True, eq=False)
class Examples:
    """P prompts, M programs; column 0 is identity.

    Attributes:
        features: (P, F) float32.
        lost: (P, M) float32, from `least` to 1; see `losses`.
        margin: (P, M) float32; what the target `gap` regresses on.
        flops: (P, M) float64, the router's own in all columns but identity's.
        least: The smallest loss there is: −1 for `drops`, else 0.
    """

    features: Tensor
    lost: Tensor
    margin: Tensor
    flops: Tensor
    least: float = 0.0

    @classmethod
    def of(cls, matrix: RewardMatrix, features: Tensor, router_flops: Sequence[int], loss: Loss) -> Examples:
        """Of the rows of a matrix; for the loss `harms` of those whose answer is known.

        Raises:
            DataError: No row has an answer, and the loss needs one.
        """
        flops = matrix.flops.double()
        flops[:, 1:] += torch.tensor(router_flops, dtype=torch.float64).unsqueeze(1)
        keep = matrix.labelled if loss == "harms" else torch.ones(len(matrix), dtype=torch.bool)
        if loss != "differs" and not bool(matrix.labelled.any()):
            raise DataError(f"no prompt has an answer, which the loss {loss!r} needs; use 'differs', or give answers.")
        least = -1.0 if loss == "drops" else 0.0
        return cls(features[keep], losses(matrix, loss)[keep], matrix.margin[keep], flops[keep], least)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def kept(self) -> Tensor:
        """(P, M) float32 quality from 0 (lost) to 1 (the best there is): what the value head predicts."""
        return (1 - self.lost) / (1 - self.least)

    @property
    def saved(self) -> Tensor:
        """(P, M) float32 share of identity's FLOPs that each program saves."""
        return (1 - self.flops / self.flops[:, :1]).float()
