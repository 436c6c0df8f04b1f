"""Schema version 3: which price books were put in force.

Up adds the table, empty: books that version 2 held were in force for statements only, and stay so until somebody puts
one in force for meters as well. Down drops it, and refuses while it holds something.

Revision ID: 0003
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from alembic import op
from sqlalchemy import func, select, text

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger.schema import in_force_table, metadata

if TYPE_CHECKING:
    from sqlalchemy import Connection


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
    _forget_version(connection)


def _forget_version(connection: Connection) -> None:
    """Delete the row of version 3 past the trigger that keeps such rows."""
    if connection.dialect.name == "postgresql":
        statements = [
            "ALTER TABLE polar_schema DISABLE TRIGGER polar_schema_no_change",
            "DELETE FROM polar_schema WHERE version = 3",
            "ALTER TABLE polar_schema ENABLE TRIGGER polar_schema_no_change",
        ]
    else:
        refuse = "BEGIN SELECT RAISE(ABORT, 'polar_schema is append-only'); END"
        statements = [
            "DROP TRIGGER polar_schema_no_delete",
            "DELETE FROM polar_schema WHERE version = 3",
            f"CREATE TRIGGER polar_schema_no_delete BEFORE DELETE ON polar_schema {refuse}",
        ]
    for statement in statements:
        connection.execute(text(statement))
