"""The ledger's database in a simulated machine: each statement and each commit is a seam, and may fail.

Engines are kept from one schedule to the next, one per process that lives at the same time, because what SQLAlchemy
compiles once would otherwise cost more than the schedule. Connections are of one process: killed, they are closed,
which rolls back. A power cut leaves of SQLite's write-ahead log what was committed with `synchronous = FULL`.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import create_engine, event

from tests.simulation import seams
from tests.simulation.world import World

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import URL, Engine

    from tests.simulation.world import Process


FULL: Final = (sqlite3.SQLITE_FULL, "database or disk is full")
LOCKED: Final = (sqlite3.SQLITE_BUSY, "database is locked")
BROKEN: Final = (sqlite3.SQLITE_IOERR, "disk I/O error")

_WRITES: Final = {"INSERT", "UPDATE", "DELETE", "COMMIT"}
_DURABLE: Final = 2
"""`synchronous = FULL`."""


class Database:
    """How the database behaves in the world whose schedule runs."""

    now_in: Database | None = None

    def __init__(self, file: Path) -> None:
        self.file = file
        self.fails: tuple[int, str] | None = None
        """The error of each write now."""
        self.loses_answers = False
        """Whether commits that succeed are reported as failed, as over a network."""
        self.slow_s = 0.0
        """How much longer a statement may take. Unit: seconds."""
        self.flushed = 0
        """Length of the write-ahead log that a power cut leaves. Unit: bytes."""
        self.connections: dict[sqlite3.Connection, Process] = {}

    @property
    def log(self) -> Path:
        """The write-ahead log."""
        return self.file.with_name(self.file.name + "-wal")

    def statement(self, text: str) -> None:
        """Before a statement is executed."""
        here = seams.world()
        here.step(f"sql {' '.join(text[:60].split())}")
        if self.slow_s:
            here.now += here.random.uniform(0, self.slow_s)
        if self.fails is not None and text.lstrip()[:6].upper() in _WRITES:
            raise _error(*self.fails)

    def committed(self, connection: Any) -> None:
        """After a commit."""
        if self.log.exists() and connection.execute("PRAGMA synchronous").fetchone()[0] >= _DURABLE:
            self.flushed = self.log.stat().st_size
        if self.loses_answers:
            raise _error(*BROKEN)
        seams.world().step("sql COMMITTED")

    def close_those_of(self, process: Process) -> None:
        """Close the connections of a process that has ended."""
        for connection, owner in list(self.connections.items()):
            if owner is process:
                connection.close()
                del self.connections[connection]
        engine = _engines.get(process.slot)
        if engine is not None:
            engine.dispose(close=False)

    def close(self) -> None:
        """The schedule is over."""
        for connection in self.connections:
            connection.close()
        for engine in _engines.values():
            engine.dispose(close=False)

    def cut_power(self) -> None:
        """Leave what was flushed; every process is dead, and its connections are closed after this."""
        content, log = self.file.read_bytes(), self.log.read_bytes() if self.log.exists() else b""
        for connection in self.connections:
            connection.close()
        self.connections.clear()
        for name in ("", "-wal", "-shm"):
            self.file.with_name(self.file.name + name).unlink(missing_ok=True)
        self.file.write_bytes(content)
        if log:
            self.log.write_bytes(log[: self.flushed])


def _error(code: int, message: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(message)
    error.sqlite_errorcode = code
    return error


_engines: Final[dict[int, Engine]] = {}


def make_engine(url: URL, **options: Any) -> Engine:
    """`create_engine`, which makes one engine per slot of the machine."""
    if World.now_in is None or Database.now_in is None or url.database != str(Database.now_in.file):
        return create_engine(url, **options)
    slot = seams.world().process.slot
    if slot not in _engines:
        _engines[slot] = create_engine(url, **options)
        _watch(_engines[slot])
    return _engines[slot]


def _watch(engine: Engine) -> None:
    dialect: Any = engine.dialect

    @event.listens_for(engine, "connect")
    def opened(connection: Any, _record: object) -> None:
        database, task = Database.now_in, seams.world().current
        assert database is not None
        if task is not None:
            database.connections[connection] = task.process

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, _with_seam(getattr(dialect, name)))
    commit, roll_back, close = dialect.do_commit, dialect.do_rollback, dialect.do_close

    def do_commit(connection: Any) -> None:
        assert Database.now_in is not None
        Database.now_in.statement("COMMIT")
        commit(connection)
        Database.now_in.committed(connection.driver_connection)

    def do_rollback(connection: Any) -> None:
        if not seams.is_dead():
            roll_back(connection)

    def do_close(connection: Any) -> None:
        if Database.now_in is not None:
            Database.now_in.connections.pop(connection, None)
        close(connection)

    dialect.do_commit, dialect.do_rollback, dialect.do_close = do_commit, do_rollback, do_close


def _with_seam(execute: Any) -> Any:
    def executed(cursor: Any, statement: str, *rest: Any) -> None:
        if Database.now_in is not None:
            Database.now_in.statement(statement)
        execute(cursor, statement, *rest)

    return executed
