"""What the same usage comes to under other price books.

    charges_under(ledger, selection, books)    request by request, as receipts are; for `polar report --compare`
    reprice(ledger, tenant, period, book)      as whole statements, with what plans add; for `polar reprice`

Stores nothing and knows no output format.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from polar_billing.errors import CurrencyMixError
from polar_billing.ledger.records import AllTenants
from polar_billing.ledger.schema import usage_table
from polar_billing.reports.bulk import totals_by_tier
from polar_billing.reports.totals import Rater, UsageTotals
from polar_billing.statements.books import book_for
from polar_billing.statements.draft import Basis, compute_statement
from polar_billing.statements.lines import bounds
from polar_billing.statements.usage import SeqRange, last_seq
from polar_billing.values.money import EXACT_SCALE, exact_sum, from_scaled, round_half_even

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.statement import Statement
    from polar_billing.values.periods import Period


class OtherCharge(BaseModel):
    """What some usage comes to under one other price book."""

    model_config = ConfigDict(frozen=True)

    price_book: str
    content_hash: str
    currency: str
    charge: Decimal | None
    """None where the book has a price for none of it. Unit: `currency`."""
    unrated: int
    """Requests that the book has no price for; they are not in the charge."""


class Repriced(BaseModel):
    """One tenant's usage under two books; `difference == other - charged`."""

    model_config = ConfigDict(frozen=True)

    tenant: str
    requests: int
    currency: str
    price_book: str
    charged: Decimal
    """Under the book in force for the tenant, before prepaid credits. Unit: `currency`."""
    other_price_book: str
    other: Decimal
    """Under the other book."""
    difference: Decimal
    unrated: Mapping[str, int]
    """Reason → requests that the book in force has no price for."""
    other_unrated: Mapping[str, int]
    """The same for the other book; the two totals cover the same usage only where both are empty."""


def charges_under(
    ledger: Ledger, selection: Selection, books: Sequence[PriceBook]
) -> dict[str, tuple[OtherCharge, ...]]:
    """What each tenant's usage comes to under each book, in the order of the books."""
    charges: dict[str, list[OtherCharge]] = {}
    for book in books:
        groups = totals_by_tier(ledger, selection, Rater(dict, instead=book))
        for tenant in dict.fromkeys(tenant for tenant, _ in groups):
            tiers = [totals for (name, _), totals in groups.items() if name == tenant]
            charges.setdefault(tenant, []).append(_charge(book, tiers))
    return {tenant: tuple(by_book) for tenant, by_book in charges.items()}


def _charge(book: PriceBook, tiers: Sequence[UsageTotals]) -> OtherCharge:
    decimals = book.statement_decimals
    exact = sum(totals.exact for totals in tiers)
    charge = from_scaled(round_half_even(exact, EXACT_SCALE, decimals), decimals)
    return OtherCharge(
        price_book=book.id,
        content_hash=book.content_hash,
        currency=book.currency,
        charge=charge if any(totals.rated for totals in tiers) else None,
        unrated=sum(totals.unrated.total() for totals in tiers),
    )


def sum_charges(charges: Iterable[tuple[OtherCharge, ...]]) -> tuple[OtherCharge, ...]:
    """The charges of several tenants together, by book."""
    return tuple(_sum(by_tenant) for by_tenant in zip(*charges, strict=True))


def _sum(charges: tuple[OtherCharge, ...]) -> OtherCharge:
    amounts = [charge.charge for charge in charges if charge.charge is not None]
    decimals = max((-int(amount.as_tuple().exponent) for amount in amounts), default=0)
    total = exact_sum(amounts, decimals) if amounts else None
    return charges[0].model_copy(update={"charge": total, "unrated": sum(charge.unrated for charge in charges)})


def reprice(ledger: Ledger, tenant: str | AllTenants, period: Period, book: PriceBook) -> list[Repriced]:
    """Rate a period's usage by another book; both sides are whole statements before prepaid credits.

    Args:
        ledger: Where the usage is.
        tenant: Whose, or `ALL_TENANTS`.
        period: Half-open; needs both ends.
        book: The other book.

    Returns:
        One row per tenant with usage in the period, by name.

    Raises:
        CurrencyMixError: The other book is in another currency.
        PeriodError: The period has no beginning or no end.
        PriceBookError: It is not clear which book a tenant was charged by.
    """
    with ledger.snapshot() as connection:
        return [_reprice(connection, name, period, book) for name in _tenants(connection, tenant, period)]


def _tenants(connection: Connection, tenant: str | AllTenants, period: Period) -> list[str]:
    since, until = bounds(period)
    usage = usage_table.c
    query = select(usage.tenant).where(usage.started_at >= since, usage.started_at < until).distinct()
    if not isinstance(tenant, AllTenants):
        query = query.where(usage.tenant == tenant)
    return sorted(connection.execute(query).scalars())


def _reprice(connection: Connection, tenant: str, period: Period, other_book: PriceBook) -> Repriced:
    seqs = SeqRange(last_seq(connection, tenant))
    book = book_for(connection, tenant, period, seqs)
    if book.currency != other_book.currency:
        raise CurrencyMixError(
            f"tenant {tenant!r} was charged in {book.currency}, and price book {other_book.id!r} is in "
            f"{other_book.currency}.",
            hint=f"Name a book in {book.currency}, or rate the usage alone with `polar report --prices FILE`.",
        )

    def under(rated_by: PriceBook) -> Statement:
        return compute_statement(connection, Basis(tenant, period, rated_by, seqs.until), [], ())

    charged, other = under(book), under(other_book)
    decimals = max(charged.decimals, other.decimals)
    return Repriced(
        tenant=tenant,
        requests=charged.requests,
        currency=book.currency,
        price_book=book.id,
        charged=charged.total,
        other_price_book=other_book.id,
        other=other.total,
        difference=exact_sum((other.total, charged.total.copy_negate()), decimals),
        unrated=charged.unrated,
        other_unrated=other.unrated,
    )
