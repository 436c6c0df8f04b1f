"""Many rows into a table at once: one prepared statement on SQLite, COPY on PostgreSQL.

Takes values as the database holds them, past the column types of SQLAlchemy, whose work per value would cost more
than the database's own. Knows no particular table.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Table

__all__ = ["insert_rows"]

_COPY_FROM = 20
"""Rows from which COPY pays for its two round trips on PostgreSQL."""


def insert_rows(connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows of raw values, in order.

    Args:
        connection: A write transaction.
        table: Where to.
        columns: Names of the columns that the values are for.
        rows: One tuple per row: integers, text, bytes or None.
    """
    if not rows:
        return
    dialect = connection.dialect
    quote = dialect.identifier_preparer.quote
    names = ", ".join(quote(name) for name in columns)
    if dialect.name == "postgresql" and len(rows) >= _COPY_FROM:
        _copy(connection, f"COPY {quote(table.name)} ({names}) FROM STDIN", rows)
        return
    mark = "%s" if dialect.name == "postgresql" else "?"
    connection.exec_driver_sql(_insert(quote(table.name), names, mark, len(columns)), list(rows))


@lru_cache(maxsize=64)
def _insert(table: str, names: str, mark: str, count: int) -> str:
    return f"INSERT INTO {table} ({names}) VALUES ({', '.join([mark] * count)})"


def _copy(connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)
