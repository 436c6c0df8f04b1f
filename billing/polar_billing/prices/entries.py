"""Entries of a price book: the rates of one request from one moment on, and timelines of them.

Knows no book and no usage record.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from polar_billing.prices.fields import Checked, Moment, Multiplier, Price

if TYPE_CHECKING:
    from datetime import datetime
    from decimal import Decimal


class TokenPrices(Checked):
    """Per-token prices of a conventional offer, to compare with; never charged."""

    per_million_input_tokens: Price
    """Currency units per 10^6 prompt tokens, cached ones included."""
    per_million_output_tokens: Price


class PriceEntry(Checked):
    """The prices from one moment on. A price that is absent charges nothing and makes no line."""

    effective_from: Moment
    effective_until: Moment | None = None
    """End of these prices, itself excluded; without it they hold until the next entry begins."""
    per_compute_unit: Price | None = None
    """Currency units per CU (10^12 executed FLOPs)."""
    per_million_input_tokens: Price | None = None
    """Currency units per 10^6 prompt tokens, cached ones included."""
    per_million_output_tokens: Price | None = None
    per_request: Price | None = None
    tiers: dict[str, Multiplier]
    """Tier name → what every price of this entry is multiplied by for it."""
    untiered: Multiplier | None = None
    """The same for a request whose program was named by hand; without it such a request is unrated."""
    token_reference: TokenPrices | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.effective_until is not None and self.effective_until <= self.effective_from:
            raise ValueError(f"effective_until ({self.effective_until}) is not after {self.effective_from}")
        if not any(price is not None for price in self.components.values()):
            raise ValueError(f"prices nothing; give at least one of {', '.join(self.components)}")
        if not self.tiers and self.untiered is None:
            raise ValueError("names no tier; give at least one under `tiers`")
        return self

    @property
    def components(self) -> dict[str, Decimal | None]:
        """Every price an entry can have, by its key in the file."""
        names = ("per_compute_unit", "per_million_input_tokens", "per_million_output_tokens", "per_request")
        return dict(zip(names, self.rates, strict=True))

    @property
    def rates(self) -> tuple[Decimal | None, ...]:
        """The values of `components`."""
        return self.per_compute_unit, self.per_million_input_tokens, self.per_million_output_tokens, self.per_request

    def multiplier(self, tier: str | None) -> Decimal | None:
        """What prices are multiplied by for a tier, or None where the entry has no price for it."""
        return self.untiered if tier is None else self.tiers.get(tier)


def timeline(entries: tuple[PriceEntry, ...]) -> tuple[PriceEntry, ...]:
    """Order entries by time, and refuse two at once.

    Raises:
        ValueError: Two begin together, or one ends after the next has begun.
    """
    ordered = tuple(sorted(entries, key=lambda entry: entry.effective_from))
    for one, following in pairwise(ordered):
        start = following.effective_from.isoformat()
        if one.effective_from == following.effective_from:
            raise ValueError(f"two entries are effective from {start}; keep one")
        if one.effective_until is not None and one.effective_until > following.effective_from:
            raise ValueError(f"the entry until {one.effective_until.isoformat()} overlaps the one from {start}")
    return ordered


def entry_at(entries: tuple[PriceEntry, ...], moment: datetime) -> PriceEntry | None:
    """The entry in force at a time of use, or None before the first and in a gap."""
    for entry in reversed(entries):
        if entry.effective_from <= moment:
            ended = entry.effective_until is not None and moment >= entry.effective_until
            return None if ended else entry
    return None
