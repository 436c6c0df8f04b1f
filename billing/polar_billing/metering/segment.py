"""A file of the spool, open for appending: lines of records with their receipts, and the price books they name.

Knows no threads and no SQL; `spool_file` reads what is written here.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from polar_billing.metering.spool_file import checked_line
from polar_billing.values.canonical import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from polar_billing.ledger.records import Entry


class Segment:
    """One file of the spool, open for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = 0
        self._books: set[str] = set()
        self.size = 0
        """Of what it holds. Unit: bytes."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def append(self, entries: Iterable[Entry]) -> None:
        """Append records; when this returns, they survive the process.

        Raises:
            OSError: They could not be written; then none was.
        """
        books: dict[str, bytes] = {}
        lines = []
        for entry in entries:
            lines.append(checked_line(entry_json(entry)))
            if (digest := entry.book.content_hash) not in self._books and digest not in books:
                books[digest] = checked_line(canonical_json({"book": entry.book.document}))
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


def entry_json(entry: Entry) -> bytes:
    """What a line says of a record: its receipt, and the record as it is hashed."""
    cost = None if entry.cost is None else f"{entry.cost:f}"
    receipt = canonical_json(
        {"by": entry.book.content_hash, "cost": cost, "source": entry.source, "unrated": entry.unrated}
    )
    return receipt[:-1] + b',"record":' + entry.canonical + b"}"
