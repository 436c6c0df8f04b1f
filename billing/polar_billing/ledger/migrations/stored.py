"""What migrations share: the tables as an older schema stored them, and a way past the triggers that refuse changes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import Column, MetaData, Table, inspect, text

from polar_billing.ledger.schema import CHAINED, Chained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection


def stored_chained(connection: Connection) -> dict[str, Chained]:
    """The chained tables that the database has, by subject, with the columns that it has and today's column types."""
    return {
        subject: Chained(
            stored_table(connection, chained.table),
            {stored_table(connection, part): column for part, column in chained.parts.items()},
        )
        for subject, chained in CHAINED.items()
        if inspect(connection).has_table(chained.table.name)
    }


def stored_table(connection: Connection, table: Table) -> Table:
    """A table of today's schema without the columns that the database does not have yet."""
    stored = {column["name"] for column in inspect(connection).get_columns(table.name)}
    columns = [
        Column(column.name, column.type, primary_key=column.primary_key, nullable=column.nullable)
        for column in table.columns
        if column.name in stored
    ]
    return Table(table.name, MetaData(), *columns)


@contextmanager
def past_triggers(connection: Connection, name: str) -> Iterator[None]:
    """A table whose triggers refuse nothing until the block ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"ALTER TABLE {name} DISABLE TRIGGER USER"))
        yield
        connection.execute(text(f"ALTER TABLE {name} ENABLE TRIGGER USER"))
        return
    triggers = connection.execute(
        text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = :name"), {"name": name}
    ).all()
    for trigger, _ in triggers:
        connection.exec_driver_sql(f"DROP TRIGGER {trigger}")
    yield
    for _, statement in triggers:
        connection.exec_driver_sql(statement)


def forget_version(connection: Connection, version: int) -> None:
    """Delete the row that says a ledger has had a schema version."""
    with past_triggers(connection, "polar_schema"):
        connection.execute(text("DELETE FROM polar_schema WHERE version = :version"), {"version": version})
