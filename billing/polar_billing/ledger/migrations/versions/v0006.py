"""Schema version 6: holds that are renewed while they are held, and the clock by which they expire on SQLite.

Up replaces the triggers of holds and adds the clock, which starts with the first hold. Down puts the former ones back.

Revision ID: 0006
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from alembic import op
from sqlalchemy import text

from polar_billing.ledger.migrations.stored import forget_version
from polar_billing.ledger.schema import clock_table, metadata
from polar_billing.ledger.schema.budgets import hold_triggers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection


revision = "0006"
down_revision = "0005"

FORMER: Final = {
    "sqlite": {
        "polar_hold_once_update": "CREATE TRIGGER polar_hold_once_update BEFORE UPDATE ON polar_hold "
        "WHEN OLD.state <> 'held' OR NEW.state = 'held' OR NEW.cost_bound <> OLD.cost_bound "
        "BEGIN SELECT RAISE(ABORT, 'polar_hold is resolved once'); END"
    },
    "postgresql": {
        "polar_hold_once_update": "CREATE TRIGGER polar_hold_once_update BEFORE UPDATE ON polar_hold "
        "FOR EACH ROW WHEN (OLD.state <> 'held' OR NEW.state = 'held' OR NEW.cost_bound <> OLD.cost_bound) "
        "EXECUTE FUNCTION polar_refuse_change()"
    },
}
"""The triggers that schema versions 2 to 5 had, where they differ."""


def upgrade() -> None:
    """Let holds be renewed."""
    connection = op.get_bind()
    metadata.create_all(connection, tables=[clock_table])
    _replace(connection, hold_triggers(connection.dialect.name))
    connection.execute(text("INSERT INTO polar_schema VALUES (6, :now)"), {"now": time.time_ns() // 1_000})


def downgrade() -> None:
    """Let holds change once; those that are held expire by the time of day."""
    connection = op.get_bind()
    _replace(connection, FORMER[connection.dialect.name])
    metadata.drop_all(connection, tables=[clock_table])
    forget_version(connection, 6)


def _replace(connection: Connection, triggers: Mapping[str, str]) -> None:
    on_table = " ON polar_hold" if connection.dialect.name == "postgresql" else ""
    for name, definition in triggers.items():
        connection.execute(text(f"DROP TRIGGER {name}{on_table}"))
        connection.exec_driver_sql(definition)
