"""The database under the ledger: connections that are durable, transactions that take turns, statements over many rows.

The two kinds of database do not need separate classes: SQLite needs settings per connection and an explicit BEGIN,
PostgreSQL neither. For thousands of rows, statements are prepared once and take values as the database stores them,
bypassing SQLAlchemy's column types, whose work per value would cost more than the database's own. Knows no particular
table.
"""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import threading
import time
from contextlib import closing, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    ARRAY,
    URL,
    BigInteger,
    Connection,
    Engine,
    StaticPool,
    Text,
    any_,
    bindparam,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from polar_billing.errors import MissingExtraError, StoreDamagedError, StoreLockedError, StoreReadOnlyError
from polar_billing.ledger.location import describe, is_overflow, is_sqlite_memory, translate
from polar_billing.values.canonical import canonical_json
from polar_sdk.errors import PolarError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import ColumnElement, Dialect, Result, Select, Table
    from sqlalchemy.engine import ExceptionContext


BUSY_TIMEOUT_MS: Final = 10_000
"""How long a writer waits for its turn before the ledger counts as locked. Unit: milliseconds."""

PATIENCE_S: Final = 60.0
"""How long a transaction waits for its turn where there is no spool to fall back on. Unit: seconds."""

_WRITES: Final = "polar_writes"
_WAITS: Final = "polar_waits_s"

_TEXTS: Final = "among"
_LOCK_EACH: Final = select(
    func.pg_advisory_xact_lock(func.unnest(bindparam("keys", type_=ARRAY(BigInteger))).column_valued("key"))
)
_COPY_FROM: Final = 20
"""Rows from which COPY pays for its two round trips on PostgreSQL."""


class Database:
    """An engine created on first use, and transactions on it that raise `StoreError`.

    Writers of one process queue on a lock rather than on the database's busy handler, which sleeps and is not
    fair. After a fork the child creates its own engine and lock: connections must not be shared across
    processes.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.in_memory = is_sqlite_memory(url)
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._engine: Engine | None = None
        self._creating = threading.Lock()
        self._writing = threading.RLock()

    @property
    def is_sqlite(self) -> bool:
        """True on SQLite, where a database is a file or memory."""
        return self.url.get_backend_name() == "sqlite"

    @property
    def engine(self) -> Engine:
        """The engine; created on first use, and again after `close` or a fork."""
        if self._process != os.getpid():
            if self._engine is not None:
                self._engine.dispose(close=False)  # the parent still uses these connections
            self._reset()
        with self._creating:
            if self._engine is None:
                self._engine = self._create_engine()
            return self._engine

    def _create_engine(self) -> Engine:
        if self.is_sqlite:
            # One connection for a database in memory, since another one would see another database.
            options: dict[str, Any] = {"poolclass": StaticPool} if self.in_memory else {}
            engine = create_engine(self.url, connect_args={"check_same_thread": False}, **options)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            event.listen(engine, "handle_error", _name_overflow)
            return engine
        try:
            return create_engine(self.url, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise MissingExtraError.of(f"ledger {describe(self.url)!r}", error, "postgres") from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the ledger throughout."""
        engine = self.engine
        if self.in_memory:  # its one connection is shared, so readers take turns as well
            with self._writing, self._translated(), engine.begin() as connection:
                yield connection
            return
        options: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self._translated(), engine.connect() as plain:
            connection = plain.execution_options(**options)
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self, *, keep: bool = True, patience_s: float | None = None) -> Iterator[Connection]:
        """A transaction that holds the write lock from its beginning; durable when the block has ended.

        Args:
            keep: False to roll everything back at the end.
            patience_s: How long to wait for other processes that write a SQLite file; None for
                `BUSY_TIMEOUT_MS`. Unit: seconds.

        Raises:
            StoreError: The database cannot be opened or written; nothing was stored in part.
            IntegrityError: A key exists already; the caller knows what that means.
        """
        engine = self.engine
        turn = self._writing if self.is_sqlite else nullcontext()
        with turn, self._translated(), engine.connect() as plain:
            connection = plain.execution_options(
                **{_WRITES: True, _WAITS: BUSY_TIMEOUT_MS / 1000 if patience_s is None else patience_s}
            )
            with connection.begin() as transaction:
                yield connection
                if not keep:
                    transaction.rollback()

    def use_write_ahead_log(self) -> None:
        """Allow readers and a writer of a SQLite file to work side by side; the file remembers it.

        SQLite does not wait for its turn here as it does elsewhere, so this method does.
        """
        deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
        while True:
            try:
                with self._translated(), closing(self.engine.raw_connection()) as connection:
                    connection.cursor().execute("PRAGMA journal_mode = WAL")
            except StoreReadOnlyError:
                return  # reading works without it; the first write raises
            except StoreLockedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise translate(error.orig, self.url) from error
        except sqlite3.Error as error:  # from a raw connection
            raise translate(error, self.url) from error
        except UnicodeDecodeError as error:  # a file with damaged bytes, read by SQLite's driver
            raise StoreDamagedError(
                f"ledger {describe(self.url)!r} is damaged: it holds text that is not {error.encoding}.",
                hint="Restore it from a backup, or save what `sqlite3 FILE .recover` reads.",
            ) from error
        except Exception as error:
            if getattr(error, "sqlstate", self) is self or isinstance(error, PolarError):
                raise
            raise translate(error, self.url) from error  # from a raw connection to PostgreSQL

    def close(self) -> None:
        """Release the connections; the next use opens new ones."""
        with self._creating:
            if self._engine is not None and self._process == os.getpid():
                self._engine.dispose()
            self._engine = None


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions on its own; see _begin_sqlite
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = FULL")  # in WAL mode the default may lose the last commits to a power cut
    cursor.execute("PRAGMA cache_size = -65536")  # KiB: the upper pages of the indexes of some million requests
    cursor.execute("PRAGMA wal_autocheckpoint = 4000")  # pages: fewer copies of the same page into the file
    cursor.close()


