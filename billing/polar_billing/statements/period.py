"""The statements of a period, of one tenant or of all, and their amounts under another price book.

    statements_of_period(ledger, tenant, …)    issued ones unchanged, and drafts if there is none
    reprice(ledger, tenant, period, book)      whole statements under two books, before prepaid credits

Stores and books nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from polar_billing.errors import CurrencyMixError, UnknownTenantError
from polar_billing.ledger.books import books_in_force
from polar_billing.ledger.records import AllTenants, Selection
from polar_billing.ledger.rollups import usage_of
from polar_billing.ledger.schema import rollup_table, statement_table, usage_table
from polar_billing.statements.books import book_for, charging_book
from polar_billing.statements.draft import Basis, compute_statement, draft_statement
from polar_billing.statements.issue import credit_notes, issued_statements
from polar_billing.statements.period_usage import SeqRange, last_seq
from polar_billing.statements.retention import check_kept
from polar_billing.values.money import exact_difference
from polar_sdk.show.progress import silent, through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.issue import CreditNote
    from polar_billing.statements.statement import Statement
    from polar_billing.values.periods import Period
    from polar_sdk.show.progress import Progress


@dataclass(frozen=True)
class StatementOfPeriod:
    """A statement, the book that it charges by, when it was issued, and what was taken off it since."""

    statement: Statement
    book: PriceBook
    issued_at: datetime | None
    """UTC; None for a draft."""
    credit_notes: tuple[CreditNote, ...] = ()


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


def statements_of_period(
    ledger: Ledger, tenant: str | AllTenants, period_of: Callable[[str], Period], *, book: PriceBook | None = None
) -> list[StatementOfPeriod]:
    """List what tenants owe for a period, by name and then by time.

    Where statements were issued whose periods lie within the period, it is those; else it is a draft. A tenant without
    usage, plan and statement in the period is left out.

    Args:
        ledger: Where the usage is.
        tenant: Whose, or `ALL_TENANTS`.
        period_of: A tenant's period, in its own time zone; with both ends.
        book: Charge drafts by this book; by default the one in force for the tenant.

    Raises:
        PeriodError: A period has no beginning or no end, or usage of it was pruned before a statement was issued.
        PriceBookError: It is not clear which book to charge a tenant by.
        UnknownTenantError: The ledger knows nothing of the one tenant.
        StoreError: The ledger cannot be read.
    """
    if not isinstance(tenant, AllTenants):
        return list(_of_tenant(ledger, tenant, period_of(tenant), book))
    with ledger.snapshot() as connection:
        names = known_tenants(connection)
    found: list[StatementOfPeriod] = []
    for name in names:
        try:
            found += (
                one
                for one in _of_tenant(ledger, name, period_of(name), book)
                if one.issued_at is not None or one.statement.requests or one.statement.lines
            )
        except UnknownTenantError:
            continue
    return found


def known_tenants(connection: Connection) -> Sequence[str]:
    """Every tenant with usage, a statement or an entry in a book in force, by name."""
    used = connection.execute(select(rollup_table.c.tenant).distinct()).scalars()
    billed = connection.execute(select(statement_table.c.tenant).distinct()).scalars()
    planned = (customer.tenant for book in books_in_force(connection).values() for customer in book.customers)
    return sorted({*used, *billed, *planned})


def _of_tenant(ledger: Ledger, tenant: str, period: Period, book: PriceBook | None) -> Iterator[StatementOfPeriod]:
    def charged_by(statement: Statement) -> PriceBook:
        with ledger.snapshot() as connection:
            return charging_book(connection, statement)

    within = [issued for issued in issued_statements(ledger, tenant) if issued.statement.period.is_within(period)]
    notes = credit_notes(ledger, tenant) if within else []
    for issued in sorted(within, key=lambda one: one.statement.since):
        off = tuple(note for note in notes if note.statement == issued.statement.id)
        yield StatementOfPeriod(issued.statement, charged_by(issued.statement), issued.issued_at, off)
    if not within:
        draft = draft_statement(ledger, tenant, period, book=book)
        yield StatementOfPeriod(draft, book or charged_by(draft), None)


def reprice(
    ledger: Ledger, tenant: str | AllTenants, period: Period, book: PriceBook, *, progress: Progress = silent
) -> list[Repriced]:
    """Rate a period's usage by another book; both sides are whole statements before prepaid credits.

    Args:
        ledger: Where the usage is.
        tenant: Whose, or `ALL_TENANTS`.
        period: Half-open; needs both ends.
        book: The other book.
        progress: Hears how many tenants are done.

    Returns:
        One row per tenant with usage in the period, by name.

    Raises:
        CurrencyMixError: The other book is in another currency.
        PeriodError: The period has no beginning or no end, or usage of it was pruned.
        PriceBookError: It is not clear which book a tenant was charged by.
    """
    query = select(usage_table.c.tenant).where(*usage_of(Selection(tenant, period)))
    with ledger.snapshot() as connection:
        check_kept(connection, tenant, period)
        names = sorted(connection.execute(query.distinct()).scalars())
        each = through(progress, "tenants", names, len(names))
        return [_reprice(connection, name, period, book) for name in each]


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
        difference=exact_difference(other.total, charged.total, decimals),
        unrated=charged.unrated,
        other_unrated=other.unrated,
    )
