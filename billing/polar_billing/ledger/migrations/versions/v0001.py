"""Schema version 1: facts and receipts, the first released schema. Never edited.

Revision ID: 0001
"""

from __future__ import annotations

from typing import Final

from alembic import op
from sqlalchemy import text

revision = "0001"
down_revision = None

# ruff: noqa: E501  (as SQLAlchemy wrote it on the day of the release)
_SQLITE: Final = (
    """
CREATE TABLE polar_schema (
    version INTEGER NOT NULL,
    applied_at BIGINT NOT NULL,
    PRIMARY KEY (version)
)
    """,
    """
CREATE TRIGGER polar_schema_no_update BEFORE UPDATE ON polar_schema BEGIN SELECT RAISE(ABORT, 'polar_schema is append-only'); END
    """,
    """
CREATE TRIGGER polar_schema_no_delete BEFORE DELETE ON polar_schema BEGIN SELECT RAISE(ABORT, 'polar_schema is append-only'); END
    """,
    """
CREATE TRIGGER polar_schema_no_replace BEFORE INSERT ON polar_schema WHEN EXISTS (SELECT 1 FROM polar_schema WHERE version = NEW.version) BEGIN SELECT RAISE(ABORT, 'polar_schema is append-only'); END
    """,
    """
CREATE TABLE polar_price_book (
    hash VARCHAR(64) NOT NULL,
    id VARCHAR(100) NOT NULL,
    document TEXT NOT NULL,
    stored_at BIGINT NOT NULL,
    PRIMARY KEY (hash)
)
    """,
    """
CREATE TRIGGER polar_price_book_no_update BEFORE UPDATE ON polar_price_book BEGIN SELECT RAISE(ABORT, 'polar_price_book is append-only'); END
    """,
    """
CREATE TRIGGER polar_price_book_no_delete BEFORE DELETE ON polar_price_book BEGIN SELECT RAISE(ABORT, 'polar_price_book is append-only'); END
    """,
    """
CREATE TRIGGER polar_price_book_no_replace BEFORE INSERT ON polar_price_book WHEN EXISTS (SELECT 1 FROM polar_price_book WHERE hash = NEW.hash) BEGIN SELECT RAISE(ABORT, 'polar_price_book is append-only'); END
    """,
    """
CREATE TABLE polar_usage (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    tenant VARCHAR(200) NOT NULL,
    source VARCHAR(200) NOT NULL,
    request_id VARCHAR(200) NOT NULL,
    content_hash VARCHAR(64) NOT NULL,
    record_version INTEGER NOT NULL,
    started_at BIGINT NOT NULL,
    stored_at BIGINT NOT NULL,
    tags TEXT NOT NULL,
    model VARCHAR(200) NOT NULL,
    model_fingerprint VARCHAR(200) NOT NULL,
    router VARCHAR(200) NOT NULL,
    router_version VARCHAR(200) NOT NULL,
    tier VARCHAR(200),
    program TEXT NOT NULL,
    outcome VARCHAR(20) NOT NULL,
    finish_reason VARCHAR(20) NOT NULL,
    error TEXT,
    tokens_input BIGINT NOT NULL,
    tokens_cached BIGINT NOT NULL,
    tokens_output BIGINT NOT NULL,
    visits_prefill TEXT NOT NULL,
    visits_decode TEXT NOT NULL,
    flops_embed BIGINT NOT NULL,
    flops_layers_prefill BIGINT NOT NULL,
    flops_layers_decode BIGINT NOT NULL,
    flops_head BIGINT NOT NULL,
    flops_router BIGINT NOT NULL,
    flops_total BIGINT NOT NULL,
    flops_formula VARCHAR(50) NOT NULL,
    identity_flops BIGINT NOT NULL,
    kv_bytes_peak BIGINT NOT NULL,
    device TEXT NOT NULL,
    dtype TEXT NOT NULL,
    queue_ns BIGINT NOT NULL,
    prefill_ns BIGINT NOT NULL,
    decode_ns BIGINT NOT NULL,
    CONSTRAINT polar_usage_once UNIQUE (tenant, source, request_id)
)
    """,
    """
CREATE INDEX polar_usage_by_time ON polar_usage (started_at)
    """,
    """
CREATE INDEX polar_usage_by_tenant ON polar_usage (tenant, started_at)
    """,
    """
CREATE TRIGGER polar_usage_no_update BEFORE UPDATE ON polar_usage BEGIN SELECT RAISE(ABORT, 'polar_usage is append-only'); END
    """,
    """
CREATE TRIGGER polar_usage_no_delete BEFORE DELETE ON polar_usage BEGIN SELECT RAISE(ABORT, 'polar_usage is append-only'); END
    """,
    """
CREATE TRIGGER polar_usage_no_replace BEFORE INSERT ON polar_usage WHEN EXISTS (SELECT 1 FROM polar_usage WHERE seq = NEW.seq OR (tenant = NEW.tenant AND source = NEW.source AND request_id = NEW.request_id)) BEGIN SELECT RAISE(ABORT, 'polar_usage is append-only'); END
    """,
    """
CREATE TABLE polar_probe (
    payload TEXT NOT NULL
)
    """,
    """
CREATE TABLE polar_receipt (
    usage_seq INTEGER NOT NULL,
    price_book_hash VARCHAR(64) NOT NULL,
    cost BIGINT,
    unrated TEXT,
    PRIMARY KEY (usage_seq),
    FOREIGN KEY(usage_seq) REFERENCES polar_usage (seq),
    FOREIGN KEY(price_book_hash) REFERENCES polar_price_book (hash)
)
    """,
    """
CREATE TRIGGER polar_receipt_no_update BEFORE UPDATE ON polar_receipt BEGIN SELECT RAISE(ABORT, 'polar_receipt is append-only'); END
    """,
    """
CREATE TRIGGER polar_receipt_no_delete BEFORE DELETE ON polar_receipt BEGIN SELECT RAISE(ABORT, 'polar_receipt is append-only'); END
    """,
    """
CREATE TRIGGER polar_receipt_no_replace BEFORE INSERT ON polar_receipt WHEN EXISTS (SELECT 1 FROM polar_receipt WHERE usage_seq = NEW.usage_seq) BEGIN SELECT RAISE(ABORT, 'polar_receipt is append-only'); END
    """,
)

