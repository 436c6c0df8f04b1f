"""Double entry: transactions, each of two or more entries that sum to zero per currency.

An amount is kept as whole currency units and a rest of 10^-12 units, both with the sign of the amount, so
that neither a single entry nor a SUM over many can leave the 64 bits of a column. Balances are not stored;
they are sums over entries. Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, ForeignKey, Index, Integer, String, Table, Text, UniqueConstraint

from polar_billing.ledger.schema.base import SERIAL, UtcMicroseconds, append_only, count, metadata

transaction_table: Final = Table(
    "polar_transaction",
    metadata,
    Column("id", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("kind", String(40), nullable=False),  # why it was booked: statement, payment, hold, …
    Column("reference", String(200), nullable=False),  # the caller's idempotency key within tenant and kind
    Column("effective_at", UtcMicroseconds, nullable=False),  # when it holds: service or statement time
    Column("booked_at", UtcMicroseconds, nullable=False),  # when it was written down
    Column("corrects", SERIAL, ForeignKey("polar_transaction.id")),  # the transaction this one corrects
    Column("note", Text),
    UniqueConstraint("tenant", "kind", "reference", name="polar_transaction_once"),
    sqlite_autoincrement=True,
)

entry_table: Final = Table(
    "polar_entry",
    metadata,
    Column("transaction_id", SERIAL, ForeignKey("polar_transaction.id"), primary_key=True, autoincrement=False),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("tenant", String(200), nullable=False),
    Column("account", String(40), nullable=False),
    Column("currency", String(3), nullable=False),
    count("whole"),  # debit positive, credit negative
    count("rest"),
    Index("polar_entry_by_account", "tenant", "account", "currency"),
)

append_only(
    transaction_table,
    same_row="id = NEW.id OR (tenant = NEW.tenant AND kind = NEW.kind AND reference = NEW.reference)",
)
append_only(entry_table, same_row="transaction_id = NEW.transaction_id AND line = NEW.line")
