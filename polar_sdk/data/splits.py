"""Splits by hash: where an item goes depends on its text and on nothing else.

So an item stays where it is when a file is shuffled or grows, and copies of it cannot land on two sides. Shares are
met on average, not exactly.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final, Literal, NamedTuple, get_args

from polar_sdk.errors import DataError

__all__ = ["DEFAULT_SHARES", "SPLITS", "Shares", "Split", "split_of"]

Split = Literal["train", "dev", "calibration", "test"]
SPLITS: Final[tuple[Split, ...]] = get_args(Split)


class Shares(NamedTuple):
    """How much of the data each split gets; the shares add up to 1."""

    train: float = 0.5
    dev: float = 0.1
    calibration: float = 0.2
    test: float = 0.2

    def check(self) -> None:
        """Raise DataError where the shares are no shares.

        Raises:
            DataError: One is negative or no number, or they do not add up to 1.
        """
        if not all(math.isfinite(share) and share >= 0 for share in self) or abs(sum(self) - 1) > 1e-6:
            raise DataError(
                f"split shares {tuple(self)} must be 0 or more and add up to 1; write for example 0.5,0.1,0.2,0.2."
            )


DEFAULT_SHARES: Final = Shares()


def split_of(item_id: str, shares: Shares = DEFAULT_SHARES, seed: int = 0) -> Split:
    """The split of an item.

    Args:
        item_id: What `item_id` says of it.
        shares: Of the splits.
        seed: Another seed deals all items anew.
    """
    digest = hashlib.sha256(f"{seed} {item_id}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    edge = 0.0
    for split, share in zip(SPLITS, shares, strict=True):
        edge += share
        if place < edge:
            return split
    return next(split for split, share in zip(reversed(SPLITS), reversed(shares), strict=True) if share > 0)
