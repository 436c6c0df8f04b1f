"""Price books: dated prices, chosen by the time of use, read from TOML and checked.

A book is never edited in the ledger: every book that rated a request is kept there whole, under the SHA-256
of its content, so a changed file cannot change what was already charged. A use that a book has no price for
is unrated with a reason, never free by accident.

This module knows no usage records (see `rating`) and no database.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from polar_billing.errors import PriceBookError
from polar_billing.money import STORED_SCALE, currency_decimals
from polar_sdk.usage import Outcome

__all__ = ["PRICE_BOOK_VARIABLE", "PriceBook", "PriceEntry", "TokenPrices"]

PRICE_BOOK_VARIABLE: Final = "POLAR_PRICE_BOOK"
EXAMPLE_BOOK: Final = "example_prices.toml"
_MOST_PROBLEMS: Final = 3


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
Multiplier = Annotated[
    Decimal,
    BeforeValidator(_no_bool),
    Field(ge=0, le=1_000, max_digits=10, decimal_places=6),
    AfterValidator(_plain),
]
Moment = Annotated[datetime, BeforeValidator(_date_is_midnight_utc), AfterValidator(_aware)]


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenPrices(_Checked):
    """Per-token prices of a conventional offer, to compare with; never charged."""

    per_million_input_tokens: Price
    """Currency units per 10^6 prompt tokens, cached ones included."""
    per_million_output_tokens: Price


class PriceEntry(_Checked):
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
        return {
            "per_compute_unit": self.per_compute_unit,
            "per_million_input_tokens": self.per_million_input_tokens,
            "per_million_output_tokens": self.per_million_output_tokens,
            "per_request": self.per_request,
        }

    def multiplier(self, tier: str | None) -> Decimal | None:
        """What prices are multiplied by for a tier, or None where the entry has no price for it."""
        return self.untiered if tier is None else self.tiers.get(tier)


class PriceBook(_Checked):
    """Dated prices in one currency."""

    id: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
    """ISO 4217 code."""
    decimals: Annotated[int, Field(strict=True, ge=0, le=STORED_SCALE)] | None = None
    """Decimals a statement line is rounded to; by default those of the currency's minor unit."""
    free_outcomes: frozenset[Outcome] = frozenset()
    """Outcomes that are metered but charged at 0, for example `error`."""
    prices: Annotated[tuple[PriceEntry, ...], Field(min_length=1)]
    """In order of `effective_from`, whatever the order in the file."""

    @field_validator("prices")
    @classmethod
    def _one_price_at_a_time(cls, entries: tuple[PriceEntry, ...]) -> tuple[PriceEntry, ...]:
        ordered = tuple(sorted(entries, key=lambda entry: entry.effective_from))
        for one, following in pairwise(ordered):
            start = following.effective_from.isoformat()
            if one.effective_from == following.effective_from:
                raise ValueError(f"two entries are effective from {start}; keep one")
            if one.effective_until is not None and one.effective_until > following.effective_from:
                raise ValueError(f"the entry until {one.effective_until.isoformat()} overlaps the one from {start}")
        return ordered

    @field_serializer("free_outcomes")
    def _sorted(self, outcomes: frozenset[Outcome]) -> list[str]:
        return sorted(outcomes)

    @property
    def statement_decimals(self) -> int:
        """Decimals of a statement line: those of the book, or of its currency."""
        return currency_decimals(self.currency) if self.decimals is None else self.decimals

    @cached_property
    def document(self) -> str:
        """The content as canonical JSON; what the ledger keeps and the hash covers."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the content, hexadecimal; comments and order in the file do not matter."""
        return hashlib.sha256(self.document.encode()).hexdigest()

    def entry_at(self, moment: datetime) -> PriceEntry | None:
        """The entry in force at a time of use, or None before the first and in a gap."""
        for entry in reversed(self.prices):
            if entry.effective_from <= moment:
                ended = entry.effective_until is not None and moment >= entry.effective_until
                return None if ended else entry
        return None

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """Read a price book.

        Args:
            path: A TOML file; None for the file of `POLAR_PRICE_BOOK`, or else the example of the package.

        Raises:
            PriceBookError: The file is missing or wrong; the message names file, key and value.
        """
        if path is None:
            path = os.environ.get(PRICE_BOOK_VARIABLE) or None
        if path is None:
            return cls.example()
        file = Path(path).expanduser()
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise PriceBookError(
                f"price book {str(file)!r} cannot be read ({reason}).",
                hint=f"Name a TOML file with --prices or {PRICE_BOOK_VARIABLE}.",
            ) from error
        return cls.from_toml(text, name=str(file))

    @classmethod
    def example(cls) -> Self:
        """The book shipped with the package; its prices are examples, not advice."""
        text = resources.files("polar_billing").joinpath(EXAMPLE_BOOK).read_text(encoding="utf-8")
        return cls.from_toml(text, name=EXAMPLE_BOOK)

    @classmethod
    def from_toml(cls, text: str, *, name: str = "<text>") -> Self:
        """Read a price book from TOML text; `name` stands for the file in messages."""
        try:
            return cls.model_validate(tomllib.loads(text, parse_float=Decimal))
        except tomllib.TOMLDecodeError as error:
            raise PriceBookError(f"price book {name!r} is not valid TOML: {error}.") from error
        except ValidationError as error:
            raise PriceBookError(f"price book {name!r}: {_problems(error)}") from error

    @classmethod
    def from_document(cls, document: str) -> Self:
        """Read a book back from the canonical JSON that the ledger keeps."""
        return cls.model_validate_json(document)


def _problems(error: ValidationError) -> str:
    """Say on one line which keys are wrong, with what value and why."""
    found = error.errors(include_url=False)
    told = "; ".join(_problem(dict(problem)) for problem in found[:_MOST_PROBLEMS])
    more = len(found) - _MOST_PROBLEMS
    return f"{told}; and {more} more." if more > 0 else f"{told}."


def _problem(problem: dict[str, Any]) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    reason = str(problem["msg"]).removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    value = problem["input"]
    if isinstance(value, (dict, list, tuple)):
        return f"{key}: {reason}" if key else reason
    return f"{key} = {str(value)!r}: {reason}"
