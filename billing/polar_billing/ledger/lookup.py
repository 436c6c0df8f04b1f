"""Many rows into a table at once: one prepared statement on SQLite; COPY, or one statement over arrays, on PostgreSQL.

Takes values as the database holds them, past the column types of SQLAlchemy, whose work per value would cost more
than the database's own. Knows no particular table.

Look rows up by many texts at once, given as one parameter however many they are.

Thousands of parameters cost more than the look-up, and SQLite takes only so many. A statement is built once, because
building it costs more than running it. Knows no table.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ARRAY, Text, any_, bindparam, func, select
from sqlalchemy.exc import IntegrityError

from polar_billing.values.canonical import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import ColumnElement, Connection, Dialect, Result, Select, Table

_NAME: Final = "among"


class Among:
    """A query for the rows where a column of texts is one of those given.

    Args:
        query: Everything else; may have parameters of its own.
        column: The column.
    """

    def __init__(self, query: Select[Any], column: ColumnElement[str]) -> None:
        unpacked = func.json_each(bindparam(_NAME, type_=Text)).table_valued("value")
        self._on_sqlite = query.where(column.in_(select(unpacked.c.value)))
        self._on_postgres = query.where(column == any_(bindparam(_NAME, type_=ARRAY(Text))))

    def run(self, connection: Connection, texts: Iterable[str], **others: Any) -> Result[Any]:
        """Run it.

        Args:
            connection: A transaction.
            texts: What the column may be.
            **others: The query's own parameters.
        """
        if connection.dialect.name == "postgresql":
            return connection.execute(self._on_postgres, {_NAME: list(texts), **others})
        return connection.execute(self._on_sqlite, {_NAME: canonical_json(list(texts)).decode(), **others})


_COPY_FROM = 20
"""Rows from which COPY pays for its two round trips on PostgreSQL."""


def insert_rows(connection: Connection, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows of raw values, in order.

    Args:
        connection: A write transaction.
        table: Where to.
        rows: One tuple per row, in the order of the table's columns: integers, text, bytes or None.
    """
    if not rows:
        return
    dialect = connection.dialect
    if dialect.name == "postgresql" and len(rows) >= _COPY_FROM:
        _copy(connection, f"COPY {_place(table, dialect)} FROM STDIN", rows)
    else:
        # Whoever writes takes the whole transaction back on an error, so SQLite need not keep what undoes one row.
        verb = "INSERT OR FAIL" if dialect.name == "sqlite" else "INSERT"
        connection.exec_driver_sql(f"{verb} {_into(table, dialect)}", list(rows))


def upsert_rows(connection: Connection, table: Table, rows: Sequence[tuple[Any, ...]], changes: Sequence[str]) -> None:
    """Insert rows of raw values, or change those of the same primary key, in order.

    Args:
        connection: A write transaction.
        table: Where to; its primary key is one column.
        rows: As for `insert_rows`, no two of the same key.
        changes: SQL assignments to the stored row, over `excluded`, the row given; none to leave it as it is.
    """
    if not rows:
        return
    dialect = connection.dialect
    (key,) = table.primary_key.columns
    then = f"UPDATE SET {', '.join(changes)}" if changes else "NOTHING"
    conflict = f"ON CONFLICT ({key.name}) DO {then}"
    if dialect.name == "postgresql":
        columns = tuple(map(list, zip(*rows, strict=True)))
        connection.exec_driver_sql(f"INSERT {_into_from_arrays(table, dialect)} {conflict}", columns)
    else:
        connection.exec_driver_sql(f"INSERT {_into(table, dialect)} {conflict}", list(rows))


@lru_cache(maxsize=64)
def _place(table: Table, dialect: Dialect) -> str:
    quote = dialect.identifier_preparer.quote
    return f"{quote(table.name)} ({', '.join(quote(column.name) for column in table.c)})"


@lru_cache(maxsize=64)
def _into(table: Table, dialect: Dialect) -> str:
    mark = "%s" if dialect.name == "postgresql" else "?"
    return f"INTO {_place(table, dialect)} VALUES ({', '.join([mark] * len(table.c))})"


@lru_cache(maxsize=64)
def _into_from_arrays(table: Table, dialect: Dialect) -> str:
    arrays = ", ".join(f"%s::{column.type.compile(dialect)}[]" for column in table.c)
    return f"INTO {_place(table, dialect)} SELECT * FROM unnest({arrays})"


def _copy(connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except connection.dialect.loaded_dbapi.IntegrityError as error:
        raise IntegrityError(statement, None, error) from error  # as SQLAlchemy's own statements do
