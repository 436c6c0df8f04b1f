"""A menu: the programs that a router may choose from, with what was measured of each. A JSON file for people to read.

The numbers that training reads are in the reward matrix beside it. `cover` picks the few programs that together serve
most prompts cheaply. Knows no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from pydantic import BaseModel

from polar_sdk.errors import DataError
from polar_sdk.programs.program import Program
from polar_sdk.reading import read_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_FORMAT: Final = "polar-menu-1"


class MenuProgram(BaseModel, frozen=True):
    """One program of a menu."""

    program: Program
    flops_ratio: float
    """FLOPs over identity's, at 128 prompt and 64 output tokens."""
    agreement: float
    """Share of the dev prompts (train prompts, if dev is too small) on which it answers as identity does."""
    token_agreement: float
    """The same by tokens for prompts answered in text."""
    accuracy: float | None
    """Share of the labelled prompts among them that it answers right; None if there are none."""


class Menu(BaseModel, frozen=True):
    """A menu of one model."""

    format: str = _FORMAT
    model: str
    fingerprint: str
    dtype: str
    bridges: str
    """Hash of the bridges that the programs use; empty if they use none."""
    data: str
    """Hash of the prompts."""
    seed: int
    prompts: dict[str, int]
    """Prompts of each split."""
    tried: int
    """Distinct programs that were measured on all search prompts."""
    programs: tuple[MenuProgram, ...]
    """Identity first, then from expensive to cheap."""

    def save(self, path: str | Path) -> None:
        """Write the file; its folder is made if need be."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Menu:
        """Read a file back.

        Raises:
            DataError: It is missing, damaged or not a menu.
        """

        def damaged(reason: str) -> DataError:
            return DataError(f"menu {str(path)!r} {reason}.", hint="Make it with `polar lab search`.")

        menu = read_document(path, cls, damaged)
        if menu.format != _FORMAT:
            raise damaged(f"has format {menu.format!r}, not {_FORMAT!r}")
        return menu


def cover(gains: Tensor, size: int, must: Sequence[int] = ()) -> list[int]:
    """Columns that cover the rows best, picked greedily.

    A row gains the highest of its picked columns, and never less than 0. The sum has diminishing returns, so that the
    greedy pick reaches at least 1 − 1/e of the best one. Stops early where no column adds anything.

    Args:
        gains: (P, C), what prompt p gains if it may run candidate c.
        size: Maximum number of columns.
        must: Columns that are picked whatever they gain.

    Returns:
        Columns in the order of picking, `must` first.
    """
    picked = list(dict.fromkeys(must))[:size]
    gained = gains[:, picked].amax(1).clamp(min=0) if picked else torch.zeros(len(gains), dtype=gains.dtype)
    while len(picked) < size:
        added = (gains - gained[:, None]).clamp(min=0).sum(0)
        added[picked] = 0
        best = int(added.argmax())
        if added[best] <= 0:
            break
        picked.append(best)
        gained = torch.maximum(gained, gains[:, best])
    return picked
