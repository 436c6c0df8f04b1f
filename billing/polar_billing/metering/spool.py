"""The spool: records on disk that are not in the ledger yet, and how they get there.

Each meter appends its records to a file of its own before it answers. The bytes are then in the operating system's
hands, so the end of the process, SIGKILL included, loses nothing. Once they are committed to the ledger, the file is
emptied. When the ledger cannot take them, the file is flushed to the disk and stays, and is stored later by the same
process or by any other: exactly once, because the ledger knows every request it holds, so a file that was stored in
part, or twice at once, adds nothing twice.

One line per record: the first 16 hexadecimal digits of the SHA-256 of the rest, a space, JSON. A last line that was
cut off was never acknowledged and is dropped. Any other line that is damaged, or whose content cannot be read (that of
a newer version, say), is kept aside in a file `*.damaged`, and the others are stored. Records that the ledger refuses
for their content are kept in `rejected.jsonl`. Knows no threads and no SQL.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from platformdirs import user_data_path

from polar_billing.errors import BillingError, RecordRefusedError, StoreError
from polar_billing.ledger.location import sqlite_file
from polar_billing.ledger.records import Entry
from polar_billing.prices.book import PriceBook
from polar_billing.values.canonical import canonical_json
from polar_billing.values.money import read_amount
from polar_sdk.reading import Unreadable, parse_object
from polar_sdk.usage import UsageRecord, new_request_id

try:
    import fcntl
except ImportError:  # Windows: without such locks a file in use cannot be told from one left over
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from sqlalchemy import URL

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import StoredUsage


SPOOL_VARIABLE: Final = "POLAR_SPOOL"
"""Folder for the spools of all ledgers; by default beside a SQLite file, else in the user's data folder."""

BATCH: Final = 1_000
"""Records stored in one transaction."""

_log: Final = logging.getLogger("polar_billing")
_CHECKSUM: Final = 16
_REJECTED: Final = "rejected.jsonl"
_MAX_LINE: Final = 128 * 2**20
"""A price book is a line of its own. Unit: bytes."""


def spool_folder(url: URL) -> Path | None:
    """Where records of a ledger wait; None for a ledger in memory, which ends with its process anyway."""
    named = os.environ.get(SPOOL_VARIABLE)
    file = sqlite_file(url)
    if fcntl is None or (file is None and url.get_backend_name() == "sqlite"):
        return None
    if file is not None and not named:
        return file.with_name(file.name + ".spool")
    identity = hashlib.sha256(url.set(password=None).render_as_string().encode()).hexdigest()[:16]
    return (Path(named).expanduser() if named else user_data_path("polar", appauthor=False) / "spool") / identity


@dataclass(frozen=True)
class SpoolStatus:
    """What waits in a spool."""

    folder: Path
    waiting: int = 0
    """Records not in the ledger yet, as far as the files show."""
    rejected: int = 0
    """Records that the ledger refused as conflicts."""
    damaged: int = 0
    """Lines whose checksum does not hold, or whose content cannot be read."""


class Segment:
    """One file of the spool, open for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = 0
        self._books: set[str] = set()
        self._size = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def append(self, entries: Iterable[Entry]) -> None:
        """Append records; when this returns, they survive the process.

        Raises:
            OSError: They could not be written; then none was.
        """
        books: dict[str, bytes] = {}
        lines = []
        for entry in entries:
            lines.append(_line(_entry_json(entry)))
            if (digest := entry.book.content_hash) not in self._books and digest not in books:
                books[digest] = _line(canonical_json({"book": entry.book.document}))
        self._write(b"".join((*books.values(), *lines)))
        self._books.update(books)
        self.records += len(lines)

    def _write(self, lines: bytes) -> None:
        try:
            written = os.write(self._fd, lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += written

    def clear(self) -> None:
        """Forget the records: they are in the ledger."""
        os.ftruncate(self._fd, 0)
        self._size = self.records = 0
        self._books.clear()

    def sync(self) -> None:
        """Flush to the disk itself, so that a power cut loses nothing either."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file and leave it."""
        os.close(self._fd)


