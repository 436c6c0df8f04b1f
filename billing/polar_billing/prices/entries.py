"""Entries of a price book: the rates of one request from a given time on, timelines of them, and their fields.

Fields are exact decimals within limits, and times with an offset. Knows no book and no usage record.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from polar_billing.values.money import STORED_SCALE
from polar_sdk.reading import Unreadable, parse_decimal

USUAL_TIERS: Final = ("economy", "standard", "premium", "exact")
_DATED: Final = re.compile(r"\s*\d{4}-\d\d-\d\d")
"""Beginning of a text with a date; other texts are taken for seconds since 1970."""


def _decimal(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal)):
        raise ValueError("must be a decimal number")  # a float would bring binary digits in; TOML's arrive as Decimal
    try:
        return parse_decimal(value)
    except Unreadable as error:
        raise ValueError(str(error)) from error


def _plain(value: Decimal) -> Decimal:
    """Drop trailing zeros, so that 0.40 and 0.4 are one content and one hash."""
    text = format(value, "f")  # not normalize(), which rounds to the thread's decimal context
    return Decimal(text.rstrip("0").rstrip(".") or "0") if "." in text else value


def _dated(value: object) -> object:
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime.combine(value, time(), UTC)
    if isinstance(value, datetime) or (isinstance(value, str) and _DATED.match(value)):
        return value
    raise ValueError("is not a date or a date-time; write it like 2026-01-01 or 2026-01-01T00:00:00Z")


def _aware(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("needs an offset from UTC, for example 2026-01-01T00:00:00Z")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("is outside the years 1 to 9999 in UTC") from None


_WRITTEN: Final = BeforeValidator(_decimal)
_SHORT: Final = AfterValidator(_plain)
Price = Annotated[Decimal, _WRITTEN, Field(ge=0, le=10**6, max_digits=19, decimal_places=STORED_SCALE), _SHORT]
"""Currency units; 12 decimals."""
Amount = Annotated[Decimal, _WRITTEN, Field(ge=0, le=10**12, max_digits=25, decimal_places=STORED_SCALE), _SHORT]
"""Currency units of a whole statement; 12 decimals."""
Multiplier = Annotated[Decimal, _WRITTEN, Field(ge=0, le=1_000, max_digits=10, decimal_places=6), _SHORT]
Percent = Annotated[Decimal, _WRITTEN, Field(ge=0, le=100, max_digits=9, decimal_places=6), _SHORT]
Share = Annotated[Decimal, _WRITTEN, Field(ge=0, le=1, max_digits=7, decimal_places=6), _SHORT]
Quantity = Annotated[Decimal, _WRITTEN, Field(gt=0, le=10**12, max_digits=25, decimal_places=STORED_SCALE), _SHORT]
"""In the unit of what is counted: CU, million tokens, requests."""
Moment = Annotated[datetime, BeforeValidator(_dated), AfterValidator(_aware)]
"""A date is midnight UTC."""
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


class Checked(BaseModel):
    """A part of a book: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenPrices(Checked):
    """Per-token prices of a conventional offer, to compare with; never charged."""

    per_million_input_tokens: Price
    """Currency units per 10^6 prompt tokens, cached ones included."""
    per_million_output_tokens: Price


class PriceEntry(Checked):
    """The prices from one moment on. A price that is absent charges nothing and adds no line."""

    effective_from: Moment
    effective_until: Moment | None = None
    """End of these prices (exclusive); without it they hold until the next entry begins."""
    per_compute_unit: Price | None = None
    """Currency units per CU (10^12 executed FLOPs)."""
    per_million_input_tokens: Price | None = None
    """Currency units per 10^6 prompt tokens, cached ones included."""
    per_million_output_tokens: Price | None = None
    per_request: Price | None = None
    tiers: dict[str, Multiplier]
    """Tier name → multiplier of every price in this entry."""
    untiered: Multiplier | None = None
    """The same for a request whose program was named by hand; without it such a request is unrated."""
    token_reference: TokenPrices | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.effective_until is not None and self.effective_until <= self.effective_from:
            raise ValueError(f"effective_until ({self.effective_until}) is not after {self.effective_from}")
        if not any(price is not None for price in self.components.values()):
            raise ValueError(f"has no price; give at least one of {', '.join(self.components)}")
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
        """The factor on all prices for a tier, or None if the entry has no price for it."""
        return self.untiered if tier is None else self.tiers.get(tier)


def timeline(entries: tuple[PriceEntry, ...]) -> tuple[PriceEntry, ...]:
    """Order entries by time, and refuse overlaps (`ValueError`)."""
    ordered = tuple(sorted(entries, key=lambda entry: entry.effective_from))
    for entry, following in pairwise(ordered):
        start = following.effective_from.isoformat()
        if entry.effective_from == following.effective_from:
            raise ValueError(f"two entries are effective from {start}; keep one")
        if entry.effective_until is not None and entry.effective_until > following.effective_from:
            raise ValueError(f"the entry until {entry.effective_until.isoformat()} overlaps the one from {start}")
    return ordered


Timeline = Annotated[tuple[PriceEntry, ...], AfterValidator(timeline)]
"""In order of `effective_from`, whatever the order in the file."""


def entry_at(entries: tuple[PriceEntry, ...], moment: datetime) -> PriceEntry | None:
    """The entry in force at a time of use, or None before the first and in a gap."""
    for entry in reversed(entries):
        if entry.effective_from <= moment:
            ended = entry.effective_until is not None and moment >= entry.effective_until
            return None if ended else entry
    return None


def tier_order(tier: str | None) -> tuple[int, str]:
    """Sort key of a tier: the usual ones from the cheapest up, then others by name, then none."""
    if tier is None:
        return (len(USUAL_TIERS) + 1, "")
    return (USUAL_TIERS.index(tier), "") if tier in USUAL_TIERS else (len(USUAL_TIERS), tier)
