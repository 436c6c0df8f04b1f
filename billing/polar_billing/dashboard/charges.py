"""Charges of a period by tenant and tier, from sums by hour: a busy day takes no longer than a quiet one.

The figures are those of `polar report` for the same period, to the last digit: requests that are charged alike are
added up before they are rated, which changes nothing, since an amount is a quantity times a price, and is rounded once
per line. If prices change within the period, it is added up in parts. A tenant whose sums have not changed is not
computed again. Knows no HTML.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import func, select

from polar_billing.ledger.books import read_books
from polar_billing.ledger.records import Selection, in_span
from polar_billing.ledger.rollups import joined_sum, read_sums, split_sum
from polar_billing.ledger.schema import price_book_table, receipt_table, usage_table
from polar_billing.prices.rating import Counts, Rating, rate_counts, rate_of
from polar_billing.reports.summary import Summary, TenantReport, summarise, tenants_of
from polar_billing.reports.totals import UsageTotals
from polar_billing.values.periods import Period
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from datetime import datetime

    from sqlalchemy import Connection

    from polar_billing.ledger.records import AllTenants
    from polar_billing.ledger.rollups import Sum
    from polar_billing.prices.book import PriceBook

_NOBODY: Final = ""
"""A tenant that no price book names."""


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
            self._changes.update(book.changes())

    def __getitem__(self, digest: str) -> PriceBook:
        return self._known[digest]

    def parts(self, period: Period) -> Iterator[Period]:
        """The parts of a period in which no rate of any tenant changes."""
        within = sorted(moment for moment in self._changes if period.contains(moment) and moment != period.since)
        for since, until in pairwise([period.since, *within, period.until]):
            yield Period(since, until, period.zone)


class _Use(NamedTuple):
    """Requests that are charged alike."""

    since: datetime
    """From when on, which says what they are charged by."""
    drafts: int
    """FLOPs of drafts that are charged beside those of the sum."""
    usage: Sum


class _Tenant(NamedTuple):
    """One tenant's sums and what follows from them."""

    sums: tuple[Hashable, ...]
    """All that it follows from."""
    tiers: dict[str | None, UsageTotals]
    report: TenantReport


class Cost:
    """Works out charges of periods. For one caller at a time."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._known: dict[tuple[str, str], _Tenant] = {}
        """By currency and tenant, of the last look."""

    def of(self, connection: Connection, tenant: str | AllTenants, period: Period) -> list[Summary]:
        """Sum up the charges of a period that has a beginning, by currency."""
        self._books.refresh(connection)
        sums: defaultdict[str, defaultdict[str, list[_Use]]] = defaultdict(lambda: defaultdict(list))
        decimals: defaultdict[str, int] = defaultdict(int)
        for part in self._books.parts(period):
            assert part.since is not None
            for usage in read_sums(connection, Selection(tenant, part), hourly=False):
                book = self._books[usage.price_book_hash]
                drafts = _drafts(connection, usage, part) if book.charge_drafts else 0
                sums[book.currency][usage.tenant].append(_Use(part.since, drafts, usage))
                decimals[book.currency] = max(decimals[book.currency], book.statement_decimals)
        known = {
            (currency, name): self._tenant((currency, name), members, decimals[currency])
            for currency, by_tenant in sums.items()
            for name, members in by_tenant.items()
        }
        self._known = known
        return [
            _together(currency, [known[currency, name] for name in sorted(sums[currency])], decimals[currency])
            for currency in sorted(sums)
        ]

    def _tenant(self, key: tuple[str, str], uses: list[_Use], decimals: int) -> _Tenant:
        sums = (decimals, *map(_content, uses))
        known = self._known.get(key)
        if known is not None and known.sums == sums:
            return known
        tiers: dict[str | None, UsageTotals] = {}
        for since, drafts, usage in uses:
            totals = tiers.setdefault(usage.tier, UsageTotals())
            totals.add_rated_sum(usage, _rating(usage, self._books[usage.price_book_hash], since, drafts))
        _, name = key
        (report,) = tenants_of({(name, tier): totals for tier, totals in tiers.items()}, decimals)
        return _Tenant(sums, tiers, report)


def _content(use: _Use) -> tuple[Hashable, ...]:
    """A key that differs for uses that differ."""
    usage = use.usage
    what = (usage.tier, usage.model, usage.source, usage.outcome, usage.price_book_hash, usage.unrated)
    return (use.since, use.drafts, *what, *usage.quantities)


def _together(currency: str, tenants: Sequence[_Tenant], decimals: int) -> Summary:
    """Sum tenants up; what they used is added up by tier first, since there may be many of them."""
    by_tier: defaultdict[tuple[str, str | None], UsageTotals] = defaultdict(UsageTotals)
    for tenant in tenants:
        for tier, totals in tenant.tiers.items():
            by_tier[_NOBODY, tier].merge_sums(totals, decimals)
    return summarise([tenant.report for tenant in tenants], by_tier, currency, decimals)


def _drafts(connection: Connection, usage: Sum, part: Period) -> int:
    """FLOPs that drafts of these requests executed, which the sums leave out. Those of pruned usage are not known."""
    columns, receipt = usage_table.c, receipt_table.c
    query = (
        select(*split_sum(func.coalesce(columns.flops_drafts, 0)))
        .join_from(usage_table, receipt_table, receipt.usage_seq == columns.seq)
        .where(
            columns.tenant == usage.tenant,
            columns.tier.is_(None) if usage.tier is None else columns.tier == usage.tier,
            columns.model == usage.model,
            columns.source == usage.source,
            columns.outcome == usage.outcome,
            receipt.price_book_hash == usage.price_book_hash,
            receipt.unrated.is_(None) if usage.unrated is None else receipt.unrated == usage.unrated,
            columns.flops_drafts.is_not(None),
            *in_span(columns.started_at, *part.ends),
        )
    )
    return joined_sum(*connection.execute(query).one())


def _rating(usage: Sum, book: PriceBook, moment: datetime, drafts: int) -> Rating:
    """The rating of requests that are charged alike, by the book of their receipts; it charges drafts besides."""
    charged_by = usage.unrated or rate_of(book, usage.tenant, usage.tier, moment)
    if isinstance(charged_by, str):
        return Rating(book.currency, unrated=charged_by)
    requests, tokens_input, _, tokens_output, _, flops, identity_flops, _ = usage.quantities
    counts = Counts(requests, flops + drafts, tokens_input, tokens_output)
    return rate_counts(counts, identity_flops, Outcome(usage.outcome), charged_by, book)
