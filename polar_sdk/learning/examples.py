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

    from polar_sdk.router.certificate import Loss
    from polar_sdk.search import RewardMatrix

__all__ = ["Examples", "lost"]


def lost(matrix: RewardMatrix, loss: Loss) -> Tensor:
    """(P, M) bool: what counts as lost against identity under each program."""
    if loss == "differs":
        return ~matrix.agree
    return matrix.right[:, :1] & ~matrix.right & matrix.labelled.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Examples:
    """P prompts, M programs; column 0 is identity.

    Attributes:
        features: (P, F) float32.
        lost: (P, M) bool.
        margin: (P, M) float32; what the target `gap` regresses on.
        flops: (P, M) float64, the router's own in all columns but identity's.
    """

    features: Tensor
    lost: Tensor
    margin: Tensor
    flops: Tensor

    @classmethod
    def of(cls, matrix: RewardMatrix, features: Tensor, router_flops: Sequence[int], loss: Loss) -> Examples:
        """Of the rows of a matrix; for the loss `harms` of those whose answer is known.

        Raises:
            DataError: No row has an answer, and the loss needs one.
        """
        flops = matrix.flops.double()
        flops[:, 1:] += torch.tensor(router_flops, dtype=torch.float64).unsqueeze(1)
        keep = matrix.labelled if loss == "harms" else torch.ones(len(matrix), dtype=torch.bool)
        if not bool(keep.any()):
            raise DataError("no prompt has an answer, which the loss 'harms' needs; use 'differs', or give answers.")
        return cls(features[keep], lost(matrix, loss)[keep], matrix.margin[keep], flops[keep])

    def __len__(self) -> int:
        return len(self.features)

    @property
    def saved(self) -> Tensor:
        """(P, M) float32 share of identity's FLOPs that each program saves."""
        return (1 - self.flops / self.flops[:, :1]).float()
