"""The ledger on SQL: SQLite by default, PostgreSQL by URL, one code for both.

Stores facts and receipts; knows nothing of how prices are applied or reports made.
"""

from __future__ import annotations

import shutil
import threading
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ColumnElement, Connection, func, insert, inspect, select, text
from sqlalchemy.exc import IntegrityError

from polar_billing import store_errors
from polar_billing.connection import Database
from polar_billing.errors import ConflictError, SchemaVersionError, StoreReadOnlyError
from polar_billing.location import default_file, describe, resolve, sqlite_file
from polar_billing.price_book import PriceBook
from polar_billing.rows import from_row, to_row
from polar_billing.schema import (
    SCHEMA_VERSION,
    metadata,
    price_book_table,
    probe_table,
    receipt_table,
    usage_table,
    version_table,
)
from polar_billing.storage import AllTenants, LedgerStorage, Selection, StoredUsage, content_hash

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from sqlalchemy import URL, Row, Select

    from polar_billing.rating import Rating
    from polar_sdk.usage import UsageRecord

__all__ = ["Ledger"]

_LEAST_FREE_BYTES: Final = 4 * 2**20
"""Below this much free disk a ledger file counts as full: a record takes some 2 kB, but the write-ahead log
and its checkpoint need room as well, and other programs write too."""

_PROBE: Final = "x" * 16_384
_ROWS_AT_ONCE: Final = 1_000
_SCHEMA_LOCK: Final = 0x506F4C6172  # "PoLar"; any number that only this package takes


class Ledger(LedgerStorage):
    """An append-only ledger of usage in a SQL database.

    Args:
        ledger: A SQLAlchemy URL or the path of a SQLite file; None for `POLAR_LEDGER`, or else
            `polar/ledger.sqlite3` in the user's data folder, which is created when it is first written.

    Raises:
        LedgerUrlError: The URL names no supported store.
    """

    def __init__(self, ledger: str | None = None) -> None:
        self.url: URL = resolve(ledger)
        self._database = Database(self.url)
        self._preparing = threading.Lock()
        self._forget()

    @property
    def location(self) -> str:
        """The path of the file, or the URL without its password."""
        return describe(self.url)

    def check(self) -> None:
        """Raise StoreError if a record could not be stored now.

        Tries a write and takes it back, and looks at the free disk, which such a write does not touch.
        """
        self._prepare()
        with self._database.writing(keep=False) as connection:
            connection.execute(insert(probe_table).values(payload=_PROBE))
        file = sqlite_file(self.url)
        if file is not None:
            free = shutil.disk_usage(file.parent).free
            if free < _LEAST_FREE_BYTES:
                raise store_errors.disk_full(self.url, free, _LEAST_FREE_BYTES)

    def append(self, record: UsageRecord, *, source: str, book: PriceBook, rating: Rating) -> StoredUsage:
        """Store one record with its receipt; see `LedgerStorage.append`."""
        self._prepare()
        try:
            stored = self._append(record, source, book, rating)
        except IntegrityError:  # PostgreSQL: another session stored the same key or book since we looked
            stored = self._append(record, source, book, rating)
        self._known_books.add(book.content_hash)
        return stored

    def _append(self, record: UsageRecord, source: str, book: PriceBook, rating: Rating) -> StoredUsage:
        digest = content_hash(record)
        with self._database.writing() as connection:
            found = connection.execute(_one(record.tenant, source, record.request_id)).one_or_none()
            if found is not None:
                return _replayed(found, digest)
            if book.content_hash not in self._known_books:
                _store_book(connection, book)
            now = datetime.now(UTC)
            row = to_row(record, source=source, digest=digest, stored_at=now)
            seq = connection.execute(insert(usage_table).values(row).returning(usage_table.c.seq)).scalar_one()
            cost = rating.cost
            receipt = {"price_book_hash": book.content_hash, "cost": cost, "unrated": rating.unrated}
            connection.execute(insert(receipt_table).values(usage_seq=seq, **receipt))
        return StoredUsage(seq, source, record, now, book.content_hash, cost, rating.unrated)

    def read(self, selection: Selection, *, newest: int | None = None) -> Iterator[StoredUsage]:
        """Read usage in the order it was served; see `LedgerStorage.read`."""
        if not self._has_tables():
            return
        query = _joined().where(*_conditions(selection))
        order = (usage_table.c.started_at, usage_table.c.seq)
        query = query.order_by(*order) if newest is None else query.order_by(*(column.desc() for column in order))
        tags = dict(selection.tags)
        if newest is not None and not tags:
            query = query.limit(newest)
        with closing(self._rows(query)) as rows:  # a caller may stop early; the cursor must not outlive that
            found = (
                stored
                for stored in map(from_row, rows)
                if all(stored.record.tags.get(key) == value for key, value in tags.items())
            )
            yield from islice(found, newest)

    def _rows(self, query: Select[Any]) -> Generator[Row[Any], None, None]:
        with self._database.reading() as connection:
            if not self._database.in_memory:
                with connection.execution_options(yield_per=_ROWS_AT_ONCE).execute(query) as result:
                    yield from result
                return
            rows = connection.execute(query).all()
        yield from rows  # its one connection must be free while the caller works

    def price_books(self) -> dict[str, PriceBook]:
        """Every book that ever rated a record, by content hash."""
        if not self._has_tables():
            return {}
        with self._database.reading() as connection:
            rows = connection.execute(select(price_book_table.c.hash, price_book_table.c.document))
            return {row.hash: PriceBook.from_document(row.document) for row in rows}

    def close(self) -> None:
        """Release connections."""
        self._database.close()
        self._forget()

    def _forget(self) -> None:
        self._prepared_file: tuple[int, int] | None = None
        self._known_books: set[str] = set()

    def _file_identity(self) -> tuple[int, int]:
        """Which file the URL leads to now; the same for all that are no plain file."""
        file = sqlite_file(self.url)
        if file is None:
            return (0, 0)
        try:
            found = file.stat()
        except OSError:
            return (-1, -1)
        return (found.st_dev, found.st_ino)

    def _is_prepared(self) -> bool:
        if self._prepared_file is None:
            return False
        if self._prepared_file == self._file_identity():
            return True
        self.close()  # the file was removed or replaced: what an open connection wrote there would be lost
        return False

    def _has_tables(self) -> bool:
        """True if there is something to read; never creates anything."""
        if self._is_prepared():
            return True
        file = sqlite_file(self.url)
        if file is not None and not file.exists() and (file.parent.is_dir() or file == default_file()):
            return False  # not made yet; a missing folder is for the database to complain about
        with self._database.reading() as connection:
            return self._version(connection) is not None

    def _prepare(self) -> None:
        """Create the tables on first use, once, however many threads and processes begin together."""
        if self._is_prepared():
            return
        with self._preparing:
            if self._is_prepared():  # another thread was first
                return
            self._make_default_folder()
            if self._database.is_sqlite and not self._database.in_memory:
                self._database.use_write_ahead_log()
            with self._database.reading() as connection:
                version = self._version(connection)
            if version is None:
                self._create()
            self._prepared_file = self._file_identity()

    def _make_default_folder(self) -> None:
        """Create the folder that nobody named; where somebody did name one, a missing one is a mistake."""
        folder = default_file().parent
        if sqlite_file(self.url) != default_file() or folder.is_dir():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreReadOnlyError(
                f"ledger folder {str(folder)!r} cannot be created ({error.strerror}).",
                hint="Set POLAR_LEDGER to a place you may write, or pass ledger=None to run unmetered.",
            ) from error

    def _create(self) -> None:
        with self._database.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
            if self._version(connection) is None:  # another process may have been first
                metadata.create_all(connection)
                first = {"version": SCHEMA_VERSION, "applied_at": datetime.now(UTC)}
                connection.execute(insert(version_table).values(first))

    def _version(self, connection: Connection) -> int | None:
        if not inspect(connection).has_table(version_table.name):
            return None
        version: int | None = connection.execute(select(func.max(version_table.c.version))).scalar()
        if version != SCHEMA_VERSION:
            raise SchemaVersionError(
                f"ledger {self.location!r} has schema version {version}, not {SCHEMA_VERSION} as this polar-llm needs.",
                hint="Use the polar-llm that made it, or name another ledger.",
            )
        return version


