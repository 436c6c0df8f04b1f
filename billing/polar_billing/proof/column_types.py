"""Find cells that are not of their column's declared type, before anything else in a ledger is trusted.

SQLite keeps a value of any type in any column, and both databases keep times that no calendar has. `well_typed` checks
every cell against the schema's metadata, in SQL, so that no value of another type reaches Python. While it is open,
rows with such a cell are hidden by temporary views with the names of their tables: queries within it see only cells of
the declared types, and not these rows. Knows no chain and no money.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Integer, LargeBinary, String
from sqlalchemy.types import TypeDecorator

from polar_billing.ledger.schema import metadata
from polar_billing.ledger.schema.base import UtcMicroseconds
from polar_billing.values.canonical import to_microseconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Column, Connection, Row, Table


_MAX_ROWS: Final = 100
"""Rows of one table that are named; the others are counted."""
_MAX_KEY_BYTES: Final = 60
_FIRST: Final = to_microseconds(datetime.min.replace(tzinfo=UTC))
_LAST: Final = to_microseconds(datetime.max.replace(tzinfo=UTC))
_IS_TEXT: Final = "polar_is_text"
"""SQL function: true of the bytes of a text."""
_STORAGE: Final = {Integer: "integer", String: "text", LargeBinary: "blob"}
"""SQLAlchemy's type → what SQLite calls the storage of its values."""
_HOLDS: Final = {
    "null": "nothing",
    "integer": "an integer",
    "real": "a number with a fraction or beyond 64 bits",
    "text": "text",
    "blob": "bytes",
}
_HOLDS_WRONGLY: Final = {
    "integer": "a moment that no calendar has",
    "text": "text that is not UTF-8",
    "blob": "bytes of another length",
}
"""For a cell of the right storage whose content the column cannot have."""


@dataclass(frozen=True)
class WrongCell:
    """A cell that is not of the type that its column declares."""

    table: str
    tenant: str
    """The tenant of its row; empty if the table knows none, or the row does not say."""
    what: str
    """Names column, row and table."""


@contextmanager
def well_typed(connection: Connection, tables: Sequence[Table] | None = None) -> Iterator[list[WrongCell]]:
    """Find the cells of another type than declared, and hide their rows until the block ends.

    Yields the cells, with at most `_MAX_ROWS` rows of a table named; of these tables, or of the whole schema.
    """
    checks = [_TableCheck(connection, table) for table in (metadata.sorted_tables if tables is None else tables)]
    wrong = {check: cells for check in checks if (cells := check.wrong_cells())}
    if not wrong:
        yield []
        return
    hiding = connection.begin_nested()
    try:
        for check in wrong:
            check.hide()
        yield [cell for cells in wrong.values() for cell in cells]
    finally:
        hiding.rollback()