def _name_overflow(context: ExceptionContext) -> DataError | None:
    """Numbers that add up to too much are an error of what is stored, not of the database as SQLite's driver has it."""
    error = context.original_exception
    return DataError(context.statement, context.parameters, error) if is_overflow(error) else None


def _begin_sqlite(connection: Connection) -> None:
    # A writer that begins as a reader cannot wait for its turn when it upgrades; it fails at once. So:
    # IMMEDIATE.
    if not connection.get_execution_options().get(_WRITES, False):
        connection.exec_driver_sql("BEGIN")
        return
    driver: Any = connection.connection.driver_connection
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        _take_turn(driver, connection.get_execution_options()[_WAITS])
    finally:
        driver.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


def _take_turn(driver: Any, patience_s: float) -> None:
    """Begin a write transaction, trying more often the longer it waits.

    SQLite's own waiting tries ever more rarely, so that among many writers the newest wins and some may never have a
    turn. Here the writer that has waited longest is the likeliest to be next.
    """
    begun = time.monotonic()
    while True:
        try:
            driver.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            waited = time.monotonic() - begun
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or waited > patience_s:
                raise
            time.sleep(random.uniform(0.001, 0.006) / (1 + 2 * waited))
        else:
            return


def lock_counts(connection: Connection, tenants: Iterable[str]) -> None:
    """Keep others from counting the usage and holds of tenants, and from changing what counts, until this ends.

    Whoever reads a counter to decide by it takes this lock first; whoever stores usage takes it once that is written,
    so that others decide meanwhile. It comes after `chain.lock_heads` where both are taken. Locks are taken in one
    order, so that two cannot wait for each other. On SQLite a write transaction is alone already.
    """
    if connection.dialect.name == "postgresql":
        digests = (hashlib.sha256(f"polar counts {tenant}".encode()).digest() for tenant in tenants)
        keys = sorted(int.from_bytes(digest[:8], "big", signed=True) for digest in digests)
        connection.execute(_LOCK_EACH, {"keys": keys})


class KeyedQuery:
    """A query for the rows where a column of texts is one of those given, built once and run often.

    All texts travel as one parameter: thousands of parameters cost more than the query, and SQLite limits their
    number.
    """

    def __init__(self, query: Select[Any], column: ColumnElement[str]) -> None:
        unpacked = func.json_each(bindparam(_TEXTS, type_=Text)).table_valued("value")
        self._on_sqlite = query.where(column.in_(select(unpacked.c.value)))
        self._on_postgres = query.where(column == any_(bindparam(_TEXTS, type_=ARRAY(Text))))

    def run(self, connection: Connection, texts: Iterable[str], **others: Any) -> Result[Any]:
        """Run it for these texts, with the query's own parameters."""
        if connection.dialect.name == "postgresql":
            return connection.execute(self._on_postgres, {_TEXTS: list(texts), **others})
        return connection.execute(self._on_sqlite, {_TEXTS: canonical_json(list(texts)).decode(), **others})


def insert_rows(connection: Connection, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows of raw values: integers, text, bytes or None, in the order of the table's columns."""
    if not rows:
        return
    dialect = connection.dialect
    if dialect.name != "postgresql" or len(rows) < _COPY_FROM:
        # An error rolls the whole transaction back, so SQLite need not keep what would undo a single row.
        verb = "INSERT OR FAIL" if dialect.name == "sqlite" else "INSERT"
        connection.exec_driver_sql(f"{verb} {_into(table, dialect)}", list(rows))
        return
    driver: Any = connection.connection.driver_connection
    statement = f"COPY {_place(table, dialect)} FROM STDIN"
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except dialect.loaded_dbapi.IntegrityError as error:
        raise IntegrityError(statement, None, error) from error  # as SQLAlchemy's own statements do


def upsert_rows(connection: Connection, table: Table, rows: Sequence[tuple[Any, ...]], changes: Sequence[str]) -> None:
    """Insert rows of raw values, or change those of the same primary key, which is one column; in order.

    No two rows have the same key. `changes` are SQL assignments to the stored row, over `excluded`, the row given;
    without any it stays as it is.
    """
    if not rows:
        return
    dialect = connection.dialect
    (key,) = table.primary_key.columns
    then = f"UPDATE SET {', '.join(changes)}" if changes else "NOTHING"
    conflict = f"ON CONFLICT ({key.name}) DO {then}"
    if dialect.name == "postgresql":
        columns = tuple(map(list, zip(*rows, strict=True)))
        connection.exec_driver_sql(f"INSERT {_into_from_arrays(table, dialect)} {conflict}", columns)
    else:
        connection.exec_driver_sql(f"INSERT {_into(table, dialect)} {conflict}", list(rows))


@lru_cache(maxsize=64)
def _place(table: Table, dialect: Dialect) -> str:
    quote = dialect.identifier_preparer.quote
    return f"{quote(table.name)} ({', '.join(quote(column.name) for column in table.c)})"


@lru_cache(maxsize=64)
def _into(table: Table, dialect: Dialect) -> str:
    mark = "%s" if dialect.name == "postgresql" else "?"
    return f"INTO {_place(table, dialect)} VALUES ({', '.join([mark] * len(table.c))})"


@lru_cache(maxsize=64)
def _into_from_arrays(table: Table, dialect: Dialect) -> str:
    arrays = ", ".join(f"%s::{column.type.compile(dialect)}[]" for column in table.c)
    return f"INTO {_place(table, dialect)} SELECT * FROM unnest({arrays})"
