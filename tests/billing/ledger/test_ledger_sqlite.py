"""Faults of a SQLite ledger, made to happen for real."""

from __future__ import annotations

import os
import sqlite3
import sys
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from polar_billing.errors import (
    LedgerUrlError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
)
from polar_billing.ledger import connection
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.ledger.schema.base import SCHEMA_VERSION
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_sdk.errors import SinkError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERYTHING = Selection(ALL_TENANTS)


@pytest.fixture
def file(tmp_path: Path, ledger_url: str) -> Path:
    """A ledger file with one record, closed."""
    meter = Meter(ledger_url)
    meter.emit(usage_record("first"))
    meter.close()
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def raw(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection past this package, as a stranger would open one."""
    connection = sqlite3.connect(file, isolation_level=None)
    yield connection
    connection.close()


def held(file: Path) -> list[str]:
    with Ledger(str(file)) as ledger:
        return [stored.record.request_id for stored in ledger.read(EVERYTHING)]


def assert_told(error: StoreError, name: object = "") -> None:
    assert isinstance(error, SinkError)
    assert error.exit_code == 1
    assert "\n" not in str(error)
    assert error.hint
    assert str(name) in str(error)


def test_nothing_is_made_before_the_first_write(tmp_path: Path, ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    assert list(ledger.read(EVERYTHING)) == []
    assert ledger.price_books() == {}
    assert list(tmp_path.iterdir()) == []
    ledger.check()
    assert (tmp_path / "ledger.sqlite3").exists()
    ledger.close()


def test_the_file_is_durable_and_checks_references(file: Path, raw: sqlite3.Connection) -> None:
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with Ledger(str(file)) as ledger, ledger._database.writing() as made:
        assert made.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert made.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_what_is_stored_cannot_be_changed_past_this_package(raw: sqlite3.Connection) -> None:
    before = raw.execute("SELECT * FROM polar_usage NATURAL JOIN polar_receipt").fetchall()
    for statement in (
        "UPDATE polar_usage SET tenant = 'other'",
        "UPDATE polar_usage SET flops_total = flops_total + 1",
        "DELETE FROM polar_usage",
        "INSERT OR REPLACE INTO polar_usage SELECT * FROM polar_usage",
        "REPLACE INTO polar_receipt SELECT usage_seq, price_book_hash, 0, NULL FROM polar_receipt",
        "UPDATE polar_receipt SET cost = 0",
        "DELETE FROM polar_receipt",
        "UPDATE polar_price_book SET document = '{}'",
        "REPLACE INTO polar_price_book SELECT hash, id, '{}', stored_at FROM polar_price_book",
        "DELETE FROM polar_price_book",
        "UPDATE polar_schema SET version = 3",
        f"INSERT OR REPLACE INTO polar_schema VALUES ({SCHEMA_VERSION}, 0)",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            raw.execute(statement)
    assert raw.execute("SELECT * FROM polar_usage NATURAL JOIN polar_receipt").fetchall() == before


def test_a_read_only_ledger_is_refused_before_compute_and_can_be_read(file: Path) -> None:
    url = f"sqlite:///file:{file}?mode=ro&uri=true"
    with Ledger(url) as ledger:
        with pytest.raises(StoreReadOnlyError) as caught:
            ledger.check()
        assert_told(caught.value, "ledger.sqlite3")
        with pytest.raises(StoreReadOnlyError):
            Meter(ledger).emit(usage_record())
        assert [stored.record.request_id for stored in ledger.read(EVERYTHING)] == ["first"]
    assert held(file) == ["first"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no chmod of this kind")
def test_a_file_without_write_permission_is_read_only(file: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    file.chmod(0o444)
    with Ledger(str(file)) as ledger, pytest.raises(StoreReadOnlyError):
        ledger.check()


def test_a_missing_folder_is_told_and_not_made(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such"
    with pytest.raises(StoreNotFoundError) as caught:
        Ledger(f"sqlite:///{missing / 'ledger.sqlite3'}").check()
    assert_told(caught.value, missing)
    assert not missing.exists()


def test_a_folder_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError) as caught:
        Ledger(str(tmp_path)).check()
    assert_told(caught.value, tmp_path)


@pytest.mark.parametrize("size", [64, 100_000])
def test_another_file_is_no_ledger_and_stays_as_it_is(tmp_path: Path, size: int) -> None:
    file = tmp_path / "notes.txt"
    content = b"not a database\n" * size
    file.write_bytes(content)
    for act in (lambda ledger: ledger.check(), lambda ledger: list(ledger.read(EVERYTHING))):
        with Ledger(str(file)) as ledger, pytest.raises(StoreDamagedError) as caught:
            act(ledger)
        assert_told(caught.value, file)
    assert file.read_bytes() == content


def test_a_damaged_ledger_is_told(file: Path) -> None:
    with sqlite3.connect(file) as fold:
        fold.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    fold.close()
    data = bytearray(file.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    file.write_bytes(data)
    with Ledger(str(file)) as ledger, pytest.raises(StoreDamagedError) as caught:
        list(ledger.read(EVERYTHING))
    assert_told(caught.value, file)


def test_a_full_database_is_told_and_unharmed(file: Path) -> None:
    with Ledger(str(file)) as ledger:
        event.listen(ledger._database.engine, "connect", _no_more_pages)
        with pytest.raises(StoreFullError) as caught:
            ledger.check()
        assert_told(caught.value, file)
        with pytest.raises(StoreFullError):
            Meter(ledger).emit(usage_record("too much", tags={"long": "x" * 100_000}))
        assert [stored.record.request_id for stored in ledger.read(EVERYTHING)] == ["first"]
    assert held(file) == ["first"]


def _no_more_pages(connection: sqlite3.Connection, _record: object) -> None:
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/shm is Linux's")
def test_the_free_disk_is_looked_at(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_billing.ledger.ledger._MIN_FREE_BYTES", 2**62)
    with pytest.raises(StoreFullError) as caught:
        ledger.check()
    assert_told(caught.value)


def test_a_locked_ledger_is_told_and_can_be_tried_again(
    file: Path, raw: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_MS", 50)
    with Ledger(str(file)) as ledger:
        meter = Meter(ledger)
        raw.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLockedError) as caught:
            meter.emit_many([usage_record("second")])
        assert_told(caught.value, file)
        assert caught.value.retryable
        raw.execute("ROLLBACK")
        meter.emit_many([usage_record("second")])
    assert sorted(held(file)) == ["first", "second"]


def test_a_ledger_removed_while_in_use_is_made_again(file: Path) -> None:
    with Ledger(str(file)) as ledger:
        meter = Meter(ledger)
        meter.emit(usage_record("second"))
        for part in file.parent.glob("ledger.sqlite3*"):
            if part.is_file():
                part.unlink()
        meter.check()
        meter.emit(usage_record("third"))
    assert held(file) == ["third"]  # not written to a file that no longer has a name


def test_the_default_ledger_is_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLAR_LEDGER")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with Ledger() as ledger:
        assert list(ledger.read(EVERYTHING)) == []
        assert not (tmp_path / "data").exists()
        ledger.check()
        if sys.platform.startswith("linux"):
            assert ledger.location == str(tmp_path / "data" / "polar" / "ledger.sqlite3")
    with Ledger() as again:
        assert list(again.read(EVERYTHING)) == []


def test_a_plain_path_is_a_sqlite_file_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.sqlite3", "sqlite:///mine.sqlite3"):
        assert Ledger(name).location == str(tmp_path / "mine.sqlite3")


@pytest.mark.parametrize("url", ["mysql://root:secret@host/db", "no such://thing", "sqlite+nope:/x", "://"])
def test_an_unsupported_url_is_the_users_mistake_and_keeps_its_password(url: str) -> None:
    with pytest.raises(LedgerUrlError) as caught:
        Ledger(f"{url}" if "://" in url else f"{url}://")
    assert caught.value.exit_code == 2
    assert "secret" not in str(caught.value)
    assert "sqlite:///FILE" in str(caught.value)
