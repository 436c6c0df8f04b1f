"""The ledger on SQL: SQLite by default, PostgreSQL by URL, the same code for both.

Stores facts and receipts; knows nothing of how prices are applied or reports made, nor of how records reach it.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Self

from sqlalchemy import Connection, Text, func, insert, inspect, select, text, type_coerce
from sqlalchemy.exc import IntegrityError

from polar_billing.errors import (
    BillingError,
    ConflictError,
    RecordRefusedError,
    SchemaVersionError,
    StoreNotFoundError,
    StoreReadOnlyError,
)
from polar_billing.ledger.append import is_recorded, is_stored, joined, store_entries
from polar_billing.ledger.books import read_books, read_choices
from polar_billing.ledger.connection import PATIENCE_S, Database
from polar_billing.ledger.location import (
    default_file,
    describe,
    disk_full,
    is_absent,
    resolve,
    sqlite_file,
    translate,
)
from polar_billing.ledger.pending_writers import drain
from polar_billing.ledger.records import from_row
from polar_billing.ledger.retention import pruned_requests
from polar_billing.ledger.rollups import raw_usage_query, read_sums, usage_of
from polar_billing.ledger.schema import (
    SCHEMA_VERSION,
    metadata,
    probe_table,
    usage_table,
    version_table,
)
from polar_billing.values.canonical import canonical_text

if TYPE_CHECKING:
    from collections.abc import Container, Generator, Iterable, Iterator, Sequence

    from sqlalchemy import URL, Row, Select

    from polar_billing.ledger.append import Settle
    from polar_billing.ledger.records import Entry, Identity, Selection, StoredUsage
    from polar_billing.ledger.rollups import RawUsage, Sum
    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.in_force import Choice


_log: Final = logging.getLogger("polar_billing")
_MIN_FREE_BYTES: Final = 4 * 2**20
"""Below this much free disk a ledger file counts as full: a record takes some 2 kB, but the write-ahead log
and its checkpoint need room as well, and other programs write too."""

_PROBE: Final = "x" * 16_384
_ROWS_BATCH: Final = 1_000
_SCHEMA_LOCK: Final = 0x506F4C6172  # "PoLar"; any number that only this package takes


class Ledger:
    """An append-only ledger of usage in a SQL database. Safe to call from several threads.

    * `store` is durable when it returns, and idempotent by (tenant, source, request id).
    * Nothing stored is ever changed or deleted, except by retention, which keeps its proof.
    * Constructing a ledger opens and creates nothing; reading one that does not exist yet finds it empty.

    Args:
        ledger: A SQLAlchemy URL or the path of a SQLite file; None for `POLAR_LEDGER`, or else
            `polar/ledger.sqlite3` in the user's data folder, which is created when it is first written.

    Raises:
        LedgerUrlError: The URL names no supported store.
    """

    def __init__(self, ledger: str | None = None) -> None:
        self.url: URL = resolve(ledger)
        self._file = sqlite_file(self.url)
        self._database = Database(self.url)
        self._preparing = threading.Lock()
        self._books: dict[str, PriceBook] = {}
        """Read before, by content hash: a book never changes."""
        self._forget_file()

    @property
    def location(self) -> str:
        """The path of the file, or the URL without its password."""
        return describe(self.url)

    @property
    def identity(self) -> str:
        """Tells ledgers apart within this process: the URL, or for one in memory the object."""
        url = self.url.render_as_string(hide_password=False)
        return f"{url}#{id(self)}" if self._database.in_memory else url

    def check(self) -> None:
        """Raise StoreError if a record could not be stored now.

        Tries a write, rolls it back, and looks at the free disk space, which such a write does not touch.
        """
        self._prepare()
        with self._database.writing(keep=False) as connection:
            connection.execute(insert(probe_table).values(payload=_PROBE))
        if self._file is not None:
            free = shutil.disk_usage(self._file.parent).free
            if free < _MIN_FREE_BYTES:
                raise disk_full(self.url, free, _MIN_FREE_BYTES)

    def store(
        self, entries: Sequence[Entry], settle: Settle, *, told: Container[int] = ()
    ) -> list[StoredUsage | BillingError]:
        """Store many records with their receipts; one that cannot be stored does not affect the others.

        A record whose request id another one has taken is stored, and charged, under a new id.

        Args:
            entries: The records.
            settle: As for `append_many`.
            told: Indices of those whose callers wait, and are informed of a conflict instead.

        Returns:
            For each entry what is stored, or why it is not: a conflict, or content that the database does not take.

        Raises:
            StoreError: The store cannot take records now.
        """
        answers = self._store_each(entries, settle)
        taken = [n for n, answer in enumerate(answers) if isinstance(answer, ConflictError) and n not in told]
        renamed = [entries[n].renamed() for n in taken]
        for n, entry, answer in zip(taken, renamed, self._store_each(renamed, settle), strict=True):
            answers[n] = answer
            record, new_id = entries[n].record, entry.record.request_id
            _log.warning(
                "request id %r of tenant %r was used again; stored as %r", record.request_id, record.tenant, new_id
            )
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, BillingError):
                _log.error("the ledger refused request %r of tenant %r", entry.record.request_id, entry.record.tenant)
        return answers

    def _store_each(self, entries: Sequence[Entry], settle: Settle) -> list[StoredUsage | BillingError]:
        try:
            return [*self.append_many(entries, settle)]
        except RecordRefusedError as error:  # because of one of them; the others are still to be stored
            return [error] if len(entries) == 1 else [self._store_each([entry], settle)[0] for entry in entries]

    def append_many(self, entries: Sequence[Entry], settle: Settle) -> list[StoredUsage | ConflictError]:
        """Store many records with their receipts in one transaction, in order.

        Args:
            entries: The records.
            settle: Settles what was held for those that were new; see `append.Settle`.

        Returns:
            For each entry what is stored, that of the first time for a replay; or the conflict with another record
            that has its request id, which stores nothing and keeps none of the others out.

        Raises:
            StoreError: The store cannot take them; then nothing was stored.
        """
        if not entries:
            return []
        # Records are taken to be new. Where a key says that one is not, all are stored again, with a lookup of each.
        with suppress(IntegrityError), self._writing() as connection:
            return store_entries(connection, entries, settle, as_new=True)
        try:
            with self._writing() as connection:
                return store_entries(connection, entries, settle, as_new=False)
        except IntegrityError as error:
            raise translate(error.orig, self.url) from error

    @contextmanager
    def _writing(self, patience_s: float | None = None) -> Iterator[Connection]:
        self._prepare()
        with self._database.writing(patience_s=patience_s) as connection:
            yield connection

    @contextmanager
    def transaction(self, *, after_usage: bool = True, patience_s: float | None = PATIENCE_S) -> Iterator[Connection]:
        """A write transaction on the ledger, durable when the block has ended; for `post` and similar functions.

        Args:
            after_usage: False if usage of this process that is not yet stored need not be waited for.
            patience_s: How long to wait for other processes that write a SQLite file; None for `BUSY_TIMEOUT_MS`.
                Unit: seconds.

        Raises:
            StoreError: The ledger cannot be written; nothing of the block was stored.
        """
        if after_usage:
            drain(self.identity)
        with self._writing(patience_s) as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A transaction that sees one state of the ledger throughout; for `balances` and similar functions.

        A ledger that does not exist yet is seen as an empty one, and looking does not create it.

        Raises:
            StoreError: The ledger cannot be read.
        """
        drain(self.identity)
        if not self._has_tables():
            with Ledger("sqlite://") as empty, empty.transaction() as connection:
                yield connection
            return
        self._prepare()  # one that was moved here may lack its write-ahead log, without which readers keep writers out
        with self._database.reading() as connection:
            yield connection

    def count(self, selection: Selection) -> int:
        """Number of the records that `read` gives, whatever their tags."""
        query = select(func.count()).select_from(usage_table).where(*usage_of(selection))
        with self.snapshot() as connection:
            return int(connection.execute(query).scalar_one())

    def count_pruned(self, selection: Selection) -> int:
        """Number of requests that a selection may cover whose facts retention deleted; see `pruned_requests`."""
        with self.snapshot() as connection:
            return sum(pruned_requests(connection, selection).values())

    def read(
        self, selection: Selection, *, newest: int | None = None, as_stored: bool = False
    ) -> Iterator[StoredUsage]:
        """Read usage in the order it was served (service time, then seq), from one state of the store.

        Args:
            selection: Which records.
            newest: Only this many of the latest, latest first.
            as_stored: In the order it was stored instead; what is stored later then comes last.
        """
        drain(self.identity)
        if not self._has_tables():
            return
        query, usage = joined().where(*usage_of(selection)), usage_table.c
        order = (usage.seq,) if as_stored else (usage.started_at, usage.seq)
        query = query.order_by(*order) if newest is None else query.order_by(*(column.desc() for column in order))
        tags = dict(selection.tags)
        if newest is not None and not tags:
            query = query.limit(newest)
        with closing(self._rows(query)) as rows:  # a caller may stop early; the cursor must not outlive that
            tagged = (
                stored
                for stored in map(from_row, rows)
                if all(stored.record.tags.get(key) == value for key, value in tags.items())
            )
            yield from islice(tagged, newest)

    def raw_usage(self, selection: Selection) -> Iterator[RawUsage]:
        """Read what reports add up, in no order, from one state of the store; the selection's tags are ignored."""
        drain(self.identity)
        if self._has_tables():
            with closing(self._rows(raw_usage_query(selection))) as rows:
                yield from rows  # type: ignore[misc]  # in the order of its fields

    def tag_values(self, selection: Selection, tag: str) -> Counter[str]:
        """Number of requests by the value of a tag; those without it are in no number."""
        with_tag = type_coerce(usage_table.c.tags, Text).contains(f"{canonical_text(tag)}:", autoescape=True)
        with self.snapshot() as connection:
            found = connection.execute(select(usage_table.c.tags).where(*usage_of(selection), with_tag)).scalars().all()
        wanted = selection.tags.items()
        return Counter(tags[tag] for tags in found if tag in tags and wanted <= tags.items())

    def _rows(self, query: Select[Any]) -> Generator[Row[Any], None, None]:
        with self._database.reading() as connection:
            if not self._database.in_memory:
                with connection.execution_options(yield_per=_ROWS_BATCH).execute(query) as result:
                    yield from result
                return
            rows = connection.execute(query).all()
        yield from rows  # its one connection must be free while the caller works

    def usage_sums(self, selection: Selection, *, hourly: bool, rollups: bool = True) -> Iterator[Sum]:
        """Read usage added up, by tenant, tier, model, source, outcome, price book and reason for no price.

        Requests whose facts retention deleted still count in sums of whole hours.

        Args:
            selection: Which usage; its tags are ignored.
            hourly: Keep hours apart.
            rollups: False to add it all up from usage.
        """
        with self.snapshot() as connection:
            yield from read_sums(connection, selection, hourly=hourly, rollups=rollups)

    def price_books(self) -> dict[str, PriceBook]:
        """Every book that ever rated a record, by content hash."""
        drain(self.identity)
        return self.find_books(None)

    def find_books(self, hashes: Iterable[str] | None) -> dict[str, PriceBook]:
        """The stored books of these hashes, None for all; unlike `price_books` it waits for no record on its way."""
        with self.as_stored() as connection:
            return {} if connection is None else read_books(connection, hashes)

    def is_stored(self, identity: Identity) -> bool:
        """True if a request is stored, or was before retention; it waits for no record on its way."""
        with self.as_stored() as connection:
            return connection is not None and is_stored(connection, identity)

    def is_recorded(self, entry: Entry) -> bool:
        """True if the request of an entry is stored, with this or with other content; see `append.is_recorded`."""
        with self.as_stored() as connection:
            return connection is not None and is_recorded(connection, entry)

    def price_choices(self) -> Sequence[Choice]:
        """The price books that were put in force, in order."""
        with self.as_stored() as connection:
            return () if connection is None else read_choices(connection, self._books)

    @contextmanager
    def as_stored(self) -> Iterator[Connection | None]:
        """A transaction that sees what is stored now; None if there are no tables yet."""
        if not self._has_tables():
            yield None
            return
        with self._database.reading() as connection:
            yield connection

    def close(self) -> None:
        """Release connections; the ledger can be used again and then opens new ones."""
        self._database.close()
        self._forget_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget_file(self) -> None:
        self._prepared_file: tuple[int, int] | None = None

    def _file_identity(self) -> tuple[int, int]:
        """Which file the URL leads to now; the same for all that are not plain files."""
        if self._file is None:
            return (0, 0)
        try:
            status = self._file.stat()
        except OSError:
            return (-1, -1)
        return (status.st_dev, status.st_ino)

    def _is_prepared(self) -> bool:
        if self._prepared_file is None:
            return False
        if self._prepared_file == self._file_identity():
            return True
        self.close()  # the file was removed or replaced: what an open connection writes there would be lost
        return False

    def check_exists(self) -> None:
        """Raise if there is nothing yet, for callers that would otherwise prove an empty ledger sound."""
        if not self._has_tables():
            raise StoreNotFoundError(
                f"ledger {self.location!r} is empty.", hint="Name another one with --ledger or POLAR_LEDGER."
            )

    def _has_tables(self) -> bool:
        """True if there is something to read; never creates anything."""
        if self._is_prepared():
            return True
        if is_absent(self.url):
            return False
        with self._database.reading() as connection:
            return self._has_schema(connection)

    def _prepare(self) -> None:
        """Create the tables on first use, once, even if many threads and processes start together."""
        if self._is_prepared():
            return
        with self._preparing:
            if self._is_prepared():  # another thread was first
                return
            self._make_default_folder()
            if self._database.is_sqlite and not self._database.in_memory:
                self._database.use_write_ahead_log()
            with self._database.reading() as connection:
                exists = self._has_schema(connection)
            if not exists:
                self._create()
            self._prepared_file = self._file_identity()

    def _make_default_folder(self) -> None:
        """Create the default folder; where the user named one, a missing folder is a mistake."""
        folder = default_file().parent
        if self._file != default_file() or folder.is_dir():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreReadOnlyError(
                f"ledger folder {str(folder)!r} cannot be created ({error.strerror}).",
                hint="Set POLAR_LEDGER to a file in a writable folder, or pass ledger=None to run unmetered.",
            ) from error

    def _create(self) -> None:
        with self._database.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
            if not self._has_schema(connection):  # another process may have been first
                metadata.create_all(connection)
                first = {"version": SCHEMA_VERSION, "applied_at": datetime.now(UTC)}
                connection.execute(insert(version_table).values(first))

    def _has_schema(self, connection: Connection) -> bool:
        """True if the tables are there; those of another version are refused."""
        if not inspect(connection).has_table(version_table.name):
            return False
        version: int | None = connection.execute(select(func.max(version_table.c.version))).scalar()
        if version not in {None, SCHEMA_VERSION}:
            raise SchemaVersionError(
                f"ledger {self.location!r} has schema version {version}, not {SCHEMA_VERSION} as this polar-llm needs.",
                hint="Name a new one with --ledger or POLAR_LEDGER; the polar-llm that created this one reads it.",
            )
        return version is not None
