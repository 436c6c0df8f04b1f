"""Rating: usage record × price book → charge lines. Pure: no clock, no store, no rounding.

Also the two counterfactuals that reports show: the same request at full depth under the same prices, and the
same tokens under conventional per-token prices. Amounts are exact integers of 10^-30 of the currency (see
`money`); they are rounded once, when printed or stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property, lru_cache
from operator import add, sub
from typing import TYPE_CHECKING, Final

from polar_billing.values.money import (
    EXACT_SCALE,
    STORED_MAX,
    STORED_SCALE,
    RoundedLines,
    from_scaled,
    round_half_even,
    round_lines,
    to_scaled,
)
from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT

if TYPE_CHECKING:
    from datetime import datetime

    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.entries import PriceEntry
    from polar_sdk.usage import Outcome, UsageRecord


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
ITEMS: Final = {
    "compute_units": COMPUTE,
    "million_input_tokens": INPUT_TOKENS,
    "million_output_tokens": OUTPUT_TOKENS,
    "requests": REQUESTS,
}
"""By the key that period prices name them with; in the order of `PriceEntry.components`."""
_MAX_EXACT: Final = STORED_MAX * 10 ** (EXACT_SCALE - STORED_SCALE)
UNIT_PRICE_SCALE: Final = STORED_SCALE + 6
"""Decimals of price × multiplier."""


def product(quantity: Decimal, unit_price: Decimal) -> Decimal:
    """A quantity times a unit price, exactly, whatever the decimal context of the thread."""
    scaled = to_scaled(quantity, UNIT_PRICE_SCALE) * to_scaled(unit_price, UNIT_PRICE_SCALE)
    return from_scaled(scaled, 2 * UNIT_PRICE_SCALE)


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
        return self.count * _exact_per_count(self.unit_price, self.item.decimals)

    @property
    def quantity(self) -> Decimal:
        """The quantity in `item.unit`."""
        return self.item.quantity(self.count)


@dataclass(frozen=True)
class Rating:
    """The cost of one usage record under one price book, or the reason that it has none."""

    currency: str
    lines: tuple[ChargeLine, ...] = ()
    full_depth_lines: tuple[ChargeLine, ...] = ()
    """The same request had it run the identity program, under the same prices."""
    per_token_lines: tuple[ChargeLine, ...] | None = None
    """The same tokens under the entry's `token_reference`; None if it has none."""
    unrated: str | None = None
    """Reason that there is no price; then there are no lines, and the cost is unknown rather than 0."""

    @cached_property
    def rounded(self) -> RoundedLines:
        """The lines rounded to the 12 decimals of a receipt, their residue and their total."""
        return round_lines([line.exact for line in self.lines], STORED_SCALE)

    @property
    def cost(self) -> Decimal | None:
        """The cost with 12 decimals, None where unrated. Unit: currency units."""
        return None if self.unrated is not None else self.rounded.total


FAR: Final = 2**63
"""More than any count of a record."""


@dataclass(frozen=True)
class Counts:
    """Counted quantities of a request, or of many requests at one price."""

    requests: int = 0
    flops: int = 0
    tokens_input: int = 0
    """Prompt tokens, cached ones included."""
    tokens_output: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, vars(self).values(), vars(other).values()))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*map(sub, vars(self).values(), vars(other).values()))

    @property
    def by_item(self) -> dict[str, int]:
        """The counts, by the key that prices name them with."""
        counts = (self.flops, self.tokens_input, self.tokens_output, self.requests)
        return dict(zip(ITEMS, counts, strict=True))


@dataclass(frozen=True)
class Rate:
    """A price entry, and the multiplier of one of its tiers."""

    entry: PriceEntry
    multiplier: Decimal


