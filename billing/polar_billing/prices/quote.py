"""`quote`: the maximum a request can cost, before it runs. Pure: no clock, no store.

The bound is exact: prices are not negative, so a request costs most when it executes every FLOP and samples every token
it may, and rounding half to even keeps that order. A request within the bounds is rated (see `rating.rate`) at `amount`
or less, and at `amount` if it uses them up. It bounds the receipt; fees, bands, minimums and credits of a plan belong
to a statement period, not to a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polar_billing.errors import AmountError
from polar_billing.prices.rating import ChargeLine, Counts, Rating, charge_lines, rate_of, reason_beyond

if TYPE_CHECKING:
    from datetime import datetime
    from decimal import Decimal

    from polar_billing.prices.book import PriceBook
    from polar_sdk.usage import UsageBound


@dataclass(frozen=True)
class Quote:
    """The maximum a request can cost under a price book, or why that cannot be said."""

    currency: str
    amount: Decimal | None
    """12 decimals; None if the use would be unrated. Unit: currency units."""
    lines: tuple[ChargeLine, ...] = ()
    unrated: str | None = None


def quote_offers(book: PriceBook, bound: UsageBound) -> list[Quote]:
    """Quote a request served by each of its offers."""
    tokens = (bound.tokens_input, bound.tokens_output_max)
    return [
        quote(
            book,
            bound.tenant,
            offer.tier,
            offer.flops_bound + offer.drafts_bound * book.charge_drafts,
            *tokens,
            bound.at,
        )
        for offer in bound.offers
    ]


def quote(
    book: PriceBook,
    tenant: str,
    tier: str | None,
    flops_bound: int,
    tokens_input: int,
    tokens_output: int,
    at: datetime,
    *,
    until: datetime | None = None,
) -> Quote:
    """Bound what a request can cost before it runs.

    Args:
        book: The prices.
        tenant: The tenant; its plan may have its own rates.
        tier: The requested tier, None for a program named by hand.
        flops_bound: Maximum FLOPs it can be charged: all tokens through the most expensive allowed program, the router
            included; for a book with `charge_drafts`, those of drafts as well.
        tokens_input: Prompt tokens.
        tokens_output: Maximum number of tokens it may sample.
        at: When the request will be served. Aware.
        until: If it may be served as late as this: the most expensive rates in force from `at` to then, both included,
            count. One moment without a price in between makes it unrated.

    Returns:
        The bound; `amount` is None if the book has no price for such a use.

    Raises:
        AmountError: A bound is negative.
    """
    for name, count in (("flops_bound", flops_bound), ("tokens_input", tokens_input), ("tokens_output", tokens_output)):
        if count < 0:
            raise AmountError(f"{name} ({count}) is negative.", hint="Give the maximum that the request can use.")
    counts = Counts(1, flops_bound, tokens_input, tokens_output)
    changes = [] if until is None else [moment for moment in book.changes_of(tenant) if at < moment <= until]
    highest, most = Rating(book.currency), -1
    for moment in (at, *changes):
        rate = rate_of(book, tenant, tier, moment)
        if isinstance(rate, str):
            return Quote(book.currency, None, unrated=rate)
        lines = charge_lines(counts, rate.entry, rate.multiplier)
        exact = sum(line.exact for line in lines)
        if (beyond := reason_beyond(exact, book)) is not None:
            return Quote(book.currency, None, unrated=beyond)
        if exact > most:
            highest, most = Rating(book.currency, lines), exact
    return Quote(book.currency, highest.cost, highest.lines)