def _lock(path: Path) -> int:
    """Open a file and lock it, without waiting; the lock ends with its process, however that ends.

    Raises:
        OSError: Another process has it, or it cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _line(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:_CHECKSUM].encode() + b" " + content + b"\n"


def _entry_json(entry: Entry) -> bytes:
    cost = None if entry.cost is None else f"{entry.cost:f}"
    receipt = canonical_json(
        {"by": entry.book.content_hash, "cost": cost, "source": entry.source, "unrated": entry.unrated}
    )
    return receipt[:-1] + b',"record":' + entry.canonical + b"}"


class Spool:
    """The spool of one ledger, and this process's files in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._name = ""
        self._lock: int | None = None
        self._count = 0
        self._free: list[Segment] = []

    def segment(self) -> Segment:
        """An empty file to append to.

        Raises:
            OSError: The folder cannot be created or written.
        """
        if self._free:
            return self._free.pop()
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._name, self._count = f"{os.getpid()}-{new_request_id()[-12:]}", 0  # never a name used before
            self._lock = _lock(self.folder / f"{self._name}.lock")
        self._count += 1
        return Segment(self.folder / f"{self._name}-{self._count}.jsonl")

    def reuse(self, segment: Segment) -> None:
        """Take back a file whose records are stored."""
        segment.clear()
        self._free.append(segment)

    def keep(self, segment: Segment) -> Path:
        """Leave a file on the disk, flushed, for later."""
        segment.sync()
        segment.close()
        return segment.path

    def close(self, current: Iterable[Segment] = ()) -> None:
        """Remove this process's empty files and release the others."""
        for segment in (*self._free, *current):
            segment.close()
            if segment.records == 0:
                segment.path.unlink(missing_ok=True)
        self._free.clear()
        if self._lock is not None:
            os.close(self._lock)
            (self.folder / f"{self._name}.lock").unlink(missing_ok=True)
            self._lock = None
        with suppress(OSError):  # others have files there
            self.folder.rmdir()

    def abandon(self, current: Segment | None) -> None:
        """Close what a forked child inherited; the parent keeps using it, and keeps its lock."""
        for segment in (*self._free, *([] if current is None else [current])):
            segment.close()
        if self._lock is not None:
            os.close(self._lock)

    def reject(self, entries: Iterable[Entry]) -> None:
        """Keep records that the ledger refused for their content, flushed to the disk."""
        lines = b"".join(_line(_entry_json(entry)) for entry in entries)
        if lines:
            with (self.folder / _REJECTED).open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())

    def abandoned(self) -> Iterator[Unfinished]:
        """Files of processes that have ended, locked for the caller while it has them."""
        if not self.folder.is_dir():
            return
        for name in sorted({path.name.rpartition("-")[0] for path in self.folder.glob("*-*-*.jsonl")}):
            if name == self._name and self._lock is not None:
                continue
            try:
                lock = _lock(self.folder / f"{name}.lock")
            except OSError:  # its process lives, or this one may only read
                continue
            try:
                yield from (Unfinished(path) for path in sorted(self.folder.glob(f"{name}-*.jsonl")))
                if not any(self.folder.glob(f"{name}-*.jsonl")):
                    (self.folder / f"{name}.lock").unlink(missing_ok=True)
            finally:
                os.close(lock)

    def status(self) -> SpoolStatus:
        """Count what waits, is rejected or is damaged."""
        files = [Unfinished(path) for path in self.folder.glob("*-*-*.jsonl")]
        return SpoolStatus(
            self.folder,
            sum(len(file.lines().entries) for file in files),
            _count_lines(self.folder / _REJECTED),
            sum(_count_damaged(path) for path in self.folder.glob("*.damaged")),
        )


@dataclass(frozen=True)
class _Read:
    entries: list[tuple[bytes, dict[str, Any]]]
    """Each record's line, and what it says."""
    books: dict[str, str]
    damaged: list[bytes]


@dataclass(frozen=True)
class Unfinished:
    """A file of records that may not be in the ledger yet."""

    path: Path

    def lines(self) -> _Read:
        """Its lines, checked."""
        read = _Read([], {}, [])
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return read
        *whole, _cut_off = content.split(b"\n")
        for line in whole:
            try:
                values = _values(line)
            except Unreadable:
                read.damaged.append(line)
                continue
            if (document := values.get("book")) is not None:
                read.books[hashlib.sha256(document.encode()).hexdigest()] = document
            else:
                read.entries.append((line, values))
        return read

    def entries(self, find_books: Callable[[set[str]], Mapping[str, PriceBook]]) -> list[Entry]:
        """The records, ready to be stored; lines that are damaged or cannot be read are set aside.

        Args:
            find_books: Finds books in the ledger by their hashes, where the line with a record's book is damaged.
        """
        read = self.lines()
        missing = {by for _, values in read.entries if isinstance(by := values.get("by"), str)} - read.books.keys()
        stored_books = find_books(missing) if missing else {}
        entries: list[Entry] = []
        damaged = list(read.damaged)
        for line, values in read.entries:
            try:
                entries.append(_entry(values, read.books, stored_books))
            except Exception as error:  # whatever is wrong with one line keeps no other out
                _log.error("a line of %s cannot be read (%r); it is set aside", self.path, error)
                damaged.append(line)
                if (document := read.books.get(str(values.get("by")))) is not None:
                    book = _line(canonical_json({"book": document})).rstrip(b"\n")
                    damaged += [] if book in damaged else [book]  # without it nobody can tell what was charged
        if damaged:
            _write_aside(self.path.with_suffix(".damaged"), damaged)
        return entries

    def remove(self) -> None:
        """Delete the file: its records are in the ledger."""
        self.path.unlink(missing_ok=True)


