"""Items that a plan prices over the period, in bands and packages, as integer arithmetic on counted quantities. Pure.

* graduated: each part of the quantity costs the price of the band it is in. Continuous and, for prices that are not
  negative, monotone; splitting a stretch at any point costs the same in sum.
* volume: the whole quantity costs the price of the band its last unit is in.
* package: every block of a size costs the same, also if it is only partly used.

A band ends at its bound, inclusive; the last band has none. Nothing is rounded.

Without `pool` each tier is counted by itself and the price is multiplied by the tier's multiplier; where a
multiplier changes within a phase, counting starts anew. With `pool` all tiers fill the same bands, and each unit is
weighted by its tier's multiplier: 1 CU at 1.25 counts as 1.25 weighted CU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from polar_billing.prices.entries import tier_order
from polar_billing.prices.plans import Banded
from polar_billing.prices.rating import ITEMS, multiply
from polar_billing.statements.lines import ExactLine, Use
from polar_billing.values.money import EXACT_SCALE, STORED_SCALE, from_scaled, plain, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from decimal import Decimal

    from polar_billing.prices.plans import Package, PeriodPrice
    from polar_billing.prices.rating import Rate
    from polar_billing.statements.lines import Phase


BandPrice = TypeVar("BandPrice")
Rated = tuple["Use", "Rate"]

_WEIGHT_SCALE: Final = 6
_ONE: Final = 10**_WEIGHT_SCALE


@dataclass(frozen=True)
class _Quantity:
    """A quantity that is counted together, and what its prices are multiplied by."""

    tier: str | None
    multiplier: int
    """Unit: 10^-6."""
    units: int
    """The counted quantity. Unit: 10^-decimals of the item's unit."""
    decimals: int

    def exact(self, quantity: int, decimals: int, price: Decimal) -> int:
        """`quantity × price × multiplier`, in units of 10^-30."""
        scaled = quantity * to_scaled(price, STORED_SCALE)
        if self.multiplier == _ONE:
            return scaled * int(10 ** (EXACT_SCALE - STORED_SCALE - decimals))
        return scaled * self.multiplier * int(10 ** (EXACT_SCALE - STORED_SCALE - _WEIGHT_SCALE - decimals))


def period_lines(item: PeriodPrice, phase: Phase, rated: Sequence[Rated]) -> list[ExactLine]:
    """Price one item over a phase; its charged usage comes with the rate that it is charged by."""
    if item.pool:
        quantities = [_Quantity(None, _ONE, pool_weights(item, rated).total(), item.decimals + _WEIGHT_SCALE)]
    else:
        units: Counter[tuple[str | None, int]] = Counter()
        for use, rate in rated:
            units[use.tier, to_scaled(rate.multiplier, _WEIGHT_SCALE)] += use.counts.by_item[item.per]
        ordered = sorted(units.items(), key=lambda entry: (tier_order(entry[0][0]), entry[0][1]))
        quantities = [_Quantity(tier, multiplier, count, item.decimals) for (tier, multiplier), count in ordered]
    lines_of = _band_lines if isinstance(item, Banded) else _package_lines
    return [line for counted in quantities for line in lines_of(item, phase, counted)]  # type: ignore[arg-type]


def pool_weights(item: PeriodPrice, rated: Iterable[Rated]) -> Counter[str | None]:
    """Each tier's part of a pooled quantity. Unit: 10^-6 of a counted unit."""
    weights: Counter[str | None] = Counter()
    for use, rate in rated:
        weights[use.tier] += use.counts.by_item[item.per] * to_scaled(rate.multiplier, _WEIGHT_SCALE)
    return weights


def _band_lines(item: Banded, phase: Phase, counted: _Quantity) -> Iterator[ExactLine]:
    split = graduated if item.model == "graduated" else volume
    scaled = [(None if band.up_to is None else to_scaled(band.up_to, counted.decimals), band) for band in item.bands]
    for part, band in split(counted.units, scaled):
        upto = "beyond" if band.up_to is None else f"up to {plain(band.up_to)}"
        yield _line(
            item, phase, counted, f"{item.model}, {upto}", from_scaled(part, counted.decimals), _unit(item),
            band.unit_price, counted.exact(part, counted.decimals, band.unit_price),
        )  # fmt: skip


def _package_lines(item: Package, phase: Phase, counted: _Quantity) -> Iterator[ExactLine]:
    blocks = packages(counted.units, to_scaled(item.size, counted.decimals))
    if blocks:
        unit = f"package of {plain(item.size)} {_unit(item)}"
        exact = counted.exact(blocks, 0, item.price)
        yield _line(item, phase, counted, "packages", from_scaled(blocks, 0), unit, item.price, exact)


def _unit(item: PeriodPrice) -> str:
    return f"weighted {ITEMS[item.per].unit}" if item.pool else ITEMS[item.per].unit


def _line(
    item: PeriodPrice,
    phase: Phase,
    counted: _Quantity,
    how: str,
    quantity: Decimal,
    unit: str,
    price: Decimal,
    exact: int,
) -> ExactLine:
    return ExactLine(
        kind="pool" if item.pool else "usage",
        item=f"{ITEMS[item.per].name} ({how})",
        exact=exact,
        since=phase.since,
        until=phase.until,
        tier=counted.tier,
        quantity=quantity,
        unit=unit,
        unit_price=multiply(price, from_scaled(counted.multiplier, _WEIGHT_SCALE)),
    )


def graduated(quantity: int, bands: Sequence[tuple[int | None, BandPrice]]) -> Iterator[tuple[int, BandPrice]]:
    """Split a quantity over bands of rising bounds (None for the last); the parts sum to it."""
    lower = 0
    for bound, rate in bands:
        upper = quantity if bound is None else min(quantity, bound)
        if upper > lower:
            yield upper - lower, rate
            lower = upper


def volume(quantity: int, bands: Sequence[tuple[int | None, BandPrice]]) -> Iterator[tuple[int, BandPrice]]:
    """Give the whole quantity the rate of the band its last unit is in; nothing for 0."""
    if quantity == 0:
        return
    for bound, rate in bands:
        if bound is None or quantity <= bound:
            yield quantity, rate
            return


def packages(quantity: int, size: int) -> int:
    """Count the started blocks of `size`; none for 0."""
    return -(-quantity // size)
