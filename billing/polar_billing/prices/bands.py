"""Graduated bands, volume bands and packages, as integer arithmetic on counted quantities.

All quantities are whole numbers of one unit, prices whole numbers of another; nothing is rounded and nothing
here knows what is counted. A band ends at its bound, the bound included; the last band has none.

* graduated: each part of the quantity costs the price of the band it lies in. Continuous and, for prices that
  are not negative, monotone; splitting a stretch at any point costs the same in sum.
* volume: the whole quantity costs the price of the band its last unit lies in.
* package: every started block of `size` costs the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


Rate = TypeVar("Rate")


def graduated(quantity: int, bands: Sequence[tuple[int | None, Rate]]) -> Iterator[tuple[int, Rate]]:
    """Split a quantity over bands.

    Args:
        quantity: Counted units, not negative.
        bands: Upper bound (None for the last) and rate of each, bounds rising.

    Yields:
        The part in each band that has one, and the band's rate; the parts sum to the quantity.
    """
    lower = 0
    for bound, rate in bands:
        upper = quantity if bound is None else min(quantity, bound)
        if upper > lower:
            yield upper - lower, rate
            lower = upper


def volume(quantity: int, bands: Sequence[tuple[int | None, Rate]]) -> Iterator[tuple[int, Rate]]:
    """Give the whole quantity the rate of the band its last unit lies in; nothing for 0."""
    if quantity == 0:
        return
    for bound, rate in bands:
        if bound is None or quantity <= bound:
            yield quantity, rate
            return


def packages(quantity: int, size: int) -> int:
    """Count the started blocks of `size`; none for 0."""
    return -(-quantity // size)
