"""Interim usage of running requests, in a file of the spool that outlives their process.

The engine marks a long answer as it goes on. Each mark is a line of the file, one append, as a record would be if the
answer ended there; it supersedes the request's earlier ones. When the request ends, its record counts and its marks do
not. If the process is killed first, whoever stores what its spool holds stores the last mark of each request that has
no record, as a cancelled one with the tag `polar.interrupted`: once, however often that is tried.

Marks are not flushed to the disk: a power cut may take those of the last seconds. The file is emptied whenever no
request that was marked runs any more, and written anew with the living marks when it has grown. Knows no SQL.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from polar_billing.metering.spool_file import Segment

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from polar_billing.ledger.records import Entry, Identity

_LIMIT: Final = 2**20
"""Size at which the file is written anew. Unit: bytes."""


class InterimUsage:
    """The file of marks of one process, and the requests in it that still run. Safe in several threads.

    Raises:
        OSError: It cannot be created.
    """

    def __init__(self, path: Path, *, limit: int = _LIMIT) -> None:
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
