"""The first migration makes the tables of a new ledger; other versions are refused, and later ones migrated to."""

from __future__ import annotations

import hashlib
import re
import shutil
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_mock_engine, inspect, text

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger import ledger as ledger_module
from polar_billing.ledger import migrate as migrate_module
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.migrate import MIGRATIONS, migrate, upgrade
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.ledger.schema import SCHEMA_VERSION, metadata
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TABLES = {
    "sqlite": "6ef832c6d8c293fb0888c2885fe4b982ed57ed7ffd9cfa7c08fee9983e0863e5",
    "postgresql": "9881fd984e9e73efd0e68ad4cfbcae92cdb935c1c965d54752e819a847357c7b",
}
"""SHA-256 over the statements that make the tables of `SCHEMA_VERSION`."""


@pytest.mark.parametrize("dialect", TABLES)
def test_the_tables_change_with_the_version_alone(dialect: str) -> None:
    """Whoever changes one raises `SCHEMA_VERSION`, adds a migration, and writes today's statements into the first.

    In a chained table a new column comes last and is null in the rows that are there, so that their digests stay.
    """
    written: list[str] = []
    engine: Any = create_mock_engine(
        "sqlite://" if dialect == "sqlite" else "postgresql+psycopg://",
        lambda statement, *_: written.append(str(statement.compile(dialect=engine.dialect))),
    )
    metadata.create_all(engine, checkfirst=False)
    definition = "\n".join(sorted(" ".join(one.split()) for one in written))
    assert hashlib.sha256(definition.encode()).hexdigest() == TABLES[dialect]


def shape(ledger: Ledger) -> dict[str, Any]:
    """Columns, keys and triggers, as the database knows them."""
    with ledger.unprepared() as connection:
        look = inspect(connection)
        found: dict[str, Any] = {
            table: [
                sorted((column["name"], str(column["type"]), column["nullable"]) for column in look.get_columns(table)),
                sorted((str(index["name"]), index["column_names"]) for index in look.get_indexes(table)),
                sorted((key["constrained_columns"], key["referred_table"]) for key in look.get_foreign_keys(table)),
            ]
            for table in look.get_table_names()
            if table != "polar_alembic"
        }
        triggers = (
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
            if connection.dialect.name == "sqlite"
            else "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
        )
        return found | {"triggers": sorted(map(tuple, connection.execute(text(triggers))))}


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Names databases in which there is nothing."""
    if request.param == "postgresql":
        make: Callable[[], str] = request.getfixturevalue("new_postgres")
        return make
    files = iter("abc")
    return lambda: f"sqlite:///{tmp_path / next(files)}"


def test_the_first_migration_makes_the_tables_of_a_new_ledger(new_url: Callable[[], str]) -> None:
    with Ledger(new_url()) as migrated, Ledger(new_url()) as new:
        with migrated.unprepared() as connection:
            upgrade(connection, "base", MIGRATIONS)
        new.check()
        assert shape(migrated) == shape(new)


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_a_ledger_of_another_version_is_refused_with_one_line(tmp_path: Path, version: int) -> None:
    file = tmp_path / "ledger.sqlite3"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE polar_schema (version INTEGER NOT NULL PRIMARY KEY, applied_at BIGINT)")
        connection.execute(f"INSERT INTO polar_schema VALUES ({version}, 0)")
    ledger = Ledger(str(file))
    for act in (ledger.check, lambda: list(ledger.read(Selection(ALL_TENANTS))), lambda: migrate(ledger)):
        with pytest.raises(SchemaVersionError) as caught:
            act()
        said = str(caught.value)
        assert {repr(str(file)), str(version), str(SCHEMA_VERSION)} <= set(re.split("[ ,]+", said))
        assert ("--ledger" in said) == (version < SCHEMA_VERSION)
        assert "\n" not in said


NEXT = """
from alembic import op

revision, down_revision = "{next:04d}", "{last:04d}"


def upgrade():
    op.execute("ALTER TABLE polar_usage ADD COLUMN region TEXT")
    op.execute("{then}")
"""


def test_a_later_version_is_migrated_to_as_a_whole_or_not_at_all(
    new_url: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(MIGRATIONS, tmp_path / "migrations")
    next_ = SCHEMA_VERSION + 1
    with Ledger(new_url()) as ledger:
        Meter(ledger).emit(usage_record())
        assert migrate(ledger) == (SCHEMA_VERSION, SCHEMA_VERSION)
        for module in (ledger_module, migrate_module):
            monkeypatch.setattr(module, "SCHEMA_VERSION", next_)
        monkeypatch.setattr(migrate_module, "MIGRATIONS", str(folder))
        with pytest.raises(SchemaVersionError) as caught:
            ledger.close()
            ledger.check()
        assert "polar migrate" in str(caught.value.hint)
        for then, error in (("SELECT nothing FROM nowhere", Exception), ("SELECT 1", None)):
            script = NEXT.format(next=next_, last=SCHEMA_VERSION, then=then)
            (folder / "versions" / "next.py").write_text(script, encoding="utf-8")
            if error is not None:
                with pytest.raises(error):
                    migrate(ledger)
                with ledger.unprepared() as connection:
                    assert ledger.stored_version(connection) == SCHEMA_VERSION
                    assert "region" not in {one["name"] for one in inspect(connection).get_columns("polar_usage")}
        assert migrate(ledger) == (SCHEMA_VERSION, next_)
        ledger.check()
        with ledger.snapshot() as connection:
            assert connection.execute(text("SELECT region FROM polar_usage")).scalars().all() == [None]
