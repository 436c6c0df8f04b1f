"""The tables have a version, and a ledger of another one is refused."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_mock_engine

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.ledger.schema import SCHEMA_VERSION, metadata

if TYPE_CHECKING:
    from pathlib import Path

TABLES = {
    "sqlite": "5779d203d3974a2f4df137d6825cd44b9bb59e4168d4337d57c543883eaf87c9",
    "postgresql": "686efc089e5d13c196dfaf5a5b151e8d69416a9e680a3f135e748db0714c0ec1",
}
"""SHA-256 over the statements that make the tables of `SCHEMA_VERSION`: whoever changes one raises that number."""


@pytest.mark.parametrize("dialect", TABLES)
def test_the_tables_change_with_the_version_alone(dialect: str) -> None:
    written: list[str] = []
    engine: Any = create_mock_engine(
        "sqlite://" if dialect == "sqlite" else "postgresql+psycopg://",
        lambda statement, *_: written.append(str(statement.compile(dialect=engine.dialect))),
    )
    metadata.create_all(engine, checkfirst=False)
    definition = "\n".join(sorted(" ".join(one.split()) for one in written))
    assert hashlib.sha256(definition.encode()).hexdigest() == TABLES[dialect]


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_a_ledger_of_another_version_is_refused_with_one_line(tmp_path: Path, version: int) -> None:
    file = tmp_path / "ledger.sqlite3"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE polar_schema (version INTEGER NOT NULL PRIMARY KEY, applied_at BIGINT)")
        connection.execute(f"INSERT INTO polar_schema VALUES ({version}, 0)")
    ledger = Ledger(str(file))
    for act in (ledger.check, ledger.check_exists, lambda: list(ledger.read(Selection(ALL_TENANTS)))):
        with pytest.raises(SchemaVersionError) as caught:
            act()
        said = str(caught.value)
        assert {repr(str(file)), str(version), str(SCHEMA_VERSION)} <= set(re.split("[ ,]+", said))
        assert "--ledger" in said
        assert "\n" not in said
