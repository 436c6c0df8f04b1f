"""What stays of usage after retention: the proof of each request, and the record of each pruning.

* `polar_prune`   one row per tenant and pruning: up to when, how many, and their totals by hour
* `polar_pruned`  one row per pruned request: identity, content hash and receipt, so that a replay is still
                  recognised and the chain still closes; the facts themselves are gone

Knows no connection.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, ForeignKey, Index, String, Table, Text, UniqueConstraint

from polar_billing.ledger.schema.base import SERIAL, ScaledDecimal, UtcMicroseconds, append_only, count, metadata

prune_table: Final = Table(
    "polar_prune",
    metadata,
    Column("id", SERIAL, primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("before", UtcMicroseconds, nullable=False),  # service time, itself excluded
    Column("pruned_at", UtcMicroseconds, nullable=False),
    count("requests"),
    Column("totals", Text, nullable=False),  # JSON: the rollup rows that these requests made
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

append_only(prune_table, same_row="id = NEW.id")
append_only(
    pruned_table,
    same_row="seq = NEW.seq OR (tenant = NEW.tenant AND source = NEW.source AND request_id = NEW.request_id)",
)
