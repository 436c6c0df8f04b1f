"""Look rows up by many texts at once, given as one parameter however many they are.

Thousands of parameters cost more than the look-up, and SQLite takes only so many. A statement is built once, because
building it costs more than running it. Knows no table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ARRAY, Text, any_, bindparam, func, select

from polar_billing.canonical import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import ColumnElement, Connection, Result, Select

__all__ = ["Among"]

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
