"""A file of the spool: written line by line, and read when it was left over.

A line is the first 16 hexadecimal digits of the SHA-256 of the rest, a space, and JSON: a record with its receipt, or a
price book that records name by its hash. Whatever is wrong with one line, the others are read. Knows no threads and no
SQL.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from polar_billing.ledger.records import Entry
from polar_billing.prices.book import PriceBook
from polar_billing.values.canonical import canonical_json
from polar_billing.values.money import read_amount
from polar_sdk.reading import Unreadable, parse_object
from polar_sdk.usage import AS_STORED, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path


_log: Final = logging.getLogger("polar_billing")
_CHECKSUM: Final = 16
_MAX_LINE: Final = 128 * 2**20
"""A price book is a line of its own. Unit: bytes."""


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
        if damaged:
            _write_aside(self.path.with_suffix(".damaged"), damaged)
        return entries

    def remove(self) -> None:
        """Delete the file: its records are in the ledger."""
        self.path.unlink(missing_ok=True)


def _values(line: bytes) -> dict[str, Any]:
    """The content of a line.

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
    entry = Entry(UsageRecord.model_validate(values["record"], context=AS_STORED), source, book, cost, unrated)
    _ = entry.cost_units, entry.canonical  # raises here what storing would raise later, with all others of its batch
    return entry


def _write_aside(path: Path, lines: list[bytes]) -> None:
    """Keep the lines of a spool file, flushed to the disk; anew each time, as that file is read until it is stored."""
    with path.open("wb") as file:
        file.writelines(line + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def count_damaged(path: Path) -> int:
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
