"""Schema version 5: visits that a prompt's tokens did not run because a map filled them.

Up adds the column, null in every row that is there: no digest of a row changes. Down drops it, and refuses while a row
holds something in it.

Revision ID: 0005
"""

from __future__ import annotations

import time

from alembic import op
from sqlalchemy import text

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger.migrations.stored import forget_version

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column."""
    connection = op.get_bind()
    connection.execute(text("ALTER TABLE polar_usage ADD COLUMN visits_prefill_filled TEXT"))
    connection.execute(text("INSERT INTO polar_schema VALUES (5, :now)"), {"now": time.time_ns() // 1_000})


def downgrade() -> None:
    """Drop the column."""
    connection = op.get_bind()
    used = "SELECT request_id FROM polar_usage WHERE visits_prefill_filled IS NOT NULL LIMIT 1"
    if (request_id := connection.execute(text(used)).scalar()) is not None:
        raise SchemaVersionError(
            f"request {request_id!r} has filled visits, which schema version 4 has no place for.",
            hint="Go back to a backup instead.",
        )
    connection.execute(text("ALTER TABLE polar_usage DROP COLUMN visits_prefill_filled"))
    forget_version(connection, 5)
