"""What a period costs by tenant and tier, from sums by hour, so that a busy day takes no longer than a quiet one.

The figures are those of `polar report` for the same period, to the last digit: requests that are charged alike are
added up before they are rated, which changes nothing, since an amount is a quantity times a price, and is rounded once
per line. Where prices change within the period, it is added up in parts. Knows no HTML.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import select

from polar_billing.ledger.books import read_books
from polar_billing.ledger.records import Selection
from polar_billing.ledger.rollups import read_sums
from polar_billing.ledger.schema import price_book_table
from polar_billing.prices.rating import Counts, Rating, rate_counts, rate_of
from polar_billing.reports.report import Summary, summarise
from polar_billing.reports.totals import UsageTotals
from polar_billing.values.periods import Period
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from sqlalchemy import Connection

    from polar_billing.ledger.records import AllTenants
    from polar_billing.ledger.rollups import Sum
    from polar_billing.prices.book import PriceBook

_NOBODY: Final = ""
"""A tenant that no price book names."""


class Charges(NamedTuple):
    """What was used and charged in one currency."""

    currency: str
    summary: Summary


class Books:
    """The price books of a ledger, read once each: a book never changes. For one caller at a time."""

    def __init__(self) -> None:
        self._known: dict[str, PriceBook] = {}
        self._changes: set[datetime] = set()

    def refresh(self, connection: Connection) -> None:
        """Read the books that are new."""
        hashes = set(connection.execute(select(price_book_table.c.hash)).scalars())
        for digest, book in read_books(connection, hashes - self._known.keys()).items():
            self._known[digest] = book
            self._changes.update(book.changes_of(_NOBODY))
            self._changes.update(customer.effective_from for customer in book.customers)

    def __getitem__(self, digest: str) -> PriceBook:
        return self._known[digest]

    def parts(self, period: Period) -> Iterator[Period]:
        """The parts of a period in which no rate of any tenant changes."""
        within = (
            moment
            for moment in self._changes
            if (period.since is None or period.since < moment) and (period.until is None or moment < period.until)
        )
        for since, until in pairwise([period.since, *sorted(within), period.until]):
            yield Period(since, until, period.zone)


def charges_of(connection: Connection, tenant: str | AllTenants, period: Period, books: Books) -> list[Charges]:
    """What a period costs, by currency.

    Args:
        connection: A transaction that sees one state of the ledger.
        tenant: Whose usage, or `ALL_TENANTS`.
        period: With a beginning.
        books: The price books.
    """
    books.refresh(connection)
    groups: defaultdict[str, dict[tuple[str, str | None], UsageTotals]] = defaultdict(dict)
    decimals: defaultdict[str, int] = defaultdict(int)
    for part in books.parts(period):
        assert part.since is not None
        for usage in read_sums(connection, Selection(tenant, part), hourly=False):
            book = books[usage.price_book_hash]
            totals = groups[book.currency].setdefault((usage.tenant, usage.tier), UsageTotals())
            totals.add_rated_sum(usage, _rating(usage, book, part.since))
            decimals[book.currency] = max(decimals[book.currency], book.statement_decimals)
    return [Charges(currency, summarise(groups[currency], decimals[currency])) for currency in sorted(groups)]


def _rating(usage: Sum, book: PriceBook, moment: datetime) -> Rating:
    """The rating of requests that are charged alike, by the book of their receipts."""
    charged_by = usage.unrated or rate_of(book, usage.tenant, usage.tier, moment)
    if isinstance(charged_by, str):
        return Rating(book.currency, unrated=charged_by)
    requests, tokens_input, _, tokens_output, _, flops, identity_flops, _ = usage.quantities
    counts = Counts(requests, flops, tokens_input, tokens_output)
    return rate_counts(counts, identity_flops, Outcome(usage.outcome), charged_by, book)
