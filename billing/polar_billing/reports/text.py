"""Figures as text for people: the same words and digits in the terminal and in HTML.

None is unknown and prints as a dash; zero is zero. Knows no output format.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final

from polar_billing.values.money import plain

DASH: Final = "–"
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
