"""Issued statements and credit notes.

* `polar_statement`    one row per tenant, period and currency: what was owed, whole, as canonical JSON, and which
                       usage it is about
* `polar_credit_note`  what was taken off a statement afterwards

The columns beside the document are what the database looks rows up by; `verify` checks them against the document. Knows
no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, ForeignKey, Index, String, Table, Text, UniqueConstraint

from polar_billing.ledger.schema.base import SERIAL, UtcMicroseconds, append_only, metadata

statement_table: Final = Table(
    "polar_statement",
    metadata,
    Column("number", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("since", UtcMicroseconds, nullable=False),
    Column("until", UtcMicroseconds, nullable=False),  # itself excluded
    Column("currency", String(3), nullable=False),
    Column("id", String(40), nullable=False),  # follows from the four columns above
    Column("price_book_hash", String(64), ForeignKey("polar_price_book.hash"), nullable=False),
    Column("seq_until", BigInteger, nullable=False),  # usage up to this seq, included, is on it
    Column("late", Text, nullable=False),  # JSON: [id, seq after, seq until] of each statement that it corrects
    Column("issued_at", UtcMicroseconds, nullable=False),  # statement time
    Column("document", Text, nullable=False),  # canonical JSON
    UniqueConstraint("id", name="polar_statement_once"),
    Index("polar_statement_by_tenant", "tenant", "since"),
    sqlite_autoincrement=True,
)

credit_note_table: Final = Table(
    "polar_credit_note",
    metadata,
    Column("number", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("statement", SERIAL, ForeignKey("polar_statement.number"), nullable=False),
    Column("reference", String(200), nullable=False),  # the caller's idempotency key within the tenant
    Column("amount", Text, nullable=False),  # decimal, positive; in the statement's currency
    Column("reason", Text, nullable=False),
    Column("issued_at", UtcMicroseconds, nullable=False),
    UniqueConstraint("tenant", "reference", name="polar_credit_note_once"),
    Index("polar_credit_note_by_statement", "statement"),
    sqlite_autoincrement=True,
)

append_only(statement_table, same_row="number = NEW.number OR id = NEW.id")
append_only(credit_note_table, same_row="number = NEW.number OR (tenant = NEW.tenant AND reference = NEW.reference)")