def rate(record: UsageRecord, book: PriceBook, *, counterfactuals: bool = True) -> Rating:
    """Price one usage record by the entry in force for its tenant when it was served.

    Args:
        record: The facts.
        book: The prices.
        counterfactuals: False to leave them out, because a request waits for its receipt.

    Returns:
        Charge lines, or a reason why the use is unrated: no price at that time, none for that tier, or a cost beyond
        what the ledger holds.
    """
    charged_by = rate_of(book, record.tenant, record.tier, record.started_at)
    if isinstance(charged_by, str):
        return Rating(book.currency, unrated=charged_by)
    counts = Counts(1, charged_flops(record, book), record.tokens.input, record.tokens.output)
    if record.outcome not in book.free_outcomes:
        lines = charge_lines(counts, charged_by.entry, charged_by.multiplier)
        if (beyond := reason_beyond(sum(line.exact for line in lines), book)) is not None:
            return Rating(book.currency, unrated=beyond)
        if not counterfactuals:
            return Rating(book.currency, lines)
    return rate_counts(counts, record.identity_flops, record.outcome, charged_by, book)


def rate_counts(counts: Counts, identity_flops: int, outcome: Outcome, charged_by: Rate, book: PriceBook) -> Rating:
    """Price requests that end alike and are charged alike, all of them within what a receipt holds."""
    entry = charged_by.entry
    if outcome in book.free_outcomes:
        free = free_lines(counts, entry, str(outcome))
        return Rating(book.currency, lines=free, per_token_lines=_per_token(counts, entry, Decimal(0)))
    return Rating(
        currency=book.currency,
        lines=charge_lines(counts, entry, charged_by.multiplier),
        full_depth_lines=charge_lines(replace(counts, flops=identity_flops), entry, charged_by.multiplier),
        per_token_lines=_per_token(counts, entry, Decimal(1)),
    )


def charged_flops(record: UsageRecord, book: PriceBook) -> int:
    """The FLOPs that a book charges of a request: what the answer needed, or all that was executed."""
    return record.flops.executed if book.charge_drafts else record.flops.total


def cost_of(record: UsageRecord, book: PriceBook) -> tuple[Decimal | None, str | None]:
    """`rate(record, book).cost` and `.unrated` without the lines, which storing a record does not need."""
    charged_by = rate_of(book, record.tenant, record.tier, record.started_at)
    if isinstance(charged_by, str):
        return None, charged_by
    exact = 0
    if record.outcome not in book.free_outcomes:
        flops = charged_flops(record, book)
        exact = _exact(charged_by, 1, flops, record.tokens.input, record.tokens.output)
    if (beyond := reason_beyond(exact, book)) is not None:
        return None, beyond
    return from_scaled(round_half_even(exact, EXACT_SCALE, STORED_SCALE), STORED_SCALE), None


def _exact(charged_by: Rate, requests: int, flops: int, tokens_input: int, tokens_output: int) -> int:
    """The cost of some counts, in units of 10^-30."""
    per = _per_count(charged_by.entry.rates, charged_by.multiplier)
    return flops * per[0] + tokens_input * per[1] + tokens_output * per[2] + requests * per[3]


def beyond_receipt(counts: Counts, charged_by: Rate, book: PriceBook) -> str | None:
    """Say why a request with these counts is unrated although it has a price; None if it is rated."""
    return reason_beyond(_exact(charged_by, **vars(counts)), book)


