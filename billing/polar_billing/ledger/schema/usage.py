"""Facts and receipts: the tables of schema version 1.

* `polar_schema`      which versions of these tables the database has had
* `polar_price_book`  every price book that ever rated a request, whole, by content hash
* `polar_usage`       one row per request: facts only, no prices
* `polar_receipt`     what the caller was told a request costs, and by which book
* `polar_probe`       always empty; `check` inserts here and rolls back

Facts and money are separate tables on purpose: usage can be rated again under another book, while a receipt
stays what it was. Names carry a prefix, so the ledger may live in an application's own database. Knows no
connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from polar_billing.ledger.schema.base import (
    SERIAL,
    IntegerList,
    ScaledDecimal,
    TextMap,
    UtcMicroseconds,
    append_only,
    count,
    metadata,
)

version_table: Final = Table(
    "polar_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("applied_at", UtcMicroseconds, nullable=False),
)

price_book_table: Final = Table(
    "polar_price_book",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("id", String(100), nullable=False),
    Column("document", Text, nullable=False),  # canonical JSON; SHA-256 of it is the key
    Column("stored_at", UtcMicroseconds, nullable=False),
)

usage_table: Final = Table(
    "polar_usage",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("source", String(200), nullable=False),  # which meter; request ids are unique within it
    Column("request_id", String(200), nullable=False),
    Column("content_hash", String(64), nullable=False),  # tells an identical replay from a conflict
    Column("record_version", Integer, nullable=False),
    Column("started_at", UtcMicroseconds, nullable=False),  # service time
    Column("stored_at", UtcMicroseconds, nullable=False),  # stored time
    Column("tags", TextMap, nullable=False),
    Column("model", String(200), nullable=False),
    Column("model_fingerprint", String(200), nullable=False),
    Column("router", String(200), nullable=False),
    Column("router_version", String(200), nullable=False),
    Column("tier", String(200)),
    Column("program", Text, nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("finish_reason", String(20), nullable=False),
    Column("error", Text),
    count("tokens_input"),
    count("tokens_cached"),
    count("tokens_output"),
    Column("visits_prefill", IntegerList, nullable=False),
    Column("visits_decode", IntegerList, nullable=False),
    count("flops_embed"),
    count("flops_layers_prefill"),
    count("flops_layers_decode"),
    count("flops_head"),
    count("flops_router"),
    count("flops_total"),
    Column("flops_formula", String(50), nullable=False),
    count("identity_flops"),
    count("kv_bytes_peak"),
    Column("device", Text, nullable=False),
    Column("dtype", Text, nullable=False),
    count("queue_ns"),
    count("prefill_ns"),
    count("decode_ns"),
    Column("loops_stopped", BigInteger, nullable=False, server_default="0"),  # since version 2
    UniqueConstraint("tenant", "source", "request_id", name="polar_usage_once"),
    Index("polar_usage_by_tenant", "tenant", "started_at"),
    Index("polar_usage_by_time", "started_at"),
    sqlite_autoincrement=True,  # a number is never given twice
)

receipt_table: Final = Table(
    "polar_receipt",
    metadata,
    Column("usage_seq", SERIAL, primary_key=True, autoincrement=False),  # of polar_usage
    Column("price_book_hash", String(64), nullable=False),
    Column("cost", ScaledDecimal()),  # null where unrated
    Column("unrated", Text),
    # On PostgreSQL these two would cost a tenth of storing a request. One transaction writes a receipt with its usage
    # and its book, none of the three can go, and `verify` looks for receipts without either.
    ForeignKeyConstraint(["usage_seq"], ["polar_usage.seq"]).ddl_if(dialect="sqlite"),
    ForeignKeyConstraint(["price_book_hash"], ["polar_price_book.hash"]).ddl_if(dialect="sqlite"),
)

probe_table: Final = Table("polar_probe", metadata, Column("payload", Text, nullable=False))

append_only(version_table, same_row="version = NEW.version")
append_only(price_book_table, same_row="hash = NEW.hash")
append_only(
    usage_table,
    same_row="seq = NEW.seq OR (tenant = NEW.tenant AND source = NEW.source AND request_id = NEW.request_id)",
    deletable_if="EXISTS (SELECT 1 FROM polar_pruned WHERE polar_pruned.seq = OLD.seq)",
)
append_only(
    receipt_table,
    same_row="usage_seq = NEW.usage_seq",
    deletable_if="EXISTS (SELECT 1 FROM polar_pruned WHERE polar_pruned.seq = OLD.usage_seq)",
)
