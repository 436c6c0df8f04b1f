"""The choice of the price book that a statement is computed by.

The revision in force agrees with the earlier ones about the past (see `prices.revisions`), so a statement by it charges
what the receipts say, plus what plans add.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import func, select

from polar_billing.errors import PriceBookError, StoreDamagedError, UnknownTenantError
from polar_billing.ledger.books import books_in_force, read_book
from polar_billing.ledger.schema import price_book_table, receipt_table, usage_table
from polar_billing.prices.revisions import past_changes
from polar_billing.statements.lines import bounds
from polar_billing.statements.period_usage import within
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.period_usage import SeqRange
    from polar_billing.statements.statement import Statement


_INSTANT: Final = timedelta(microseconds=1)
_SECOND_INSTANT: Final = datetime.min.replace(tzinfo=UTC) + _INSTANT


def book_for(connection: Connection, tenant: str, period: Period, seqs: SeqRange) -> PriceBook:
    """The book in force for a tenant and period.

    It is the latest revision of the book that the tenant's receipts were made by, or that has the tenant on a plan;
    that must be one book.

    Raises:
        UnknownTenantError: The ledger knows nothing of the tenant.
        PriceBookError: There are several, or the latest revision contradicts a receipt.
    """
    used = _used(connection, tenant, period, seqs)
    in_force = books_in_force(connection)
    since, until = bounds(period)
    planned = {
        book_id
        for book_id, book in in_force.items()
        for moment in (since, *(entry.effective_from for entry in book.customers_of(tenant)))
        if since <= moment < until and book.plan_at(moment, tenant) is not None
    }
    ids = sorted({book.id for book, _ in used} | planned) or _last_charged_book(connection, tenant)
    if not ids:
        raise UnknownTenantError(f"tenant {tenant!r} has no usage in the ledger and no plan.", hint="Check the name.")
    if len(ids) > 1:
        raise PriceBookError(
            f"price books {' and '.join(map(repr, ids))} have charged tenant {tenant!r} or list it as a customer.",
            hint="Name the one to charge everything by with --book FILE.",
        )
    book = in_force[ids[0]]
    for former, last in used:
        if past_changes(former, book, last):
            raise PriceBookError(
                f"price book {book.id!r} ({book.content_hash[:12]}) changes rates that receipts of tenant {tenant!r} "
                f"were made by ({former.content_hash[:12]}).",
                hint="Name the book to charge by with --book FILE.",
            )
    return book


def charging_book(connection: Connection, statement: Statement) -> PriceBook:
    """The book that a statement charges by, which may not be in force any more.

    Raises:
        StoreDamagedError: It is gone from the ledger.
    """
    book = read_book(connection, statement.price_book_hash)
    if book is None:
        raise StoreDamagedError(
            f"price book {statement.price_book_hash[:12]} of statement {statement.id!r} is not in the ledger.",
            hint="Run `polar verify`.",
        )
    return book


def month_of(ledger: Ledger, tenant: str, month: str, book: PriceBook | None = None) -> Period:
    """The month `YYYY-MM` of a tenant's statements: from the end of the month before to its own.

    Each month ends in the time zone that the tenant has on its last day, by a book or by those in force. So months
    partition time also where the zone changes.
    """
    ends = (max(border, _SECOND_INSTANT) - _INSTANT for border in bounds(Period.month(month)))
    before, zone = (zone_of(ledger, tenant, book, last) for last in ends)
    return Period(Period.month(month, before).since, Period.month(month, zone).until, zone)


def zone_of(ledger: Ledger, tenant: str, book: PriceBook | None = None, at: datetime | None = None) -> str:
    """The time zone of a tenant's statement periods at a moment, now by default: what the book says, or UTC.

    Without a book, it is what the books in force say.
    """
    moment = at or datetime.now(UTC)
    if book is None:
        with ledger.snapshot() as connection:
            books = list(books_in_force(connection).values())
    else:
        books = [book]
    customers = [customer for book in books if (customer := book.customer_at(moment, tenant)) is not None]
    return customers[-1].zone if customers else "UTC"


def _used(connection: Connection, tenant: str, period: Period, seqs: SeqRange) -> list[tuple[PriceBook, datetime]]:
    """The books that the rated receipts of a period were made by, each with the service time of its last use."""
    usage, receipt = usage_table.c, receipt_table.c
    query = (
        select(receipt.price_book_hash, func.max(usage.started_at))
        .join(receipt_table, receipt.usage_seq == usage.seq)
        .where(*within(tenant, *bounds(period), seqs), receipt.cost.is_not(None))
        .group_by(receipt.price_book_hash)
        .order_by(receipt.price_book_hash)
    )
    rows = connection.execute(query).all()
    return [(book, last) for digest, last in rows if (book := read_book(connection, digest)) is not None]


def _last_charged_book(connection: Connection, tenant: str) -> list[str]:
    """The id of the book that the tenant's latest receipt was made by; empty if there is none."""
    usage, receipt = usage_table.c, receipt_table.c
    query = (
        select(price_book_table.c.id)
        .join(receipt_table, receipt.price_book_hash == price_book_table.c.hash)
        .join(usage_table, receipt.usage_seq == usage.seq)
        .where(usage.tenant == tenant)
        .order_by(usage.seq.desc())
        .limit(1)
    )
    return list(connection.execute(query).scalars())
