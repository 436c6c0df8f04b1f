"""The field types of price books: exact decimals within limits, and moments with an offset.

Knows no book.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from polar_billing.values.money import STORED_SCALE


def _no_bool(value: object) -> object:
    if isinstance(value, (bool, float)):  # a float would bring binary digits in; TOML numbers arrive as Decimal
        raise ValueError("must be a decimal number")
    return value


def _plain(value: Decimal) -> Decimal:
    """Drop trailing zeros, so that 0.40 and 0.4 are one content and one hash."""
    text = format(value, "f")  # not normalize(), which rounds to the thread's decimal context
    return Decimal(text.rstrip("0").rstrip(".") or "0") if "." in text else value


def _date_is_midnight_utc(value: object) -> object:
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime.combine(value, time(), UTC)
    return value


def _aware(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("needs an offset from UTC, for example 2026-01-01T00:00:00Z")
    return value.astimezone(UTC)


Price = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Field(ge=0, le=1_000_000, max_digits=19, decimal_places=STORED_SCALE),
    AfterValidator(_plain),
]
"""Currency units; 12 decimals."""
Amount = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Field(ge=0, le=10**12, max_digits=25, decimal_places=STORED_SCALE),
    AfterValidator(_plain),
]
"""Currency units of a whole statement; 12 decimals."""
Multiplier = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Field(ge=0, le=1_000, max_digits=10, decimal_places=6),
    AfterValidator(_plain),
]
Percent = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Field(ge=0, le=100, max_digits=9, decimal_places=6),
    AfterValidator(_plain),
]
Share = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Field(ge=0, le=1, max_digits=7, decimal_places=6),
    AfterValidator(_plain),
]
Quantity = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Field(gt=0, le=10**12, max_digits=25, decimal_places=STORED_SCALE),
    AfterValidator(_plain),
]
"""In the unit of what is counted: CU, million tokens, requests."""
Moment = Annotated[datetime, BeforeValidator(_date_is_midnight_utc), AfterValidator(_aware)]
"""A date is midnight UTC."""
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


class Checked(BaseModel):
    """A part of a book: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")
