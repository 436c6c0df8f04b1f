"""Loops: damping, and the guard that stops a loop which runs away.

A layer was trained to be visited once. Fed its own output it may blow the state up or turn it away; the guard looks at
each extra visit, at the row's last token, and on breach keeps the state before it. The loop then stays off for the
rest of the request, so that no later step misses keys of a visit that was left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """What an extra visit may do to the hidden state.

    Attributes:
        max_step: Longest step, as a multiple of the length of the state before it.
        min_cosine: Least cosine between the states before and after.
    """

    max_step: float = 1.0
    min_cosine: float = 0.5

    def breached(self, before: Tensor, after: Tensor) -> Tensor:
        """Which rows breach, (B,) of booleans, for states (B, E) before and after an extra visit."""
        import torch.nn.functional as F  # noqa: N812  (a policy is read where no torch is wanted)

        old, new = before.float(), after.float()
        step = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-12)
        cosine = F.cosine_similarity(old, new, dim=-1)
        # Written so that a state that is no number breaches.
        fine: Tensor = (step <= self.max_step) & (cosine >= self.min_cosine)
        return ~fine


def damp(before: Tensor, after: Tensor, parts: int) -> Tensor:
    """Take 1 / parts of the way from one state to the other."""
    return after if parts == 1 else before + (after - before) / parts
