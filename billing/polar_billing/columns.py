"""Column types of the ledger: exact on every database, because each is an integer or a text underneath.

`Numeric` on SQLite goes through a binary float and returns other digits than were stored; so amounts are
scaled integers. This module knows no table.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import orjson
from sqlalchemy import BigInteger, Dialect, Text
from sqlalchemy.types import TypeDecorator

from polar_billing.canonical import canonical_json
from polar_billing.money import STORED_SCALE, from_scaled, to_units

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "IntegerList",
    "ScaledDecimal",
    "TextMap",
    "UtcMicroseconds",
    "to_list_text",
    "to_map_text",
    "to_microseconds",
]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
"""Reading multiplies by it; writing counts without it, which is quicker."""


def to_microseconds(value: datetime) -> int:
    """Count the microseconds since 1970-01-01T00:00Z, in integers."""
    since = value - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def to_list_text(value: Sequence[int]) -> str:
    """Write integers as a compact JSON array."""
    return canonical_json(value).decode()


def to_map_text(value: Mapping[str, str]) -> str:
    """Write a mapping as compact JSON with sorted keys."""
    return canonical_json(dict(value)).decode()


class ScaledDecimal(TypeDecorator[Decimal]):
    """A Decimal as an int64 count of 10^-scale; by default the 10^-12 of stored amounts.

    Refuses what it cannot hold exactly: an int64 at scale 12 ends at ±9,223,372.036854775807.
    """

    impl = BigInteger
    cache_ok = True

    def __init__(self, scale: int = STORED_SCALE) -> None:
        super().__init__()
        self.scale = scale

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        """Count the units, or refuse."""
        return None if value is None else to_units(value, self.scale)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        """Give the Decimal back, digit for digit."""
        return None if value is None else from_scaled(value, self.scale)


class UtcMicroseconds(TypeDecorator[datetime]):
    """An aware datetime as an int64 count of microseconds since 1970-01-01T00:00Z; sorts as time does."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Count the microseconds, in integers."""
        return None if value is None else to_microseconds(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Give the UTC datetime back."""
        return None if value is None else _EPOCH + value * _MICROSECOND


class IntegerList(TypeDecorator[tuple[int, ...]]):
    """A tuple of integers as compact JSON text: one number per layer, read back whole."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> str | None:
        """Write the JSON array."""
        return None if value is None else to_list_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[int, ...] | None:
        """Read the JSON array."""
        return None if value is None else tuple(orjson.loads(value))


class TextMap(TypeDecorator["Mapping[str, str]"]):
    """A mapping of strings as JSON text with sorted keys."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, str] | None, dialect: Dialect) -> str | None:
        """Write the JSON object."""
        return None if value is None else to_map_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, str] | None:
        """Read the JSON object."""
        if value is None:
            return None
        found: dict[str, Any] = orjson.loads(value)
        return found
