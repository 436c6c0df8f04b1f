"""Pick a menu: few programs that together serve most prompts cheaply. Knows numbers, no programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["cover"]


def cover(gains: Tensor, size: int, must: Sequence[int] = ()) -> list[int]:
    """Columns that cover the rows best, picked greedily.

    A row gains the highest of its picked columns, and never less than 0. The sum of that has diminishing returns, so
    the greedy pick is within 1 − 1/e of the best one. Stops early where no column adds anything.

    Args:
        gains: (P, C), what prompt p gains if it may run candidate c.
        size: Most columns.
        must: Columns that are picked whatever they gain.

    Returns:
        Columns in the order of picking, `must` first.
    """
    picked = list(dict.fromkeys(must))[:size]
    held = gains[:, picked].amax(1).clamp(min=0) if picked else torch.zeros(len(gains), dtype=gains.dtype)
    while len(picked) < size:
        added = (gains - held[:, None]).clamp(min=0).sum(0)
        added[picked] = 0
        best = int(added.argmax())
        if added[best] <= 0:
            break
        picked.append(best)
        held = torch.maximum(held, gains[:, best])
    return picked
