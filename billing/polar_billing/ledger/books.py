"""Price books in the ledger: stored whole under the hash of their content, and put in force.

Revisions of a book share its id; the one put in force last is in force. All reading and writing of these rows is here,
and takes an open transaction; `add_book` opens its own. Knows no usage but the time of the last use of a book, and not
whom a book charges (`prices.in_force`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from sqlalchemy import func, insert, select

from polar_billing.ledger import chain
from polar_billing.ledger.append import store_books
from polar_billing.ledger.schema import NO_TENANT, in_force_table, price_book_table, receipt_table, usage_table
from polar_billing.prices.book import PriceBook
from polar_billing.prices.in_force import Choice, say_changed
from polar_billing.prices.revisions import check_revision

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection


class _Ledger(Protocol):
    def transaction(self) -> AbstractContextManager[Connection]: ...


def add_book(ledger: _Ledger, book: PriceBook, *, for_all: bool = False, now: datetime | None = None) -> bool:
    """Put a book, or a revision of one, in force from now on; see `prices.in_force` for whom it charges.

    Args:
        ledger: The `Ledger` in which to put it in force.
        book: The book; a revision has the id of the book it follows.
        for_all: Also for tenants that no book names. The first book and its revisions are, until another one is.
        now: The clock's time by default.

    Returns:
        False if it was already in force in the same way.

    Raises:
        PriceBookError: It changes a rate, term or plan that was in force or rated a use, or it can charge nothing.
        StoreError: It could not be stored.
    """
    moment = now or datetime.now(UTC)
    with ledger.transaction() as connection:
        chain.lock_heads(connection, [NO_TENANT])
        choices = read_choices(connection, {})
        former = books_in_force(connection).get(book.id)
        if former is None or former.content_hash != book.content_hash:
            book.check_rates()
        if former is not None and former.content_hash != book.content_hash:
            check_revision(former, book, now=moment, last_use=_last_use(connection, book.id))
        main = next((choice.book.id for choice in reversed(choices) if choice.for_all), None)
        for_all = for_all or main in {None, book.id}
        latest = next((choice for choice in reversed(choices) if choice.book.id == book.id), None)
        if latest is not None and latest.book.content_hash == book.content_hash and (main == book.id) == for_all:
            return False
        store_books(connection, {book.content_hash: book})
        put_at = max([moment, *(choice.put_at for choice in choices[-1:])])  # the order holds whatever the clock does
        values = {"price_book_hash": book.content_hash, "for_all": int(for_all), "put_at": put_at}
        added = insert(in_force_table).values(values).returning(in_force_table.c.seq)
        chain.link(connection, in_force_table, connection.execute(added).scalar_one())
    say_changed()
    return True


def read_choices(connection: Connection, known: MutableMapping[str, PriceBook]) -> list[Choice]:
    """Every choice, in order; books read before are `known` by content hash, and those that are new are added."""
    rows = connection.execute(select(in_force_table).order_by(in_force_table.c.seq)).all()
    missing = {row.price_book_hash for row in rows} - known.keys()
    if missing:
        known.update(read_books(connection, missing))
    return [Choice(known[row.price_book_hash], bool(row.for_all), row.put_at) for row in rows]


def read_books(connection: Connection, hashes: Iterable[str] | None = None) -> dict[str, PriceBook]:
    """Stored books by content hash: those of the given hashes that there are, or all, in the order they were stored."""
    stored = price_book_table.c
    query = select(stored.hash, stored.document).order_by(stored.stored_at, stored.hash)
    if hashes is not None:
        query = query.where(stored.hash.in_(list(hashes)))
    return {digest: PriceBook.from_document(document) for digest, document in connection.execute(query)}


def read_book(connection: Connection, content_hash: str) -> PriceBook | None:
    """A stored book; None if the ledger has none under that hash."""
    return read_books(connection, [content_hash]).get(content_hash)


def books_in_force(connection: Connection) -> dict[str, PriceBook]:
    """The revision of every book that is in force, by id: put in force last, or else the last that rated something."""
    stored = {book.id: book for book in read_books(connection).values()}
    return stored | {choice.book.id: choice.book for choice in read_choices(connection, {})}


def _last_use(connection: Connection, book_id: str) -> datetime | None:
    """Service time of the latest use that a revision of a book rated."""
    usage, receipt, stored = usage_table.c, receipt_table.c, price_book_table.c
    query = (
        select(func.max(usage.started_at))
        .join(receipt_table, receipt.usage_seq == usage.seq)
        .join(price_book_table, stored.hash == receipt.price_book_hash)
        .where(stored.id == book_id)
    )
    last: datetime | None = connection.execute(query).scalar()
    return last