def _values(line: bytes) -> dict[str, Any]:
    """What a line says.

    Raises:
        Unreadable: Its checksum is wrong, or it is neither a record nor a price book.
    """
    checksum, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest()[:_CHECKSUM].encode() != checksum:
        raise Unreadable("not the line that was written")
    values = parse_object(text, max_bytes=_MAX_LINE)
    try:
        values.get("book", "").encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise Unreadable("not a price book") from error
    return values


def _entry(values: dict[str, Any], books: Mapping[str, str], stored_books: Mapping[str, PriceBook]) -> Entry:
    cost = None if values["cost"] is None else read_amount(values["cost"])
    document = books.get(values["by"])
    book = stored_books[values["by"]] if document is None else _book(document)
    source, unrated = values["source"], values["unrated"]
    if not isinstance(source, str) or not isinstance(unrated, str | None):
        raise TypeError("source and unrated are texts")
    entry = Entry(UsageRecord.model_validate(values["record"]), source, book, cost, unrated)
    _ = entry.cost_units, entry.canonical  # raises here what storing would raise later, with all others of its batch
    return entry


def _write_aside(path: Path, lines: list[bytes]) -> None:
    """Keep the lines of a spool file, flushed to the disk; anew each time, as that file is read until it is stored."""
    with path.open("wb") as file:
        file.writelines(line + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _count_damaged(path: Path) -> int:
    """Lines set aside, without the whole lines of price books that are kept for them."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    return sum(1 for line in lines if b' {"book":' not in line[: _CHECKSUM + 9] or not _is_whole(line))


def _is_whole(line: bytes) -> bool:
    try:
        _values(line)
    except Unreadable:
        return False
    return True


@lru_cache(maxsize=16)
def _book(document: str) -> PriceBook:
    return PriceBook.from_document(document)


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def store(ledger: Ledger, spool: Spool | None, entries: list[Entry]) -> list[StoredUsage | BillingError]:
    """Store records; those the ledger refuses for their content are set aside and keep no others out.

    Raises:
        StoreError: The ledger cannot take records now.
    """
    try:
        answers: list[StoredUsage | BillingError] = list(ledger.append_many(entries))
    except RecordRefusedError:  # because of one of them; the others are still to be stored
        answers = [_store_one(ledger, entry) for entry in entries]
    pairs = zip(entries, answers, strict=True)
    refused = [entry for entry, answer in pairs if isinstance(answer, BillingError)]
    for entry in refused:
        _log.error("the ledger refused request %r of tenant %r", entry.record.request_id, entry.record.tenant)
    if spool is not None and refused:
        spool.reject(refused)
    return answers


def _store_one(ledger: Ledger, entry: Entry) -> StoredUsage | BillingError:
    try:
        return ledger.append_many([entry])[0]
    except RecordRefusedError as error:
        return error


def store_file(ledger: Ledger, spool: Spool, file: Unfinished) -> None:
    """Store a file of the spool and delete it.

    Raises:
        StoreError: The ledger cannot take records now; the file stays.
    """
    entries = file.entries(ledger.find_books)
    for start in range(0, len(entries), BATCH):
        store(ledger, spool, entries[start : start + BATCH])
    file.remove()


def recover_abandoned(ledger: Ledger) -> None:
    """Store what processes that have ended left; if the ledger cannot take it now, it stays."""
    folder = spool_folder(ledger.url)
    if folder is None or not folder.is_dir():
        return
    spool = Spool(folder)
    try:
        for file in spool.abandoned():
            store_file(ledger, spool, file)
        spool.close()  # removes the folder where nothing is left in it
    except (StoreError, OSError) as error:
        _log.warning("what waits in the spool %s cannot be stored now (%s)", folder, error)


def warning_of(ledger: Ledger) -> str | None:
    """What a reader of this ledger should know about its spool; None if nothing waits."""
    folder = spool_folder(ledger.url)
    if folder is None or not folder.is_dir():
        return None
    status = Spool(folder).status()
    counts = [f"{status.waiting:,} request(s) wait to be stored"] if status.waiting else []
    counts += [f"{status.rejected:,} were refused as conflicts"] if status.rejected else []
    counts += [f"{status.damaged:,} line(s) are damaged"] if status.damaged else []
    return f"spool {str(folder)!r}: {', '.join(counts)}." if counts else None
