"""Price books put in force, in the ledger's own table: write one down, read them all.

Takes an open transaction. Knows neither when a book may be put in force (`statements.books`) nor whom it charges
(`pricing.in_force`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import insert, select

from polar_billing.ledger import chain
from polar_billing.ledger.schema import in_force_table, price_book_table
from polar_billing.prices.book import PriceBook
from polar_billing.prices.in_force import Choice

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from datetime import datetime

    from sqlalchemy import Connection


def read_choices(connection: Connection, known: MutableMapping[str, PriceBook]) -> list[Choice]:
    """Every choice, in order.

    Args:
        connection: Any transaction of the ledger.
        known: Books read before, by content hash; gets those that are new.
    """
    rows = connection.execute(select(in_force_table).order_by(in_force_table.c.seq)).all()
    missing = {row.price_book_hash for row in rows} - known.keys()
    if missing:
        stored = price_book_table.c
        query = select(stored.hash, stored.document).where(stored.hash.in_(missing))
        known.update((digest, PriceBook.from_document(text)) for digest, text in connection.execute(query))
    return [Choice(known[row.price_book_hash], bool(row.for_all), row.put_at) for row in rows]


def write_choice(connection: Connection, book: PriceBook, *, for_all: bool, put_at: datetime) -> None:
    """Put a stored book in force."""
    values = {"price_book_hash": book.content_hash, "for_all": int(for_all), "put_at": put_at}
    added = insert(in_force_table).values(values).returning(in_force_table.c.seq)
    chain.link(connection, in_force_table, connection.execute(added).scalar_one())


chain.register_chained(in_force_table)
