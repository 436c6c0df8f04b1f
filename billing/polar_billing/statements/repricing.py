"""The same usage under another price book: what each tenant's period would come to, and the difference.

Both sides are whole statements before prepaid credits: plans, bands, minimums and discounts of either book count.
Stores nothing.
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
from polar_billing.statements.books import book_for
from polar_billing.statements.facts import Numbers, last_number
from polar_billing.statements.lines import bounds
from polar_billing.statements.make import Wanted, make_statement
from polar_billing.values.money import exact_sum

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.statement import Statement
    from polar_billing.values.periods import Period


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
    """The same for the other book; the two totals are about the same usage only where both are empty."""


def reprice(ledger: Ledger, tenant: str | AllTenants, period: Period, book: PriceBook) -> list[Repriced]:
    """Rate a period's usage by another book.

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
        return [_tenant(connection, name, period, book) for name in _tenants(connection, tenant, period)]


def _tenants(connection: Connection, tenant: str | AllTenants, period: Period) -> list[str]:
    since, until = bounds(period)
    usage = usage_table.c
    query = select(usage.tenant).where(usage.started_at >= since, usage.started_at < until).distinct()
    if not isinstance(tenant, AllTenants):
        query = query.where(usage.tenant == tenant)
    return sorted(connection.execute(query).scalars())


def _tenant(connection: Connection, tenant: str, period: Period, other: PriceBook) -> Repriced:
    numbers = Numbers(last_number(connection, tenant))
    book = book_for(connection, tenant, period, numbers)
    if book.currency != other.currency:
        raise CurrencyMixError(
            f"tenant {tenant!r} was charged in {book.currency}, and price book {other.id!r} is in {other.currency}.",
            hint=f"Name a book in {book.currency}, or rate the usage alone with `polar report --prices FILE`.",
        )
    charged, instead = (_under(connection, tenant, period, one, numbers) for one in (book, other))
    decimals = max(charged.decimals, instead.decimals)
    return Repriced(
        tenant=tenant,
        requests=charged.requests,
        currency=book.currency,
        price_book=book.id,
        charged=charged.total,
        other_price_book=other.id,
        other=instead.total,
        difference=exact_sum((instead.total, charged.total.copy_negate()), decimals),
        unrated=charged.unrated,
        other_unrated=instead.unrated,
    )


def _under(connection: Connection, tenant: str, period: Period, book: PriceBook, numbers: Numbers) -> Statement:
    return make_statement(connection, Wanted(tenant, period, book, numbers.until), [], ())
