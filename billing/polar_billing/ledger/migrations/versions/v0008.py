"""Schema version 8: drafted tokens, those of them that were kept and what the others executed; what keys have used.

Up adds the columns, null in every row that is there: no digest of a row changes. And it adds the tables of what API
keys have used of their limits, empty. Down drops them all, and refuses while a row holds something in the columns.

Revision ID: 0008
"""

from __future__ import annotations

import time
from typing import Final

from alembic import op
from sqlalchemy import text

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger.migrations.stored import forget_version
from polar_billing.ledger.schema import metadata, rate_table, running_table

revision = "0008"
down_revision = "0007"

_COLUMNS: Final = ("tokens_drafted", "tokens_accepted", "flops_drafts")
_TABLES: Final = [rate_table, running_table]


def upgrade() -> None:
    """Add the columns and the tables."""
    connection = op.get_bind()
    metadata.create_all(connection, tables=_TABLES)
    for column in _COLUMNS:
        connection.execute(text(f"ALTER TABLE polar_usage ADD COLUMN {column} BIGINT"))
    connection.execute(text("INSERT INTO polar_schema VALUES (8, :now)"), {"now": time.time_ns() // 1_000})


def downgrade() -> None:
    """Drop the columns and the tables."""
    connection = op.get_bind()
    used = "SELECT request_id FROM polar_usage WHERE tokens_drafted IS NOT NULL LIMIT 1"
    if (request_id := connection.execute(text(used)).scalar()) is not None:
        raise SchemaVersionError(
            f"request {request_id!r} has drafts, which schema version 7 has no place for.",
            hint="Go back to a backup instead.",
        )
    for column in reversed(_COLUMNS):
        connection.execute(text(f"ALTER TABLE polar_usage DROP COLUMN {column}"))
    metadata.drop_all(connection, tables=_TABLES)
    forget_version(connection, 8)
