"""What every table of the ledger shares: the metadata, column types and the triggers that forbid changes.

A module of this package that declares a table calls `append_only(table, …)` for it, and registers it with
`polar_billing.chain.register_chained` if its rows belong into the hash chain. Knows no table and no
connection.

Chained tables hold integers, text and bytes only (no booleans, floats or database decimals): their rows are
hashed as the database returns them, on every database alike.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import DDL, BigInteger, Column, Integer, MetaData, Table, event

__all__ = ["SCHEMA_VERSION", "SERIAL", "append_only", "count", "metadata", "on_create", "refuse_going_back"]

SCHEMA_VERSION: Final = 3
"""Version 1: facts and receipts. Version 2: hash chain, double entry, retention, rollups and all that rests on them.
Version 3: which price books were put in force."""

metadata: Final = MetaData()

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
    """Attach triggers that let a row of `table` change only while its `counter` rises, and never be deleted."""
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


def on_create(table: Table, dialect: str, statement: str) -> None:
    """Run a statement after the table was created on that database."""
    _on(table, "after_create", dialect, statement)


def _on(target: Table | MetaData, moment: str, dialect: str, statement: str) -> None:
    ddl = DDL(statement)  # type: ignore[no-untyped-call]
    event.listen(target, moment, ddl.execute_if(dialect=dialect))


_on(metadata, "before_create", "postgresql", _POSTGRES_REFUSAL)