def _joined() -> Select[Any]:
    receipt = receipt_table.c
    return select(usage_table, receipt.price_book_hash, receipt.cost, receipt.unrated).join(
        receipt_table, receipt.usage_seq == usage_table.c.seq
    )


def _one(tenant: str, source: str, request_id: str) -> Select[Any]:
    usage = usage_table.c
    return _joined().where(usage.tenant == tenant, usage.source == source, usage.request_id == request_id)


def _replayed(row: Row[Any], digest: str) -> StoredUsage:
    if row.content_hash != digest:
        raise ConflictError(
            f"request {row.request_id!r} of tenant {row.tenant!r} is in the ledger (seq {row.seq}) with other content.",
            hint="Give every request an id of its own; the first record stands.",
        )
    return from_row(row)


def _store_book(connection: Connection, book: PriceBook) -> None:
    known = select(price_book_table.c.hash).where(price_book_table.c.hash == book.content_hash)
    if connection.execute(known).first() is None:
        values = {
            "hash": book.content_hash,
            "id": book.id,
            "document": book.document,
            "stored_at": datetime.now(UTC),
        }
        connection.execute(insert(price_book_table).values(values))


def _conditions(selection: Selection) -> list[ColumnElement[bool]]:
    usage = usage_table.c
    wanted: list[ColumnElement[bool]] = []
    if not isinstance(selection.tenant, AllTenants):
        wanted.append(usage.tenant == selection.tenant)
    if selection.period.since is not None:
        wanted.append(usage.started_at >= selection.period.since)
    if selection.period.until is not None:
        wanted.append(usage.started_at < selection.period.until)
    if selection.tier is not None:
        wanted.append(usage.tier == selection.tier)
    if selection.model is not None:
        wanted.append(usage.model == selection.model)
    return wanted
