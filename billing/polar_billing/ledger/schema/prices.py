"""Which price books were put in force, and when; since version 3.

* `polar_price_in_force`  one row each time a book, or a revision of one, was put in force; the books themselves are in
                          `polar_price_book`, with those that only rated something

Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, ForeignKey, Integer, String, Table

from polar_billing.ledger.schema.base import SERIAL, UtcMicroseconds, append_only, metadata

in_force_table: Final = Table(
    "polar_price_in_force",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("price_book_hash", String(64), ForeignKey("polar_price_book.hash"), nullable=False),
    Column("for_all", Integer, nullable=False),  # 1 = for tenants that no book names as well
    Column("put_at", UtcMicroseconds, nullable=False),
    sqlite_autoincrement=True,
)

append_only(in_force_table, same_row="seq = NEW.seq")
