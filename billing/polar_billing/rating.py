"""Rating: usage record × price book → charge lines. Pure: no clock, no store, no rounding.

Also the two counterfactuals that reports show: the same request at full depth under the same prices, and the
same tokens under conventional per-token prices. Amounts are exact integers of 10^-30 of the currency (see
`money`); whoever prints or stores them rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from polar_billing.money import EXACT_SCALE, STORED_SCALE, RoundedLines, from_scaled, round_lines, to_scaled
from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT, UsageRecord

if TYPE_CHECKING:
    from polar_billing.price_book import PriceBook, PriceEntry

__all__ = ["ChargeLine", "Item", "Rating", "rate"]


@dataclass(frozen=True)
class Item:
    """Something that can be charged for."""

    name: str
    unit: str
    """Unit of the price and of the quantity on paper."""
    decimals: int
    """Counted quantities are integers of 10^-decimals of `unit`: FLOPs of a CU, tokens of a million."""

    def quantity(self, count: int) -> Decimal:
        """A counted quantity in `unit`, exactly."""
        return from_scaled(count, self.decimals)


COMPUTE: Final = Item("compute", "CU", 12)
INPUT_TOKENS: Final = Item("input tokens", "million tokens", 6)
OUTPUT_TOKENS: Final = Item("output tokens", "million tokens", 6)
REQUESTS: Final = Item("requests", "request", 0)

assert 10**COMPUTE.decimals == FLOPS_PER_COMPUTE_UNIT
_UNIT_PRICE_SCALE: Final = STORED_SCALE + 6  # price × multiplier


@dataclass(frozen=True)
class ChargeLine:
    """One charged quantity: `quantity × unit_price = amount`, exactly."""

    item: Item
    count: int
    """Quantity in counted units: FLOPs, tokens or requests."""
    unit_price: Decimal
    """Currency units per `item.unit`, the tier's multiplier included."""

    @property
    def exact(self) -> int:
        """The amount in units of 10^-30 of the currency."""
        price = _unit_price_units(self.unit_price)
        return self.count * price * int(10 ** (EXACT_SCALE - _UNIT_PRICE_SCALE - self.item.decimals))

    @property
    def quantity(self) -> Decimal:
        """The quantity in `item.unit`."""
        return self.item.quantity(self.count)


@dataclass(frozen=True)
class Rating:
    """What one usage record costs under one price book, or why that cannot be said."""

    currency: str
    lines: tuple[ChargeLine, ...] = ()
    full_depth_lines: tuple[ChargeLine, ...] = ()
    """The same request had it run the identity program, under the same prices."""
    per_token_lines: tuple[ChargeLine, ...] | None = None
    """The same tokens under the entry's `token_reference`; None where it has none."""
    unrated: str | None = None
    """Why there is no price; then there are no lines, and the cost is unknown rather than 0."""

    def rounded(self) -> RoundedLines:
        """The lines rounded to the 12 decimals of a receipt, their residue and their total."""
        return round_lines([line.exact for line in self.lines], STORED_SCALE)

    @property
    def cost(self) -> Decimal | None:
        """The cost with 12 decimals, None where unrated. Unit: currency units."""
        return None if self.unrated is not None else self.rounded().total


def rate(record: UsageRecord, book: PriceBook) -> Rating:
    """Price one usage record by the entry in force when it was served.

    Args:
        record: The facts.
        book: The prices.

    Returns:
        Charge lines, or a reason why the use is unrated: no price at that time, or none for that tier.
    """
    entry = book.entry_at(record.started_at)
    if entry is None:
        moment = record.started_at.isoformat(timespec="seconds")
        return Rating(book.currency, unrated=f"price book {book.id!r} has no price at {moment}")
    multiplier = entry.multiplier(record.tier)
    if multiplier is None:
        what = "a program named by hand" if record.tier is None else f"tier {record.tier!r}"
        since = entry.effective_from.date().isoformat()
        return Rating(book.currency, unrated=f"price book {book.id!r} of {since} has no price for {what}")
    if record.outcome in book.free_outcomes:
        return _free(record, entry, book)
    return Rating(
        currency=book.currency,
        lines=_lines(record, record.flops.total, entry, multiplier),
        full_depth_lines=_lines(record, record.identity_flops, entry, multiplier),
        per_token_lines=_per_token(record, entry, Decimal(1)),
    )


def _free(record: UsageRecord, entry: PriceEntry, book: PriceBook) -> Rating:
    """Lines that keep the quantities and charge nothing, here and in both counterfactuals."""
    zero = Decimal(0)
    return Rating(
        currency=book.currency,
        lines=tuple(
            replace(line, item=replace(line.item, name=f"{line.item.name} ({record.outcome}, free)"))
            for line in _lines(record, record.flops.total, entry, zero)
        ),
        per_token_lines=_per_token(record, entry, zero),
    )


def _lines(record: UsageRecord, flops: int, entry: PriceEntry, multiplier: Decimal) -> tuple[ChargeLine, ...]:
    priced = (
        (COMPUTE, flops, entry.per_compute_unit),
        (INPUT_TOKENS, record.tokens.input, entry.per_million_input_tokens),
        (OUTPUT_TOKENS, record.tokens.output, entry.per_million_output_tokens),
        (REQUESTS, 1, entry.per_request),
    )
    return tuple(
        ChargeLine(item, count, _multiply(price, multiplier)) for item, count, price in priced if price is not None
    )


def _per_token(record: UsageRecord, entry: PriceEntry, multiplier: Decimal) -> tuple[ChargeLine, ...] | None:
    reference = entry.token_reference
    if reference is None:
        return None
    priced = (
        (INPUT_TOKENS, record.tokens.input, reference.per_million_input_tokens),
        (OUTPUT_TOKENS, record.tokens.output, reference.per_million_output_tokens),
    )
    return tuple(ChargeLine(item, count, _multiply(price, multiplier)) for item, count, price in priced)


@lru_cache(maxsize=1024)  # a book has few prices, a report many requests
def _multiply(price: Decimal, multiplier: Decimal) -> Decimal:
    """Price × multiplier, exact whatever the decimal context of the thread."""
    scaled = to_scaled(price, STORED_SCALE) * to_scaled(multiplier, 6)
    return from_scaled(scaled, _UNIT_PRICE_SCALE)


@lru_cache(maxsize=1024)
def _unit_price_units(unit_price: Decimal) -> int:
    return to_scaled(unit_price, _UNIT_PRICE_SCALE)
