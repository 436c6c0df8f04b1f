"""The shared parts of the ledger's tables: the metadata, exact column types, and the triggers that forbid changes.

`Numeric` on SQLite goes through a binary float and may return other digits than were stored, so every column is an
integer or a text, on every database: amounts are scaled integers, times are microseconds. Knows no table and no
connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import orjson
from sqlalchemy import DDL, BigInteger, Column, Dialect, Integer, MetaData, Table, Text, event
from sqlalchemy.types import TypeDecorator

from polar_billing.errors import StoreDamagedError
from polar_billing.values.canonical import EPOCH, canonical_text, to_microseconds
from polar_billing.values.money import STORED_SCALE, from_scaled, to_units
from polar_sdk.reading import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MICROSECOND: Final = timedelta(microseconds=1)
"""Reading multiplies by it; writing counts without it, which is quicker."""


class ScaledDecimal(TypeDecorator[Decimal]):
    """A Decimal as an int64 count of 10^-12, which ends at ±9,223,372.036854775807; refuses what that cannot hold."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        """Count the units, or refuse."""
        return None if value is None else to_units(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        """Give the Decimal back, digit for digit."""
        return None if value is None else from_scaled(value, STORED_SCALE)


class UtcMicroseconds(TypeDecorator[datetime]):
    """An aware datetime as an int64 count of microseconds since 1970-01-01T00:00Z; sorts as time does."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Count the microseconds, in integers."""
        return None if value is None else to_microseconds(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Give the UTC datetime back."""
        return None if value is None else EPOCH + value * _MICROSECOND


class IntegerList(TypeDecorator[tuple[int, ...]]):
    """A tuple of integers as compact JSON text: one number per layer, read back whole."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> str | None:
        """Write the JSON array."""
        return None if value is None else canonical_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[int, ...] | None:
        """Read the JSON array."""
        if value is None:
            return None
        numbers = _parsed(value)
        if not isinstance(numbers, list):
            raise _meaningless(value, "list of integers")
        return tuple(numbers)


class TextMap(TypeDecorator["Mapping[str, str]"]):
    """A mapping of strings as JSON text with sorted keys."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, str] | None, dialect: Dialect) -> str | None:
        """Write the JSON object."""
        return None if value is None else canonical_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, str] | None:
        """Read the JSON object."""
        if value is None:
            return None
        mapping = _parsed(value)
        if not isinstance(mapping, dict):
            raise _meaningless(value, "map of texts")
        return mapping


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise _meaningless(text, "JSON") from error


def _meaningless(text: str, wanted: str) -> StoreDamagedError:
    """The error of a text that this package cannot have written."""
    return StoreDamagedError(
        f"the ledger holds {shown(text)}, which is not a valid {wanted}.", hint="Run `polar verify`."
    )


SCHEMA_VERSION: Final = 12
"""The version of these tables; it rises when one changes. A ledger of another version is refused."""

metadata: Final = MetaData()

NO_TENANT: Final = ""
"""The chain of rows that belong to no tenant, such as price books; no tenant has an empty name."""

# SQLite numbers rows by itself only in a column declared INTEGER, which is 64 bits wide there.
SERIAL: Final = BigInteger().with_variant(Integer, "sqlite")

_POSTGRES_REFUSAL: Final = """
CREATE OR REPLACE FUNCTION polar_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$
"""


def count(name: str) -> Column[int]:
    """A column of whole numbers that is always known."""
    return Column(name, BigInteger, nullable=False)


def append_only(table: Table, *, same_row: str | None, deletable_if: str | None = None) -> None:
    """Attach the triggers that refuse every change of a stored row, for both databases.

    Args:
        table: The table.
        same_row: SQL that is true of a stored row that an insert of `NEW` would replace. REPLACE deletes the old row
            without firing DELETE triggers, so such an insert is refused as well. Usually `id = NEW.id`; None where
            looking costs too much.
        deletable_if: SQL over `OLD` that allows one row to be deleted; without it none ever is.
    """
    name = table.name
    refuse = f"BEGIN SELECT RAISE(ABORT, '{name} is append-only'); END"
    # Not ABORT, for which SQLite would keep a copy of every page that an insert touches.
    fail = f"BEGIN SELECT RAISE(FAIL, '{name} is append-only'); END"
    unless = "" if deletable_if is None else f"WHEN NOT ({deletable_if}) "
    on_create(table, "sqlite", f"CREATE TRIGGER {name}_no_update BEFORE UPDATE ON {name} {refuse}")
    on_create(table, "sqlite", f"CREATE TRIGGER {name}_no_delete BEFORE DELETE ON {name} {unless}{refuse}")
    if same_row is not None:
        exists = f"WHEN EXISTS (SELECT 1 FROM {name} WHERE {same_row})"
        on_create(table, "sqlite", f"CREATE TRIGGER {name}_no_replace BEFORE INSERT ON {name} {exists} {fail}")
    for statement in _postgres_triggers(name, deletable_if):
        on_create(table, "postgresql", statement)


def _postgres_triggers(name: str, deletable_if: str | None) -> tuple[str, ...]:
    truncate = (
        f"CREATE TRIGGER {name}_no_truncate BEFORE TRUNCATE ON {name} "
        "FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change()"
    )
    if deletable_if is None:
        row = "FOR EACH ROW EXECUTE FUNCTION polar_refuse_change()"
        return (f"CREATE TRIGGER {name}_no_change BEFORE UPDATE OR DELETE ON {name} {row}", truncate)
    # A trigger's WHEN may not look into another table there; a function may.
    guard = (
        f"CREATE OR REPLACE FUNCTION {name}_guard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF TG_OP = 'DELETE' AND ({deletable_if}) THEN RETURN OLD; END IF; "
        "RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$"
    )
    row = f"FOR EACH ROW EXECUTE FUNCTION {name}_guard()"
    return (guard, f"CREATE TRIGGER {name}_no_change BEFORE UPDATE OR DELETE ON {name} {row}", truncate)


def refuse_going_back(table: Table, counter: str) -> None:
    """Attach triggers that allow a row of `table` to change only if its `counter` rises, and never to be deleted."""
    name = table.name
    refuse = f"BEGIN SELECT RAISE(ABORT, '{name} only moves forward'); END"
    back = f"WHEN NEW.{counter} <= OLD.{counter}"
    on_create(table, "sqlite", f"CREATE TRIGGER {name}_forward BEFORE UPDATE ON {name} {back} {refuse}")
    on_create(table, "sqlite", f"CREATE TRIGGER {name}_no_delete BEFORE DELETE ON {name} {refuse}")
    function = "EXECUTE FUNCTION polar_refuse_change()"
    on_create(
        table,
        "postgresql",
        f"CREATE TRIGGER {name}_forward BEFORE UPDATE ON {name} "
        f"FOR EACH ROW WHEN (NEW.{counter} <= OLD.{counter}) {function}",
    )
    on_create(table, "postgresql", f"CREATE TRIGGER {name}_no_delete BEFORE DELETE ON {name} FOR EACH ROW {function}")


@dataclass(frozen=True)
class Chained:
    """A table whose rows are links of the hash chain, one chain per tenant.

    Such a table is append-only, has one primary-key column and, unless its rows belong to no tenant, a column
    `tenant`. It holds integers, text and bytes only (no booleans, floats or database decimals), because its rows are
    hashed as the database returns them. Its parts are rows that never change once their row is linked. A column that a
    later schema adds to any of them comes last and is null in the rows that were there before, so that their digests
    stay (`polar_billing.ledger.chain`).
    """

    table: Table
    parts: Mapping[Table, str] = field(default_factory=dict)
    """Tables whose rows belong to a row of `table` → their column that names it."""

    @property
    def subject(self) -> str:
        """The table's name in links: without the prefix."""
        return subject_of(self.table)

    @property
    def key(self) -> str:
        """Name of the primary-key column."""
        (column,) = self.table.primary_key.columns
        return str(column.name)

    def key_of(self, text: str) -> int | str | None:
        """The primary key that a link's text stands for; None if it cannot be one."""
        if not isinstance(self.table.c[self.key].type, Integer):
            return text
        try:
            number = int(text)
        except ValueError:
            return None
        return number if abs(number) < 2**63 else None  # as many bits as a column has

    def tenant_of(self, row: Sequence[Any]) -> str:
        """The tenant in whose chain a row is a link; empty if the table knows no tenants."""
        columns = self.table.c.keys()
        return str(row[columns.index("tenant")]) if "tenant" in columns else NO_TENANT


def subject_of(table: Table) -> str:
    """A table's name in links: without the prefix."""
    return str(table.name).removeprefix("polar_")


def on_create(table: Table, dialect: str, statement: str) -> None:
    """Run a statement after the table was created on that database."""
    _on(table, "after_create", dialect, statement)


def _on(target: Table | MetaData, moment: str, dialect: str, statement: str) -> None:
    ddl = DDL(statement)  # type: ignore[no-untyped-call]
    event.listen(target, moment, ddl.execute_if(dialect=dialect))


_on(metadata, "before_create", "postgresql", _POSTGRES_REFUSAL)
