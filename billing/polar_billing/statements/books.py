"""Which price book a statement is made by, and how revisions of a book get into the ledger.

Revisions of a book share its id; the one put in force last is in force. It agrees with the earlier ones about
the past (see `pricing.timeline`), so a statement by it charges what the receipts said, plus what plans add.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import func, insert, select

from polar_billing.errors import PriceBookError, QueryError
from polar_billing.ledger import chain
from polar_billing.ledger.books import read_choices, write_choice
from polar_billing.ledger.schema.usage import price_book_table, receipt_table, usage_table
from polar_billing.prices.book import PriceBook
from polar_billing.prices.current import say_changed
from polar_billing.prices.revisions import check_revision, past_changes
from polar_billing.statements.lines import bounds
from polar_billing.statements.usage import within
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.in_force import Choice
    from polar_billing.statements.usage import SeqRange


def add_book(ledger: Ledger, book: PriceBook, *, for_all: bool = False, now: datetime | None = None) -> bool:
    """Put a book, or a revision of one, in force from now on; see `pricing.in_force` for whom it charges.

    Args:
        ledger: Where to.
        book: The book; a revision has the id of the book it follows.
        for_all: Also for tenants that no book names. The first book and its revisions are, until another one is.
        now: The clock's time by default.

    Returns:
        False where it was in force just so already.

    Raises:
        PriceBookError: It changes a rate, term or plan that was in force or rated a use.
        StoreError: It could not be stored.
    """
    moment = now or datetime.now(UTC)
    with ledger.transaction() as connection:
        chain.lock_heads(connection, [chain.NO_TENANT])
        choices = read_choices(connection, {})
        former = books_in_force(connection).get(book.id)
        if former is not None and former.content_hash != book.content_hash:
            check_revision(former, book, now=moment, last_use=_last_use(connection, book.id))
        main = _main(choices)
        for_all = for_all or main in {None, book.id}
        latest = next((one for one in reversed(choices) if one.book.id == book.id), None)
        if latest is not None and latest.book.content_hash == book.content_hash and (main == book.id) == for_all:
            return False
        store_book(connection, book)
        put_at = max([moment, *(one.put_at for one in choices[-1:])])  # the order holds whatever the clock does
        write_choice(connection, book, for_all=for_all, put_at=put_at)
    say_changed()
    return True


def _main(choices: Sequence[Choice]) -> str | None:
    """The id of the book that is in force for all; None where there is no book."""
    return next((one.book.id for one in reversed(choices) if one.for_all), None)


def store_book(connection: Connection, book: PriceBook) -> None:
    """Store a book as it is, unless it is stored already."""
    if book_by_hash(connection, book.content_hash) is None:
        values = {"hash": book.content_hash, "id": book.id, "document": book.document, "stored_at": datetime.now(UTC)}
        connection.execute(insert(price_book_table).values(values))
        chain.link(connection, price_book_table, book.content_hash)


def book_by_hash(connection: Connection, content_hash: str) -> PriceBook | None:
    """A stored book; None where the ledger has none of that content."""
    query = select(price_book_table.c.document).where(price_book_table.c.hash == content_hash)
    document: str | None = connection.execute(query).scalar()
    return None if document is None else PriceBook.from_document(document)


def books_in_force(connection: Connection) -> dict[str, PriceBook]:
    """The revision of every book that is in force, by id: put in force last, or else the last that rated something."""
    stored = price_book_table.c
    rows = connection.execute(select(stored.id, stored.document).order_by(stored.stored_at, stored.hash))
    found = {row.id: PriceBook.from_document(row.document) for row in rows}
    return found | {choice.book.id: choice.book for choice in read_choices(connection, {})}


def book_for(connection: Connection, tenant: str, period: Period, numbers: SeqRange) -> PriceBook:
    """The book in force for a tenant and period.

    It is the latest revision of the book that the tenant's receipts were made by, or that has the tenant on a plan;
    that must be one book.

    Raises:
        QueryError: The ledger knows nothing of the tenant.
        PriceBookError: There are several, or the latest revision contradicts a receipt.
    """
    used = _used(connection, tenant, period, numbers)
    found = books_in_force(connection)
    named = {book_id for book_id, book in found.items() if _is_customer(book, tenant, period)}
    names = sorted({book.id for book, _ in used} | named) or _ever(connection, tenant)
    if not names:
        raise QueryError(f"tenant {tenant!r} has no usage in the ledger and no plan.", hint="Check the name.")
    if len(names) > 1:
        told = " and ".join(repr(name) for name in names)
        raise PriceBookError(
            f"price books {told} have charged tenant {tenant!r} or have it on a plan.",
            hint="Name the one to charge all of it by with --book FILE.",
        )
    book = found[names[0]]
    for former, last in used:
        if past_changes(former, book, last):
            raise PriceBookError(
                f"price book {book.id!r} ({book.content_hash[:12]}) changes rates that receipts of tenant {tenant!r} "
                f"were made by ({former.content_hash[:12]}).",
                hint="Name the book to charge by with --book FILE.",
            )
    return book


def _is_customer(book: PriceBook, tenant: str, period: Period) -> bool:
    """True where the book has the tenant on a plan at some time of the period."""
    since, until = bounds(period)
    begins = (one.effective_from for one in book.customers_of(tenant) if since < one.effective_from < until)
    return any(book.plan_at(moment, tenant) is not None for moment in (since, *begins))


def zone_of(ledger: Ledger, tenant: str, book: PriceBook | None, month: str | None) -> str:
    """The time zone of a tenant's statement periods: what its book says, or UTC.

    Args:
        ledger: Where books in force are looked up.
        tenant: Whose.
        book: The book, where it is named.
        month: The month in question; the zone of its last day holds. None for today.
    """
    moment = datetime.now(UTC) if month is None else bounds(Period.month(month))[1] - timedelta(microseconds=1)
    books = [book]
    if book is None:
        with ledger.snapshot() as connection:
            books = list(books_in_force(connection).values())
    customers = [found for one in books if one is not None and (found := one.customer_at(moment, tenant))]
    return customers[-1].zone if customers else "UTC"


def _used(connection: Connection, tenant: str, period: Period, numbers: SeqRange) -> list[tuple[PriceBook, datetime]]:
    """The books that the rated receipts of a period were made by, each with the service time of its last use."""
    usage, receipt = usage_table.c, receipt_table.c
    query = (
        select(receipt.price_book_hash, func.max(usage.started_at))
        .join(receipt_table, receipt.usage_seq == usage.seq)
        .where(*within(tenant, *bounds(period), numbers), receipt.cost.is_not(None))
        .group_by(receipt.price_book_hash)
        .order_by(receipt.price_book_hash)
    )
    rows = connection.execute(query).all()
    return [(book, last) for digest, last in rows if (book := book_by_hash(connection, digest)) is not None]


def _ever(connection: Connection, tenant: str) -> list[str]:
    """The one book that the tenant's latest receipt was made by."""
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


def _last_use(connection: Connection, book_id: str) -> datetime | None:
    """Service time of the latest use that a revision of a book rated."""
    usage, receipt, stored = usage_table.c, receipt_table.c, price_book_table.c
    query = (
        select(func.max(usage.started_at))
        .join(receipt_table, receipt.usage_seq == usage.seq)
        .join(price_book_table, stored.hash == receipt.price_book_hash)
        .where(stored.id == book_id)
    )
    found: datetime | None = connection.execute(query).scalar()
    return found
