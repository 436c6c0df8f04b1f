"""Usage summed up by hour: a cache that makes the usage query quick, and that `verify` computes again.

Every quantity is two columns, whole millions and the rest: a SUM over FLOPs leaves 64 bits after some 660,000
requests of 14 TFLOP, while a SUM over MFLOP does not, and nothing is rounded. Not append-only, not chained.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Index, LargeBinary, String, Table, Text

from polar_billing.ledger.schema.base import count, metadata

ROLLUP_KEYS: Final = ("tenant", "hour", "tier", "model", "source", "outcome", "price_book_hash", "unrated")
"""What a row of the rollup stands for; a tier or a reason that is absent is the empty text."""

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
