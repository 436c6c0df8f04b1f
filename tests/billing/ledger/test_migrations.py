"""Ledgers of earlier schemas are brought up with everything in them, and down again, on both stores."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_mock_engine, inspect, text

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger.books import add_book
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.migrate import migrate
from polar_billing.ledger.migrations.stored import past_triggers
from polar_billing.ledger.migrations.versions.v0006 import FORMER
from polar_billing.ledger.postings import Account, Line, post
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.ledger.schema import SCHEMA_VERSION, metadata
from polar_billing.ledger.schema.budgets import hold_triggers
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.query import usage_rows
from polar_billing.statements.issue import issued_statements
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Table

DATA = Path(__file__).parents[1] / "data"
EVERYTHING = Selection(ALL_TENANTS)
ADDED_IN_3 = {"polar_price_in_force"}
ADDED_IN_4 = {"polar_chain_anchor"}
ADDED_IN_6 = {"polar_clock"}
ADDED_IN_5 = "\tvisits_prefill_filled TEXT, \n".replace(", \n", ",\n")
ADDED_IN_7 = {"polar_api_key", "polar_reply"}
TABLES_ADDED_IN_8 = {"polar_rate", "polar_running"}
ADDED_IN_8 = "".join(f"\t{column} BIGINT,\n" for column in ("tokens_drafted", "tokens_accepted", "flops_drafts"))


@pytest.fixture
def old(tmp_path: Path) -> Ledger:
    """A ledger that the first released schema made: eight requests of two tenants."""
    file = tmp_path / "old.sqlite3"
    shutil.copy(DATA / "ledger_v1.sqlite3", file)
    return Ledger(str(file))


@pytest.fixture(params=["sqlite", "postgresql"])
def both(request: pytest.FixtureRequest, old: Ledger, new_postgres: Callable[[], str]) -> Iterator[Ledger]:
    """The same ledger on either store."""
    if request.param == "sqlite":
        yield old
        return
    with Ledger(new_postgres()) as ledger:
        _copy_of_version_1(old, ledger)
        yield ledger


def _copy_of_version_1(old: Ledger, ledger: Ledger) -> None:
    from polar_billing.ledger.migrations.versions.v0001 import _POSTGRES

    rows: dict[str, list[Any]] = {}
    source = sqlite3.connect(str(old.url.database))
    for table in ("polar_schema", "polar_price_book", "polar_usage", "polar_receipt"):
        rows[table] = source.execute(f"SELECT * FROM {table}").fetchall()
    source.close()
    with ledger.unprepared() as connection:
        for statement in _POSTGRES:
            connection.execute(text(statement))
        for table, found in rows.items():
            marks = ", ".join(["%s"] * len(found[0]))
            connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({marks})", [tuple(row) for row in found])
        connection.execute(text("SELECT setval('polar_usage_seq_seq', 8)"))


def test_an_old_ledger_says_what_to_do(old: Ledger) -> None:
    with pytest.raises(SchemaVersionError, match=r"has schema version 1, not 8 as this polar-llm needs.*polar migrate"):
        list(old.read(EVERYTHING))
    with pytest.raises(SchemaVersionError, match="polar migrate"):
        old.check()


def test_an_upgrade_keeps_the_data_and_builds_the_chain(both: Ledger) -> None:
    assert migrate(both) == (1, SCHEMA_VERSION)
    found = {stored.record.request_id: stored for stored in both.read(EVERYTHING)}
    assert sorted(found) == [f"old-{n}" for n in range(8)]
    assert found["old-3"].record.tags == {"team": "sö 'x'"}
    assert found["old-3"].unrated is not None
    verified = verify_ledger(both)
    assert (verified.findings, verified.links) == ([], 9 + len(verified.heads))  # each chain has an anchor
    assert sum(row.requests for row in usage_rows(both, EVERYTHING)) == 8
    replay = found["old-0"].record
    assert Meter(both).emit(replay)["price_book_hash"] == found["old-0"].price_book_hash
    Meter(both).emit(usage_record("new"))
    assert verify_ledger(both).links >= 10
    assert migrate(both) == (SCHEMA_VERSION, SCHEMA_VERSION)


def test_down_and_up_again(both: Ledger) -> None:
    migrate(both)
    before = list(both.read(EVERYTHING))
    assert migrate(both, 1) == (SCHEMA_VERSION, 1)
    with both.unprepared() as connection:
        assert not inspect(connection).has_table("polar_chain_link")
    migrate(both)
    assert list(both.read(EVERYTHING)) == before
    assert verify_ledger(both).sound


def test_filled_visits_are_stored_linked_and_stop_the_way_down(both: Ledger) -> None:
    migrate(both)
    record = usage_record("filled")
    filled = record.model_copy(update={"visits": record.visits.model_copy(update={"prefill_filled": (0, 1, 1)})})
    Meter(both).emit(filled)
    Meter(both).emit(filled)  # a replay
    (stored,) = (one.record for one in both.read(EVERYTHING) if one.record.request_id == "filled")
    assert stored == filled
    assert stored.schema_version == 3
    older = [one.record for one in both.read(EVERYTHING) if one.record.request_id != "filled"]
    assert {(record.schema_version, record.visits.prefill_filled) for record in older} == {(1, ())}
    assert verify_ledger(both).sound
    with pytest.raises(SchemaVersionError, match="'filled' has filled visits, which schema version 4 has no place for"):
        migrate(both, 4)
    with both.transaction() as connection, past_triggers(connection, "polar_usage"):
        connection.execute(text("UPDATE polar_usage SET visits_prefill_filled = NULL WHERE request_id = 'filled'"))
    assert not verify_ledger(both).sound


def test_drafts_are_stored_linked_and_stop_the_way_down(both: Ledger) -> None:
    migrate(both)
    drafted = usage_record("drafted", drafts=(9, 4, 10**9))
    Meter(both).emit(drafted)
    Meter(both).emit(drafted)  # a replay
    (stored,) = (one.record for one in both.read(EVERYTHING) if one.record.request_id == "drafted")
    assert stored == drafted
    assert {one.record.tokens.drafted for one in both.read(EVERYTHING)} == {0, 9}
    assert verify_ledger(both).sound
    with pytest.raises(SchemaVersionError, match="'drafted' has drafts, which schema version 7 has no place for"):
        migrate(both, 7)
    for column in ("tokens_drafted", "tokens_accepted", "flops_drafts"):
        with both.transaction() as connection, past_triggers(connection, "polar_usage"):
            change = f"UPDATE polar_usage SET {column} = {column} {{}} 1 WHERE request_id = 'drafted'"
            connection.execute(text(change.format("+")))
        assert not verify_ledger(both).sound
        with both.transaction() as connection, past_triggers(connection, "polar_usage"):
            connection.execute(text(change.format("-")))
        assert verify_ledger(both).sound


def test_what_has_no_place_in_the_old_schema_stops_the_way_down(both: Ledger) -> None:
    migrate(both)
    with both.transaction() as connection:
        from datetime import UTC, datetime
        from decimal import Decimal

        lines = [Line(Account.CASH, Decimal(1), "USD"), Line(Account.RECEIVABLE, Decimal(-1), "USD")]
        post(connection, "acme", "payment", "p1", lines, datetime(2026, 11, 1, tzinfo=UTC))
    with pytest.raises(SchemaVersionError, match="holds links of version 2, which schema version 3 has no place for"):
        migrate(both, 1)
    assert verify_ledger(both).sound


def _shape(ledger: Ledger) -> dict[str, Any]:
    with ledger.unprepared() as connection:
        look = inspect(connection)
        shape: dict[str, Any] = {
            table: (
                sorted((column["name"], str(column["type"]), column["nullable"]) for column in look.get_columns(table)),
                sorted(
                    (str(index["name"]), tuple(map(str, index["column_names"]))) for index in look.get_indexes(table)
                ),
                sorted(
                    (tuple(key["constrained_columns"]), key["referred_table"]) for key in look.get_foreign_keys(table)
                ),
            )
            for table in look.get_table_names()
            if table != "polar_alembic"
        }
        triggers = (
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
            if connection.dialect.name == "sqlite"
            else "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
        )
        shape["triggers"] = sorted(tuple(map(str, row)) for row in connection.execute(text(triggers)))
        return shape


def test_an_upgraded_ledger_has_the_tables_of_a_new_one(
    both: Ledger, tmp_path: Path, new_postgres: Callable[[], str]
) -> None:
    migrate(both)
    url = f"sqlite:///{tmp_path / 'new.sqlite3'}" if both.url.get_backend_name() == "sqlite" else new_postgres()
    with Ledger(url) as new:
        new.check()
        assert _shape(both) == _shape(new)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_an_unknown_version_is_no_goal(old: Ledger, version: int) -> None:
    with pytest.raises(SchemaVersionError, match=f"schema version {version} is unknown"):
        migrate(old, version)


def test_a_ledger_of_a_later_polar_is_left_alone(old: Ledger) -> None:
    migrate(old)
    with old.transaction() as connection:
        connection.execute(text("INSERT INTO polar_schema VALUES (99, 0)"))
    with pytest.raises(SchemaVersionError, match="schema version 99, newer than the 8"):
        migrate(old)


@pytest.fixture
def second(tmp_path: Path) -> Ledger:
    """A ledger of version 2 with a bit of everything, made by that version."""
    file = tmp_path / "second.sqlite3"
    shutil.copy(DATA / "ledger_v2.sqlite3", file)
    return Ledger(str(file))


def test_a_ledger_of_version_2_is_brought_up_whole(second: Ledger, tmp_path: Path) -> None:
    assert migrate(second) == (2, SCHEMA_VERSION)
    verified = verify_ledger(second)
    assert (verified.findings, verified.links) == ([], 49 + len(verified.heads))  # each chain has an anchor
    assert [len(issued_statements(second, tenant)) for tenant in ("acme", "globex")] == [2, 2]
    assert (
        Meter(second).emit(usage_record("new"))["price_book"] == "polar-example"
    )  # as before, until one is put in force
    with Ledger(str(tmp_path / "new.sqlite3")) as new:
        new.check()
        assert _shape(second) == _shape(new)


def test_version_2_again_and_what_it_has_no_place_for(second: Ledger) -> None:
    migrate(second)
    assert migrate(second, 2) == (SCHEMA_VERSION, 2)
    migrate(second)
    assert add_book(second, PriceBook.example())
    with pytest.raises(SchemaVersionError, match=r"holds links of version 2, which schema version 3 has no place for"):
        migrate(second, 2)


def _statements(url: str, tables: list[Table]) -> list[str]:
    """The statements that make tables on a database, sorted, since some have no order of their own."""
    written: list[str] = []
    engine: Any = create_mock_engine(
        url, lambda statement, *_: written.append(str(statement.compile(dialect=engine.dialect)).strip())
    )
    metadata.create_all(engine, tables=tables, checkfirst=False)
    return sorted("\n".join(line.rstrip() for line in f"{one};".splitlines()) for one in written)


def _definition(tables: list[Table]) -> str:
    stores = ("sqlite://", "postgresql+psycopg://")
    return "\n".join(one for url in stores for one in _statements(url, tables)) + "\n"


def _pins() -> Iterator[tuple[Path, str]]:
    added: set[str] = set()
    later = {7: TABLES_ADDED_IN_8, 6: ADDED_IN_7, 5: ADDED_IN_6, 3: ADDED_IN_4, 2: ADDED_IN_3}
    for version in range(SCHEMA_VERSION, 1, -1):
        added |= later.get(version, set())
        definition = _definition([table for table in metadata.sorted_tables if table.name not in added])
        if version < 8:
            definition = definition.replace(ADDED_IN_8, "")
        if version < 6:
            definition = _before_renewals(definition)
        yield DATA / f"schema_v{version}.sql", definition if version > 4 else definition.replace(ADDED_IN_5, "")


def _before_renewals(definition: str) -> str:
    """With the triggers of holds that schema versions 2 to 5 had."""
    for store, triggers in FORMER.items():
        for name, former in triggers.items():
            definition = definition.replace(hold_triggers(store)[name], former)
    return definition


def test_the_tables_are_what_they_were() -> None:
    """Migrations make tables from their definition, so a change of one needs a new version, and the old one as text.

    Until version 8 is released, `python tests/billing/ledger/test_migrations.py` writes the definitions anew.
    """
    for pinned, definition in _pins():
        assert definition == pinned.read_text(encoding="utf-8"), pinned.name


if __name__ == "__main__":
    for file, content in _pins():
        file.write_text(content, encoding="utf-8")
