"""Files of the spool, with records, marks or audits: written line by line, and read if they were left over.

A line is the first 16 hexadecimal digits of the SHA-256 of the rest, a space, and JSON: a record with its receipt, a
price book that records name by its hash, or an audit with its meter's name. A fault in one line does not affect the
others. Knows no SQL.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from polar_billing.ledger.records import Entry
from polar_billing.prices.book import PriceBook
from polar_billing.values.canonical import canonical_json
from polar_billing.values.money import read_amount
from polar_sdk.promises.audit import Audit
from polar_sdk.reading import Unreadable, parse_object
from polar_sdk.usage import AS_STORED, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from polar_billing.ledger.records import Identity


_log: Final = logging.getLogger("polar_billing")
_CHECKSUM: Final = 16
_MAX_LINE: Final = 128 * 2**20
"""A price book is a line of its own. Unit: bytes."""
_MARKS_LIMIT: Final = 2**20
"""Size at which a file of marks is written anew. Unit: bytes."""


def _checked_line(content: bytes) -> bytes:
    """A line with this content and its checksum."""
    return hashlib.sha256(content).hexdigest()[:_CHECKSUM].encode() + b" " + content + b"\n"


class Segment:
    """One file of the spool, open for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = 0
        self._books: set[str] = set()
        self.size = 0
        """Size of its content. Unit: bytes."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def append(self, entries: Iterable[Entry]) -> None:
        """Append records; when this returns, they survive the process.

        Raises:
            OSError: They could not be written; then none was.
        """
        books: dict[str, bytes] = {}
        lines = []
        for entry in entries:
            lines.append(line_of(entry))
            if (digest := entry.book.content_hash) not in self._books and digest not in books:
                books[digest] = _checked_line(canonical_json({"book": entry.book.document}))
        self._write(b"".join((*books.values(), *lines)))
        self._books.update(books)
        self.records += len(lines)

    def append_audit(self, audit: Audit, source: str) -> None:
        """Append an audit.

        Raises:
            OSError: It could not be written.
        """
        self._write(audit_line(audit, source))

    def _write(self, lines: bytes) -> None:
        try:
            written = os.write(self._fd, lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += written

    def clear(self) -> None:
        """Forget the records: they are in the ledger."""
        os.ftruncate(self._fd, 0)
        self.size = self.records = 0
        self._books.clear()

    def sync(self) -> None:
        """Flush to the disk itself, so that a power cut loses nothing either."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file and leave it."""
        os.close(self._fd)


def line_of(entry: Entry) -> bytes:
    """A record's line: its receipt, and the record as it is hashed."""
    cost = None if entry.cost is None else f"{entry.cost:f}"
    receipt = canonical_json(
        {"by": entry.book.content_hash, "cost": cost, "source": entry.source, "unrated": entry.unrated}
    )
    return _checked_line(receipt[:-1] + b',"record":' + entry.canonical + b"}")


def audit_line(audit: Audit, source: str) -> bytes:
    """An audit's line."""
    return _checked_line(canonical_json({"audit": audit.model_dump(mode="json"), "source": source}))


class InterimUsage:
    """The file of marks of one process, and the requests in it that still run. Safe in several threads.

    The engine marks a long answer as it goes on. Each mark is a line, as a record would be if the answer ended
    there; it supersedes the request's earlier ones. When the request ends, its record counts and its marks do not.
    If the process is killed first, whoever stores what its spool holds stores the last mark of each request that
    has no record, as a cancelled one with the tag `polar.interrupted`: once, however often that is tried.

    Marks are not flushed to the disk: a power cut may take those of the last seconds. The file is emptied whenever
    no request that was marked runs any more, and written anew with the living marks when it has grown.
    """

    def __init__(self, path: Path, *, limit: int = _MARKS_LIMIT) -> None:
        self._path = path
        self._limit = self._rewrite_at = limit
        self._lock = threading.Lock()
        self._file: Segment | None = Segment(path)
        self._running: dict[Identity, Entry] = {}
        """The last mark of each."""

    def write(self, entry: Entry) -> None:
        """Mark a request; from then on this is what it has used.

        Raises:
            OSError: It could not be written; the mark before holds.
        """
        with self._lock:
            if self._file is None:
                return
            self._running[entry.identity] = entry
            if self._file.size >= self._rewrite_at:
                self._write_anew(self._file)
            else:
                self._file.append([entry])

    def _write_anew(self, former: Segment) -> None:
        """Replace the file, in one step, by one with the last marks alone."""
        path = self._path.with_name(self._path.name + ".new")
        path.unlink(missing_ok=True)
        new = Segment(path)
        try:
            new.append(self._running.values())
            path.replace(self._path)
        except OSError:
            new.close()
            path.unlink(missing_ok=True)
            raise
        new.path = self._path
        former.close()
        self._file = new
        self._rewrite_at = max(self._limit, 2 * new.size)

    def end(self, identity: Identity) -> None:
        """A request has its record, so that its marks no longer count."""
        if identity not in self._running:  # as for most
            return
        with self._lock:
            self._running.pop(identity, None)
            if not self._running and self._file is not None:
                self._file.clear()
                self._rewrite_at = self._limit

    def close(self) -> None:
        """Delete the file: what still runs will have its record."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._path.unlink(missing_ok=True)
                self._file = None

    def abandon(self) -> None:
        """Close what a forked child inherited; waits for no lock, which a thread of the parent may have had."""
        if self._file is not None:
            self._file.close()
            self._file = None


def last_marks(entries: Iterable[Entry]) -> list[Entry]:
    """The last mark of each request in a file."""
    return list({(entry.identity, entry.record.started_at): entry for entry in entries}.values())


@dataclass(frozen=True)
class _Read:
    entries: list[tuple[bytes, dict[str, Any]]]
    """Each record's line, and what it says."""
    books: dict[str, str]
    audits: list[tuple[bytes, dict[str, Any]]]
    damaged: list[bytes]


