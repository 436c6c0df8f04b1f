"""Column types of the ledger: exact on every database, because each is an integer or a text underneath.

`Numeric` on SQLite goes through a binary float and returns other digits than were stored; so amounts are
scaled integers. This module knows no table.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, Dialect, Text
from sqlalchemy.types import TypeDecorator

from polar_billing.errors import AmountError
from polar_billing.money import STORED_SCALE, from_scaled, to_scaled

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["IntegerList", "ScaledDecimal", "TextMap", "UtcMicroseconds"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_INT64_MAX: Final = 2**63 - 1


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
        if value is None:
            return None
        units = to_scaled(value, self.scale)
        if abs(units) > _INT64_MAX:
            limit = from_scaled(_INT64_MAX, self.scale)
            raise AmountError(f"amount {value:f} is beyond the ledger's limit of {limit:f}.", hint="Split it.")
        return units

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        """Give the Decimal back, digit for digit."""
        return None if value is None else from_scaled(value, self.scale)


class UtcMicroseconds(TypeDecorator[datetime]):
    """An aware datetime as an int64 count of microseconds since 1970-01-01T00:00Z; sorts as time does."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Count the microseconds, in integers."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Give the UTC datetime back."""
        return None if value is None else _EPOCH + value * _MICROSECOND


class IntegerList(TypeDecorator[tuple[int, ...]]):
    """A tuple of integers as compact JSON text: one number per layer, read back whole."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> str | None:
        """Write the JSON array."""
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[int, ...] | None:
        """Read the JSON array."""
        return None if value is None else tuple(json.loads(value))


class TextMap(TypeDecorator["Mapping[str, str]"]):
    """A mapping of strings as JSON text with sorted keys."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, str] | None, dialect: Dialect) -> str | None:
        """Write the JSON object."""
        if value is None:
            return None
        return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, str] | None:
        """Read the JSON object."""
        if value is None:
            return None
        found: dict[str, Any] = json.loads(value)
        return found