_POSTGRES: Final = (
    """
CREATE OR REPLACE FUNCTION polar_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$
    """,
    """
CREATE TABLE polar_schema (
    version INTEGER NOT NULL,
    applied_at BIGINT NOT NULL,
    PRIMARY KEY (version)
)
    """,
    """
CREATE TRIGGER polar_schema_no_change BEFORE UPDATE OR DELETE ON polar_schema FOR EACH ROW EXECUTE FUNCTION polar_refuse_change()
    """,
    """
CREATE TRIGGER polar_schema_no_truncate BEFORE TRUNCATE ON polar_schema FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change()
    """,
    """
CREATE TABLE polar_price_book (
    hash VARCHAR(64) NOT NULL,
    id VARCHAR(100) NOT NULL,
    document TEXT NOT NULL,
    stored_at BIGINT NOT NULL,
    PRIMARY KEY (hash)
)
    """,
    """
CREATE TRIGGER polar_price_book_no_change BEFORE UPDATE OR DELETE ON polar_price_book FOR EACH ROW EXECUTE FUNCTION polar_refuse_change()
    """,
    """
CREATE TRIGGER polar_price_book_no_truncate BEFORE TRUNCATE ON polar_price_book FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change()
    """,
    """
CREATE TABLE polar_usage (
    seq BIGSERIAL NOT NULL,
    tenant VARCHAR(200) NOT NULL,
    source VARCHAR(200) NOT NULL,
    request_id VARCHAR(200) NOT NULL,
    content_hash VARCHAR(64) NOT NULL,
    record_version INTEGER NOT NULL,
    started_at BIGINT NOT NULL,
    stored_at BIGINT NOT NULL,
    tags TEXT NOT NULL,
    model VARCHAR(200) NOT NULL,
    model_fingerprint VARCHAR(200) NOT NULL,
    router VARCHAR(200) NOT NULL,
    router_version VARCHAR(200) NOT NULL,
    tier VARCHAR(200),
    program TEXT NOT NULL,
    outcome VARCHAR(20) NOT NULL,
    finish_reason VARCHAR(20) NOT NULL,
    error TEXT,
    tokens_input BIGINT NOT NULL,
    tokens_cached BIGINT NOT NULL,
    tokens_output BIGINT NOT NULL,
    visits_prefill TEXT NOT NULL,
    visits_decode TEXT NOT NULL,
    flops_embed BIGINT NOT NULL,
    flops_layers_prefill BIGINT NOT NULL,
    flops_layers_decode BIGINT NOT NULL,
    flops_head BIGINT NOT NULL,
    flops_router BIGINT NOT NULL,
    flops_total BIGINT NOT NULL,
    flops_formula VARCHAR(50) NOT NULL,
    identity_flops BIGINT NOT NULL,
    kv_bytes_peak BIGINT NOT NULL,
    device TEXT NOT NULL,
    dtype TEXT NOT NULL,
    queue_ns BIGINT NOT NULL,
    prefill_ns BIGINT NOT NULL,
    decode_ns BIGINT NOT NULL,
    PRIMARY KEY (seq),
    CONSTRAINT polar_usage_once UNIQUE (tenant, source, request_id)
)
    """,
    """
CREATE INDEX polar_usage_by_time ON polar_usage (started_at)
    """,
    """
CREATE INDEX polar_usage_by_tenant ON polar_usage (tenant, started_at)
    """,
    """
CREATE TRIGGER polar_usage_no_change BEFORE UPDATE OR DELETE ON polar_usage FOR EACH ROW EXECUTE FUNCTION polar_refuse_change()
    """,
    """
CREATE TRIGGER polar_usage_no_truncate BEFORE TRUNCATE ON polar_usage FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change()
    """,
    """
CREATE TABLE polar_probe (
    payload TEXT NOT NULL
)
    """,
    """
CREATE TABLE polar_receipt (
    usage_seq BIGINT NOT NULL,
    price_book_hash VARCHAR(64) NOT NULL,
    cost BIGINT,
    unrated TEXT,
    PRIMARY KEY (usage_seq),
    FOREIGN KEY(usage_seq) REFERENCES polar_usage (seq),
    FOREIGN KEY(price_book_hash) REFERENCES polar_price_book (hash)
)
    """,
    """
CREATE TRIGGER polar_receipt_no_change BEFORE UPDATE OR DELETE ON polar_receipt FOR EACH ROW EXECUTE FUNCTION polar_refuse_change()
    """,
    """
CREATE TRIGGER polar_receipt_no_truncate BEFORE TRUNCATE ON polar_receipt FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change()
    """,
)


def upgrade() -> None:
    """Make the tables of version 1."""
    for statement in _POSTGRES if op.get_bind().dialect.name == "postgresql" else _SQLITE:
        op.get_bind().execute(text(statement))


def downgrade() -> None:
    """There is nothing before version 1."""
    raise NotImplementedError("schema version 1 is the first; drop the tables by hand")
