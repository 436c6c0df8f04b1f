"""The hash chain, double entry, issued statements and credit notes.

* `polar_chain_link`  one link per chained row, numbered per tenant: what it stands for (table and key), digest of that
                      row, previous hash, own hash
* `polar_chain_head`  the last number and hash of each tenant; it moves forward only
* `polar_transaction` one row per transaction, of two or more entries that sum to zero per currency
* `polar_entry`       one row per entry
* `polar_statement`   one row per tenant, period and currency: what was owed, whole, as canonical JSON, and which usage
                      it is about. The columns beside the document are what rows are looked up by; `verify` checks them
* `polar_credit_note` what was taken off a statement afterwards

A link outlives its row: retention deletes rows and keeps links. The tenant of rows that belong to no tenant, such as
price books, is the empty text. `polar_billing.ledger.chain` defines how hashes are computed.

An amount is kept as whole currency units and a rest of 10^-12 units, both with the sign of the amount, so that neither
a single entry nor a SUM over many can leave the 64 bits of a column. Balances are not stored; they are sums over
entries. Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from polar_billing.ledger.schema.base import (
    SERIAL,
    UtcMicroseconds,
    append_only,
    count,
    metadata,
    refuse_going_back,
)

link_table: Final = Table(
    "polar_chain_link",
    metadata,
    Column("tenant", String(200), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # 1, 2, 3 … within the tenant
    Column("subject", String(40), nullable=False),  # the table of the row, without its prefix
    Column("key", String(100), nullable=False),  # its primary key, as text
    Column("digest", LargeBinary(32), nullable=False),
    Column("previous", LargeBinary(32), nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    Index("polar_chain_link_once", "subject", "key", unique=True),
    sqlite_with_rowid=False,  # kept in order of the chain, without a second index
)

head_table: Final = Table(
    "polar_chain_head",
    metadata,
    Column("tenant", String(200), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
)

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
    Column("audits_until", BigInteger, nullable=False),  # audits up to this seq, included, settle its promises
    Column("late", Text, nullable=False),  # JSON: [id, seq after, until, audits after, until] of each it corrects
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

append_only(link_table, same_row=None)  # a link put in another's place breaks the chain, which `verify` finds
refuse_going_back(head_table, "number")
append_only(
    transaction_table,
    same_row="id = NEW.id OR (tenant = NEW.tenant AND kind = NEW.kind AND reference = NEW.reference)",
)
append_only(entry_table, same_row="transaction_id = NEW.transaction_id AND line = NEW.line")
append_only(statement_table, same_row="number = NEW.number OR id = NEW.id")
append_only(credit_note_table, same_row="number = NEW.number OR (tenant = NEW.tenant AND reference = NEW.reference)")