@dataclass(frozen=True)
class Unfinished:
    """A file of records that may not be in the ledger yet."""

    path: Path

    def lines(self) -> _Read:
        """Its lines, checked."""
        read = _Read([], {}, [], [])
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return read
        *whole, _cut_off = content.split(b"\n")
        for line in whole:
            if (values := _values(line)) is None:
                read.damaged.append(line)
            elif (document := values.get("book")) is not None:
                read.books[hashlib.sha256(document.encode()).hexdigest()] = document
            elif "audit" in values:
                read.audits.append((line, values))
            else:
                read.entries.append((line, values))
        return read

    def entries(self, find_books: Callable[[set[str]], Mapping[str, PriceBook]]) -> list[Entry]:
        """The records, ready to be stored; lines that are damaged or cannot be read are set aside.

        `find_books` finds books in the ledger by their hashes, where the line with a record's book is damaged.
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
                    book = _checked_line(canonical_json({"book": document})).rstrip(b"\n")
                    damaged += [] if book in damaged else [book]  # without it nobody can tell what was charged
        if not read.audits:
            self._set_aside(damaged)
        return entries

    def audits(self) -> list[tuple[Audit, str]]:
        """The audits, each with its meter's name; a file holds either these or records."""
        read = self.lines()
        audits, damaged = [], list(read.damaged)
        for line, values in read.audits:
            try:
                audits.append((Audit.model_validate(values["audit"]), str(values["source"])))
            except ValueError as error:
                _log.error("an audit in %s cannot be read (%r); it is set aside", self.path, error)
                damaged.append(line)
        if read.audits:
            self._set_aside(damaged)
        return audits

    def _set_aside(self, damaged: list[bytes]) -> None:
        if damaged:
            # Anew each time, as this file is read until it is stored.
            with self.path.with_suffix(".damaged").open("wb") as file:
                file.writelines(line + b"\n" for line in damaged)
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file: its records are in the ledger."""
        self.path.unlink(missing_ok=True)


def _values(line: bytes) -> dict[str, Any] | None:
    """The content of a line; None if it is not the line that was written, or neither a record nor a price book."""
    checksum, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest()[:_CHECKSUM].encode() != checksum:
        return None
    try:
        values = parse_object(text, max_bytes=_MAX_LINE)
        values.get("book", "").encode()
    except (Unreadable, AttributeError, UnicodeEncodeError):
        return None
    return values


def _entry(values: dict[str, Any], books: Mapping[str, str], stored_books: Mapping[str, PriceBook]) -> Entry:
    cost = None if values["cost"] is None else read_amount(values["cost"])
    document = books.get(values["by"])
    book = stored_books[values["by"]] if document is None else _book(document)
    source, unrated = values["source"], values["unrated"]
    if not isinstance(source, str) or not isinstance(unrated, str | None):
        raise TypeError("source and unrated are texts")
    entry = Entry(UsageRecord.model_validate(values["record"], context=AS_STORED), source, book, cost, unrated)
    _ = entry.canonical  # raises here what storing would raise later, with all others of its batch
    return entry


def count_damaged(path: Path) -> int:
    """Lines set aside, without the whole lines of price books that are kept for them."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    return sum(1 for line in lines if b' {"book":' not in line[: _CHECKSUM + 9] or _values(line) is None)


@lru_cache(maxsize=16)
def _book(document: str) -> PriceBook:
    return PriceBook.from_document(document)