class _TableCheck:
    """The columns of one table, and the SQL that is true of a cell or a row that is not as they declare."""

    def __init__(self, connection: Connection, table: Table) -> None:
        self._connection, self._table = connection, table
        self._on_sqlite = connection.dialect.name == "sqlite"
        self._columns: list[Column[Any]] = list(table.columns)
        self._quote = connection.dialect.identifier_preparer.quote
        if self._on_sqlite:
            driver: Any = connection.connection.driver_connection
            driver.create_function(_IS_TEXT, 1, _is_text, deterministic=True)

    def wrong_cells(self) -> list[WrongCell]:
        """One per cell, and one that counts the rows that are not named."""
        query = f"SELECT {', '.join(self._selected())} FROM {self._name} WHERE {self._wrong_row} LIMIT {_MAX_ROWS + 1}"
        rows = self._connection.exec_driver_sql(query).all()
        cells = [cell for row in rows[:_MAX_ROWS] for cell in self._cells_of(row)]
        if len(rows) > _MAX_ROWS:
            count = f"SELECT count(*) FROM {self._name} WHERE {self._wrong_row}"
            more = self._connection.exec_driver_sql(count).scalar_one() - _MAX_ROWS
            cells.append(WrongCell(self._table.name, "", f"{more:,} more rows of {self._table.name} hold such values."))
        return cells

    def hide(self) -> None:
        """Put a view of the good rows in front of the table."""
        name = self._quote(self._table.name)
        self._connection.exec_driver_sql(
            f"CREATE TEMPORARY VIEW {name} AS SELECT * FROM {self._name} WHERE NOT ({self._wrong_row})"
        )

    @property
    def _name(self) -> str:
        name = self._quote(self._table.name)
        return f"main.{name}" if self._on_sqlite else name

    @property
    def _wrong_row(self) -> str:
        wrong = [self._wrong(column) for column in self._columns]
        texts = [self._quote(column.name) for column in self._columns if _storage(column) == "text"]
        if self._on_sqlite and texts:  # one call for all of them: it is what takes time
            joined = " || '|' || ".join(f"coalesce({text}, '')" for text in texts)
            wrong.append(f"NOT {_IS_TEXT}(CAST({joined} AS BLOB))")
        return " OR ".join(wrong)

    def _wrong(self, column: Column[Any]) -> str:
        """SQL: the cell is of another storage, length or range than declared, or null where that cannot be."""
        name, storage = self._quote(column.name), _storage(column)
        wrong = [f"typeof({name}) <> '{storage}'" if self._on_sqlite else f"{name} IS NULL"]
        if isinstance(column.type, UtcMicroseconds):
            wrong.append(f"{name} NOT BETWEEN {_FIRST} AND {_LAST}")
        if isinstance(column.type, LargeBinary) and column.type.length is not None:  # a hash, of exactly this length
            length = "length" if self._on_sqlite else "octet_length"
            wrong.append(f"{length}({name}) <> {column.type.length}")
        any_of = " OR ".join(wrong)
        return f"({name} IS NOT NULL AND ({any_of}))" if column.nullable else f"({any_of})"

    def _wrong_cell(self, column: Column[Any]) -> str:
        """The same, for one cell alone."""
        if not self._on_sqlite or _storage(column) != "text":
            return self._wrong(column)
        name = self._quote(column.name)
        return f"({self._wrong(column)} OR NOT {_IS_TEXT}(CAST(coalesce({name}, '') AS BLOB)))"

    def _selected(self) -> Iterator[str]:
        """Tenant, then per column whether it is wrong and what it holds, then the primary key."""
        if "tenant" in self._table.c:
            tenant = self._table.c.tenant
            yield f"CASE WHEN {self._wrong_cell(tenant)} THEN '' ELSE {self._quote(tenant.name)} END"
        else:
            yield "''"
        for column in self._columns:
            name, storage = self._quote(column.name), _storage(column)
            yield f"CASE WHEN {self._wrong_cell(column)} THEN 1 ELSE 0 END"
            yield f"typeof({name})" if self._on_sqlite else f"CASE WHEN {name} IS NULL THEN 'null' ELSE '{storage}' END"
        for key in self._table.primary_key.columns:
            name = self._quote(key.name)
            yield f"substr(CAST({name} AS BLOB), 1, {_MAX_KEY_BYTES})" if self._on_sqlite else name

    def _cells_of(self, row: Row[Any]) -> Iterator[WrongCell]:
        values = list(row)
        tenant, cells, keys = values[0], values[1 : 1 + 2 * len(self._columns)], values[1 + 2 * len(self._columns) :]
        where = f"row {', '.join(map(_shown, keys))} of {self._table.name}"
        for column, wrong, holds in zip(self._columns, cells[::2], cells[1::2], strict=True):
            if wrong:
                declared = _storage(column)
                value = _HOLDS_WRONGLY[holds] if holds == declared else _HOLDS[holds]
                said = f"column {column.name} of {where} holds {value}, not {_declared(column)}; the row is not read."
                yield WrongCell(self._table.name, tenant, said)


def _storage(column: Column[Any]) -> str:
    kind = column.type.impl_instance if isinstance(column.type, TypeDecorator) else column.type
    return next(storage for base, storage in _STORAGE.items() if isinstance(kind, base))


def _declared(column: Column[Any]) -> str:
    if isinstance(column.type, UtcMicroseconds):
        return "a moment in microseconds"
    if isinstance(column.type, LargeBinary) and column.type.length is not None:
        return f"{column.type.length} bytes"
    return _HOLDS[_storage(column)]


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(key: object) -> str:
    """A cell of a primary key, from its bytes or as it is."""
    if not isinstance(key, (bytes, memoryview)):
        return str(key) if isinstance(key, int) else repr(key)
    try:
        text = bytes(key).decode()
    except UnicodeDecodeError:
        return bytes(key).hex()
    return text if text.isdecimal() else repr(text)
