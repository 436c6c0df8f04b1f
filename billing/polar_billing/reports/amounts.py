"""The unit in which a report shows its amounts, so that nobody has to read 0.000013; every digit stays.

One unit for charges and one for effective prices, each chosen by the median of those that are shown. JSON and CSV keep
the currency.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from statistics import median_high
from typing import TYPE_CHECKING, Final

from polar_billing.reports import text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from polar_billing.reports.report import Report

_STEPS: Final = ((Decimal("0.1"), 0, "", ""), (Decimal("0.0001"), 3, "m", "thousandths of "))
_SMALLEST: Final = (6, "µ", "millionths of ")


@dataclass(frozen=True)
class Unit:
    """A currency, or a thousandth or millionth of it."""

    name: str
    """As it stands in the head of a column: `USD`, `mUSD` or `µUSD`."""
    words: str
    """The same in words: `millionths of USD`."""
    exponent: int
    """Amounts are shown multiplied by 10 to this power."""

    def show(self, value: Decimal | None, *, signed: bool = False) -> str:
        """An amount in this unit, with all of its digits."""
        if value is None:
            return text.DASH
        sign, digits, exponent = value.as_tuple()
        assert isinstance(exponent, int)
        moved = Decimal((sign, digits, exponent + self.exponent))
        if not moved:
            return f"{abs(moved):,f}" if exponent + self.exponent <= 0 else "0"
        return f"{moved:+,f}" if signed else f"{moved:,f}"


def unit_for(amounts: Iterable[Decimal | None], currency: str | None) -> Unit:
    """The unit in which most of some amounts can be read."""
    name = currency or ""
    sizes = [abs(amount) for amount in amounts if amount]
    if not sizes or not name:
        return Unit(name, name, 0)
    middle = median_high(sizes)
    for least, exponent, prefix, words in _STEPS:
        if middle >= least:
            return Unit(f"{prefix}{name}", f"{words}{name}", exponent)
    exponent, prefix, words = _SMALLEST
    return Unit(f"{prefix}{name}", f"{words}{name}", exponent)


@dataclass(frozen=True)
class Amounts:
    """The two units of a report."""

    charges: Unit
    prices: Unit
    """Of effective prices: per 1,000 requests and per million tokens."""

    @classmethod
    def of(cls, report: Report) -> Amounts:
        """Choose them."""
        return cls(unit_for(_charges(report), report.currency), unit_for(_prices(report), report.currency))


def _charges(report: Report) -> Iterator[Decimal | None]:
    yield report.figures.charge
    yield from (tier.figures.charge for tier in report.tiers)
    yield from (tenant.total for tenant in report.tenants)


def _prices(report: Report) -> Iterator[Decimal | None]:
    for figures in (report.figures, *(tier.figures for tier in report.tiers)):
        yield from (figures.price_per_1000_requests, figures.price_per_million_tokens)
