"""The ledger's tables, version 1, and the triggers that make them append-only.

* `polar_schema`      which version of these tables the database holds
* `polar_price_book`  every price book that ever rated a request, whole, by content hash
* `polar_usage`       one row per request: facts only, no prices
* `polar_receipt`     what the caller was told a request costs, and by which book
* `polar_probe`       always empty; `check` inserts here and rolls back

Facts and money are separate tables on purpose: usage can be rated again under another book, while a receipt
stays what it was. Corrections, holds, statements and a hash chain are to come as further tables that refer to
`polar_usage.seq`; nothing here has to change for them. Names carry a prefix, so the ledger may live in an
application's own database.

This module knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
)

from polar_billing.columns import IntegerList, ScaledDecimal, TextMap, UtcMicroseconds

__all__ = [
    "SCHEMA_VERSION",
    "metadata",
    "price_book_table",
    "probe_table",
    "receipt_table",
    "usage_table",
    "version_table",
]

SCHEMA_VERSION: Final = 1

metadata: Final = MetaData()

# SQLite numbers rows by itself only in a column declared INTEGER, which is 64 bits wide there.
_Serial: Final = BigInteger().with_variant(Integer, "sqlite")


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


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
    Column("seq", _Serial, primary_key=True),
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
    _count("tokens_input"),
    _count("tokens_cached"),
    _count("tokens_output"),
    Column("visits_prefill", IntegerList, nullable=False),
    Column("visits_decode", IntegerList, nullable=False),
    _count("flops_embed"),
    _count("flops_layers_prefill"),
    _count("flops_layers_decode"),
    _count("flops_head"),
    _count("flops_router"),
    _count("flops_total"),
    Column("flops_formula", String(50), nullable=False),
    _count("identity_flops"),
    _count("kv_bytes_peak"),
    Column("device", Text, nullable=False),
    Column("dtype", Text, nullable=False),
    _count("queue_ns"),
    _count("prefill_ns"),
    _count("decode_ns"),
    UniqueConstraint("tenant", "source", "request_id", name="polar_usage_once"),
    Index("polar_usage_by_tenant", "tenant", "started_at"),
    Index("polar_usage_by_time", "started_at"),
    sqlite_autoincrement=True,  # a number is never given twice
)

receipt_table: Final = Table(
    "polar_receipt",
    metadata,
    Column("usage_seq", _Serial, ForeignKey("polar_usage.seq"), primary_key=True, autoincrement=False),
    Column("price_book_hash", String(64), ForeignKey("polar_price_book.hash"), nullable=False),
    Column("cost", ScaledDecimal()),  # null where unrated
    Column("unrated", Text),
)

probe_table: Final = Table("polar_probe", metadata, Column("payload", Text, nullable=False))

_APPEND_ONLY: Final = (version_table, price_book_table, usage_table, receipt_table)

# REPLACE deletes the old row without firing DELETE triggers, so an insert over an existing row is refused as
# well.
_SAME_ROW: Final = {
    "polar_schema": "version = NEW.version",
    "polar_price_book": "hash = NEW.hash",
    "polar_usage": ("seq = NEW.seq OR (tenant = NEW.tenant AND source = NEW.source AND request_id = NEW.request_id)"),
    "polar_receipt": "usage_seq = NEW.usage_seq",
}

_POSTGRES_REFUSAL: Final = """
CREATE OR REPLACE FUNCTION polar_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$
"""


def _make_append_only(table: Table) -> None:
    """Attach the triggers that refuse every change of a stored row, for both databases."""
    name = table.name
    refuse = f"BEGIN SELECT RAISE(ABORT, '{name} is append-only'); END"
    for verb in ("UPDATE", "DELETE"):
        _after_create(table, "sqlite", f"CREATE TRIGGER {name}_no_{verb.lower()} BEFORE {verb} ON {name} {refuse}")
    _after_create(
        table,
        "sqlite",
        f"CREATE TRIGGER {name}_no_replace BEFORE INSERT ON {name} "
        f"WHEN EXISTS (SELECT 1 FROM {name} WHERE {_SAME_ROW[name]}) {refuse}",
    )
    _after_create(
        table,
        "postgresql",
        f"CREATE TRIGGER {name}_no_change BEFORE UPDATE OR DELETE ON {name} "
        "FOR EACH ROW EXECUTE FUNCTION polar_refuse_change()",
    )
    _after_create(
        table,
        "postgresql",
        f"CREATE TRIGGER {name}_no_truncate BEFORE TRUNCATE ON {name} "
        "FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change()",
    )


def _after_create(table: Table, dialect: str, statement: str) -> None:
    _on(table, "after_create", dialect, statement)


def _on(target: Table | MetaData, moment: str, dialect: str, statement: str) -> None:
    ddl = DDL(statement)  # type: ignore[no-untyped-call]
    event.listen(target, moment, ddl.execute_if(dialect=dialect))


_on(metadata, "before_create", "postgresql", _POSTGRES_REFUSAL)
for _table in _APPEND_ONLY:
    _make_append_only(_table)
