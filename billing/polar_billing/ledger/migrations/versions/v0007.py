"""Schema version 7: API keys, and replies to repeated requests.

Up adds the tables, empty. Down drops them, and refuses while there is a key; replies are copies that expire anyway.

Revision ID: 0007
"""

from __future__ import annotations

import time
from typing import Final

from alembic import op
from sqlalchemy import func, select, text

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger.migrations.stored import forget_version
from polar_billing.ledger.schema import api_key_table, metadata, reply_table

revision = "0007"
down_revision = "0006"

_TABLES: Final = [api_key_table, reply_table]


def upgrade() -> None:
    """Add the tables."""
    connection = op.get_bind()
    metadata.create_all(connection, tables=_TABLES)
    connection.execute(text("INSERT INTO polar_schema VALUES (7, :now)"), {"now": time.time_ns() // 1_000})


def downgrade() -> None:
    """Drop the tables."""
    connection = op.get_bind()
    if connection.execute(select(func.count()).select_from(api_key_table)).scalar_one():
        raise SchemaVersionError(
            f"table {api_key_table.name!r} holds rows, which schema version 6 has no place for.",
            hint="Go back to a backup instead.",
        )
    metadata.drop_all(connection, tables=_TABLES)
    forget_version(connection, 7)