def always_within_receipt(entry: PriceEntry) -> tuple[int, int, int]:
    """FLOPs, prompt tokens and tokens of the answer up to which a request surely costs no more than a receipt holds."""
    most = max(entry.tiers.values(), default=Decimal(0))
    *per, request = _per_count(entry.rates, max(most, entry.untiered or Decimal(0)))
    flops, tokens_input, tokens_output = ((_MAX_EXACT - request) // (3 * each) if each else FAR for each in per)
    return flops, tokens_input, tokens_output


def reason_beyond(exact: int, book: PriceBook) -> str | None:
    """Say why a cost in units of 10^-30 cannot be stored; None if it can."""
    if exact <= _MAX_EXACT:
        return None
    cost = from_scaled(round_half_even(exact, EXACT_SCALE, 0), 0)
    limit = from_scaled(STORED_MAX, STORED_SCALE)
    return f"price book {book.id!r} makes it cost {cost:f} {book.currency}, and a receipt holds at most {limit:f}"


@lru_cache(maxsize=1024)
def _per_count(prices: tuple[Decimal | None, ...], multiplier: Decimal) -> tuple[int, ...]:
    """The cost of one counted unit of each of `ITEMS`, in units of 10^-30."""
    priced = {place: _exact_per_count(price, item.decimals) for place, item, price in _priced(prices, multiplier)}
    return tuple(priced.get(place, 0) for place in range(len(ITEMS)))


def rate_of(book: PriceBook, tenant: str, tier: str | None, moment: datetime) -> Rate | str:
    """Find the rate of a use, or the reason that it is unrated."""
    entry = book.entry_at(moment, tenant)
    if entry is None:
        return f"price book {book.id!r} has no price {_gap(book.entries_at(moment, tenant), moment)}"
    return rate_in(entry, tier, book)


def _gap(entries: tuple[PriceEntry, ...], moment: datetime) -> str:
    """The time around a moment in which no entry is in force, in words; uses within it share one reason."""
    ended = [entry.effective_until for entry in entries if entry.effective_until and entry.effective_until <= moment]
    coming = [entry.effective_from for entry in entries if entry.effective_from > moment]
    since = [f"from {max(ended).isoformat()}"] if ended else []
    until = [f"until {min(coming).isoformat()}"] if coming else []
    return " ".join([*since, *until])


def rate_in(entry: PriceEntry, tier: str | None, book: PriceBook) -> Rate | str:
    """Find the rate of a tier under an entry, or the reason that it is unrated."""
    multiplier = entry.multiplier(tier)
    if multiplier is None:
        what = "a program named by hand" if tier is None else f"tier {tier!r}"
        since = entry.effective_from.date().isoformat()
        return f"price book {book.id!r} of {since} has no price for {what}"
    return Rate(entry, multiplier)


def charge_lines(counts: Counts, entry: PriceEntry, multiplier: Decimal) -> tuple[ChargeLine, ...]:
    """One line for each item that the entry has a price for."""
    quantities = tuple(counts.by_item.values())
    priced = _priced(entry.rates, multiplier)
    return tuple(ChargeLine(item, quantities[place], unit_price) for place, item, unit_price in priced)


@lru_cache(maxsize=1024)  # a book has few prices, a report many requests
def _priced(prices: tuple[Decimal | None, ...], multiplier: Decimal) -> tuple[tuple[int, Item, Decimal], ...]:
    """Place among `ITEMS`, item and unit price of everything that has a price."""
    pairs = enumerate(zip(ITEMS.values(), prices, strict=True))
    return tuple((place, item, multiply(price, multiplier)) for place, (item, price) in pairs if price is not None)


def free_lines(counts: Counts, entry: PriceEntry, outcome: str) -> tuple[ChargeLine, ...]:
    """Lines that keep the quantities and charge nothing."""
    return tuple(
        replace(line, item=replace(line.item, name=f"{line.item.name} ({outcome}, free)"))
        for line in charge_lines(counts, entry, Decimal(0))
    )


def _per_token(counts: Counts, entry: PriceEntry, multiplier: Decimal) -> tuple[ChargeLine, ...] | None:
    reference = entry.token_reference
    if reference is None:
        return None
    priced = (
        (INPUT_TOKENS, counts.tokens_input, reference.per_million_input_tokens),
        (OUTPUT_TOKENS, counts.tokens_output, reference.per_million_output_tokens),
    )
    return tuple(ChargeLine(item, count, multiply(price, multiplier)) for item, count, price in priced)


@lru_cache(maxsize=1024)
def multiply(price: Decimal, multiplier: Decimal) -> Decimal:
    """Price × multiplier, exact whatever the decimal context of the thread."""
    scaled = to_scaled(price, STORED_SCALE) * to_scaled(multiplier, 6)
    return from_scaled(scaled, UNIT_PRICE_SCALE)


@lru_cache(maxsize=1024)
def _exact_per_count(unit_price: Decimal, decimals: int) -> int:
    """The cost of one counted unit, in units of 10^-30."""
    return to_scaled(unit_price, UNIT_PRICE_SCALE) * int(10 ** (EXACT_SCALE - UNIT_PRICE_SCALE - decimals))
