"""Figures as text for people: the same words and digits in the terminal and in HTML.

None is unknown and prints as a dash; zero is zero. A report shows charges in one unit and effective prices in another,
each chosen by the median of the amounts shown, so that nobody has to read 0.000013; every digit is kept. JSON and CSV
keep the currency. Knows no output format.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from statistics import median_high
from typing import TYPE_CHECKING, Final

from polar_billing.values.money import plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polar_billing.reports.report import Report
    from polar_billing.reports.summary import Summary

DASH: Final = "–"
_STEPS: Final = ((Decimal("0.1"), 0, "", ""), (Decimal("0.0001"), 3, "m", "thousandths of "))
_SMALLEST: Final = (6, "µ", "millionths of ")
NO_TIER: Final = "by hand"
"""Shown as the tier of a request whose program was named by hand."""


def tier_name(tier: str | None) -> str:
    """A tier's name, or the words for no tier."""
    return NO_TIER if tier is None else tier


def count(value: int) -> str:
    """A whole number with its thousands grouped."""
    return f"{value:,}"


def compute_units(value: Decimal, *, signed: bool = False) -> str:
    """Compute units with 4 decimals, or with 1 from 1,000 CU. Unit: CU."""
    rounded = value.quantize(Decimal("0.1") if abs(value) >= 1_000 else Decimal("0.0001"), ROUND_HALF_EVEN)
    return f"{rounded or abs(rounded):{'+' if signed and rounded else ''},f}"


def money(value: Decimal | None) -> str:
    """An amount with all of its digits."""
    return DASH if value is None else f"{value:,f}"


def signed_money(value: Decimal | None) -> str:
    """The same with its sign; zero has none."""
    if value is None:
        return DASH
    return f"{value:+,f}" if value else money(abs(value))


def rate(value: Decimal | None) -> str:
    """A number of things per second, without trailing zeros."""
    return DASH if value is None else f"{Decimal(plain(value)):,f}"


def share(value: Decimal | None, *, signed: bool = False, decimals: int = 1) -> str:
    """A share as a percentage."""
    if value is None:
        return DASH
    percent = (value * 100).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN)
    return f"{percent or abs(percent):{'+' if signed and percent else ''}.{decimals}f} %"


def share_of_float(value: float) -> str:
    """A share as a percentage with 2 decimals."""
    return share(Decimal(repr(value)), decimals=2)


def milliseconds(nanoseconds: int | None) -> str:
    """A duration in milliseconds, or in seconds from one second."""
    if nanoseconds is None:
        return DASH
    if nanoseconds >= 10**9:
        return f"{Decimal(nanoseconds) / 10**9:,.2f} s"
    return f"{Decimal(nanoseconds) / 10**6:,.1f} ms"


def outcomes(counts: dict[str, int]) -> str:
    """Outcomes other than completed, for example `2 cancelled`; a dash where all completed."""
    others = [f"{requests:,} {outcome}" for outcome, requests in counts.items() if outcome != "completed"]
    return ", ".join(others) or DASH


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
            return DASH
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
    """Unit of effective prices: per 1,000 requests and per million tokens."""

    @classmethod
    def of(cls, report: Report | Summary) -> Amounts:
        """Choose them."""
        figures = [report.figures, *(tier.figures for tier in report.tiers)]
        charges = [*(each.charge for each in figures), *(tenant.total for tenant in report.tenants)]
        prices = [*(each.price_per_1000_requests for each in figures)]
        prices += (each.price_per_million_tokens for each in figures)
        return cls(unit_for(charges, report.currency), unit_for(prices, report.currency))
