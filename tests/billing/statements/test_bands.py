"""Graduated and volume bands and packages: continuous, monotone, additive; against the textbook formula."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from polar_billing.statements.bands import graduated, packages, volume

quantities = st.integers(min_value=0, max_value=10**24)
prices = st.integers(min_value=0, max_value=10**18)


@st.composite
def band_lists(draw: st.DrawFn) -> list[tuple[int | None, int]]:
    bounds = sorted(draw(st.sets(st.integers(min_value=1, max_value=10**24), max_size=6)))
    return [(bound, draw(prices)) for bound in [*bounds, None]]


def cost(quantity: int, bands: list[tuple[int | None, int]]) -> int:
    return sum(part * price for part, price in graduated(quantity, bands))


@given(quantity=quantities, bands=band_lists())
def test_graduated_parts_are_what_lies_in_each_band(quantity: int, bands: list[tuple[int | None, int]]) -> None:
    lower, expected = 0, 0
    for bound, price in bands:
        upper = quantity if bound is None else bound
        expected += max(0, min(quantity, upper) - lower) * price
        lower = upper
    assert cost(quantity, bands) == expected
    assert sum(part for part, _ in graduated(quantity, bands)) == quantity


@given(bands=band_lists(), points=st.lists(quantities, min_size=2, max_size=10))
def test_graduated_cost_is_monotone(bands: list[tuple[int | None, int]], points: list[int]) -> None:
    costs = [cost(point, bands) for point in sorted(points)]
    assert all(less <= more for less, more in pairwise(costs))


@given(bands=band_lists(), quantity=quantities)
def test_graduated_cost_is_continuous_also_where_bands_meet(bands: list[tuple[int | None, int]], quantity: int) -> None:
    highest = max(price for _, price in bands)
    for point in [quantity, *(bound for bound, _ in bands if bound is not None)]:
        step = cost(point + 1, bands) - cost(point, bands)
        assert 0 <= step <= highest  # one more unit never costs more than one unit
        assert step in {price for _, price in bands}


@given(bands=band_lists(), parts=st.lists(quantities, min_size=1, max_size=8))
def test_graduated_cost_is_additive_across_splits(bands: list[tuple[int | None, int]], parts: list[int]) -> None:
    def between(start: int, end: int) -> int:
        """A stretch priced by itself, in bands whose bounds are counted from its start."""
        moved = [(None if bound is None else max(0, bound - start), price) for bound, price in bands]
        return cost(end - start, moved)

    ends = [sum(parts[: place + 1]) for place in range(len(parts))]
    assert sum(between(start, end) for start, end in pairwise([0, *ends])) == cost(ends[-1], bands)


@given(bands=band_lists(), quantity=quantities)
def test_volume_gives_everything_the_price_of_the_last_unit(bands: list[tuple[int | None, int]], quantity: int) -> None:
    parts = list(volume(quantity, bands))
    if quantity == 0:
        assert parts == []
        return
    last_unit = cost(quantity, bands) - cost(quantity - 1, bands)
    assert parts == [(quantity, last_unit)]


@given(quantity=quantities, size=st.integers(min_value=1, max_value=10**20))
def test_every_started_package_counts(quantity: int, size: int) -> None:
    blocks = packages(quantity, size)
    assert blocks * size >= quantity
    assert (blocks - 1) * size < quantity or quantity == 0
    assert blocks == -((-Fraction(quantity, size)).__floor__())
