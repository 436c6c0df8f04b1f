"""Schema version 3: which price books were put in force.

Up adds the table, empty: books that version 2 held were in force for statements only, and stay so until somebody puts
one in force for meters as well. Down drops it, and refuses while it holds something.

Revision ID: 0003
"""

from __future__ import annotations

import time
from typing import Final

from alembic import op
from sqlalchemy import func, select, text

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger.migrations.stored import forget_version
from polar_billing.ledger.schema import in_force_table, metadata

revision = "0003"
down_revision = "0002"

_TABLES: Final = [in_force_table]


def upgrade() -> None:
    """Add the table."""
    connection = op.get_bind()
    metadata.create_all(connection, tables=_TABLES)
    connection.execute(text("INSERT INTO polar_schema VALUES (3, :now)"), {"now": time.time_ns() // 1_000})


def downgrade() -> None:
    """Drop the table."""
    connection = op.get_bind()
    if connection.execute(select(func.count()).select_from(in_force_table)).scalar_one():
        raise SchemaVersionError(
            f"table {in_force_table.name!r} holds rows, which schema version 2 has no place for.",
            hint="Go back to a backup instead.",
        )
    metadata.drop_all(connection, tables=_TABLES)
    forget_version(connection, 3)
