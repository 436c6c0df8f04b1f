"""Usage and what belongs to it: facts, receipts, price books, sums by hour, and what retention leaves.

* `polar_schema`          which versions of these tables the database has had
* `polar_price_book`      every price book that ever rated a request, whole, by content hash
* `polar_price_in_force`  one row each time a book, or a revision of one, was put in force
* `polar_usage`           one row per request: facts only, no prices
* `polar_receipt`         the cost of a request as the caller was informed, and by which book
* `polar_usage_hour`      usage summed up by hour: a cache that makes queries quick, and that `verify` recomputes
* `polar_prune`           one row per tenant and pruning: up to when, how many, and their totals by hour and by
                          issued statement
* `polar_pruned`          one row per pruned request: identity, content hash and receipt, so that a replay is still
                          recognised and the chain still closes; the facts themselves are gone
* `polar_probe`           always empty; `check` inserts here and rolls back

Facts and money are in separate tables on purpose: usage can be rated again under another book, while a receipt does not
change. Every quantity of a sum has two columns, whole millions and the rest: a SUM over FLOPs exceeds 64 bits after
some 660,000 requests of 14 TFLOP, while a SUM over MFLOP does not, and nothing is rounded. Names have a prefix, so the
ledger may be in an application's own database. Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
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

in_force_table: Final = Table(
    "polar_price_in_force",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("price_book_hash", String(64), ForeignKey("polar_price_book.hash"), nullable=False),
    Column("for_all", Integer, nullable=False),  # 1 = for tenants that no book names as well
    Column("put_at", UtcMicroseconds, nullable=False),
    sqlite_autoincrement=True,
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
    count("loops_stopped"),
    Column("visits_prefill_filled", IntegerList),  # null where nothing was filled
    Column("tokens_drafted", BigInteger),  # these three are null where nothing was drafted
    Column("tokens_accepted", BigInteger),
    Column("flops_drafts", BigInteger),
    UniqueConstraint("tenant", "source", "request_id", name="polar_usage_once"),
    Index("polar_usage_by_tenant", "tenant", "started_at"),
    Index("polar_usage_by_time", "started_at"),
    sqlite_autoincrement=True,  # a number is never used twice
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

ROLLUP_KEYS: Final = ("tenant", "hour", "tier", "model", "source", "outcome", "price_book_hash", "unrated")
"""Key of a sum; an absent tier or reason is the empty text."""

ROLLUP_QUANTITIES: Final = (
    "tokens_input",
    "tokens_cached",
    "tokens_output",
    "visits",
    "flops",
    "identity_flops",
    "cost",  # of the receipts; unit: 10^-12 of the currency
)

rollup_table: Final = Table(
    "polar_usage_hour",
    metadata,
    Column("id", LargeBinary(32), primary_key=True),  # SHA-256 over the eight columns that follow
    Column("tenant", String(200), nullable=False),
    Column("hour", BigInteger, nullable=False),  # hours since 1970, service time, UTC
    Column("tier", String(200), nullable=False),
    Column("model", String(200), nullable=False),
    Column("source", String(200), nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("price_book_hash", String(64), nullable=False),
    Column("unrated", Text, nullable=False),
    count("requests"),
    *(count(f"{name}_{part}") for name in ROLLUP_QUANTITIES for part in ("millions", "rest")),
    Index("polar_usage_hour_by_tenant", "tenant", "hour"),
    Index("polar_usage_hour_by_time", "hour"),
)

prune_table: Final = Table(
    "polar_prune",
    metadata,
    Column("id", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("before", UtcMicroseconds, nullable=False),  # service time, itself excluded
    Column("pruned_at", UtcMicroseconds, nullable=False),
    count("requests"),
    Column("totals", Text, nullable=False),  # JSON: the rollup rows that these requests made
    Column("statements", Text, nullable=False),  # JSON: id of an issued statement → what rating it again needs of them
    sqlite_autoincrement=True,
)

pruned_table: Final = Table(
    "polar_pruned",
    metadata,
    Column("seq", SERIAL, primary_key=True, autoincrement=False),  # of polar_usage
    Column("prune_id", SERIAL, ForeignKey("polar_prune.id"), nullable=False),
    Column("tenant", String(200), nullable=False),
    Column("source", String(200), nullable=False),
    Column("request_id", String(200), nullable=False),
    Column("content_hash", String(64), nullable=False),
    Column("stored_at", UtcMicroseconds, nullable=False),
    Column("price_book_hash", String(64), nullable=False),
    Column("cost", ScaledDecimal()),
    Column("unrated", Text),
    UniqueConstraint("tenant", "source", "request_id", name="polar_pruned_once"),
    Index("polar_pruned_by_prune", "prune_id"),
)

append_only(version_table, same_row="version = NEW.version")
append_only(price_book_table, same_row="hash = NEW.hash")
append_only(in_force_table, same_row="seq = NEW.seq")
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
append_only(prune_table, same_row="id = NEW.id")
append_only(
    pruned_table,
    same_row="seq = NEW.seq OR (tenant = NEW.tenant AND source = NEW.source AND request_id = NEW.request_id)",
)
