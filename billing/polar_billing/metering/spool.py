"""The spool: records on disk that are not in the ledger yet, and how they get there.

Each meter appends its records to its own file before it returns. The operating system then has the bytes, so the end of
the process, SIGKILL included, loses nothing. Once they are committed to the ledger, the file is emptied. If the ledger
cannot take them, the file is flushed to the disk and kept, and is stored later by the same process or by any other:
exactly once, because the ledger knows every request it holds, so a file that was stored partly, or by two processes at
once, adds nothing twice. A record whose request id is taken by another one is stored under a new id.

One line per record: the first 16 hexadecimal digits of the SHA-256 of the rest, a space, JSON. An incomplete last line
was never acknowledged and is dropped. Any other line that is damaged, or whose content cannot be read (such as that of
a newer version), is set aside in a file `*.damaged`, and the others are stored. Records that the ledger refuses for
their content are kept in `rejected.jsonl`. The usage of running requests is in a separate file, see
`spool_file.InterimUsage`; so is each audit that the ledger could not take. Knows no threads and no SQL.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from platformdirs import user_data_path

from polar_billing.budgets.settlement import settle
from polar_billing.errors import BillingError, StoreError
from polar_billing.ledger.audits import Audits
from polar_billing.ledger.location import sqlite_file
from polar_billing.metering.spool_file import (
    InterimUsage,
    Segment,
    Unfinished,
    audit_line,
    count_damaged,
    last_marks,
    line_of,
)
from polar_sdk.usage import new_request_id

try:
    import fcntl
except ImportError:  # Windows: without such locks a file in use cannot be told from one left over
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import URL

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Entry, Identity, StoredUsage
    from polar_sdk.promises.audit import Audit


SPOOL_VARIABLE: Final = "POLAR_SPOOL"
"""Folder for the spools of all ledgers; by default beside a SQLite file, else in the user's data folder."""

BATCH: Final = 1_000
"""Records stored in one transaction."""

_log: Final = logging.getLogger("polar_billing")
_REJECTED: Final = "rejected.jsonl"
_MARKS: Final = ".marks"


def spool_folder(url: URL) -> Path | None:
    """The folder of a ledger's spool; None for a ledger in memory, which ends with its process anyway."""
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
    """The state of a spool."""

    folder: Path
    waiting: int = 0
    """Records and audits not in the ledger yet, as far as the files show."""
    rejected: int = 0
    """Records that the ledger refused as conflicts."""
    damaged: int = 0
    """Lines whose checksum does not hold, or whose content cannot be read."""


def _lock(path: Path) -> int:
    """Open a file and lock it, without waiting; the lock ends with its process, however that ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


class Spool:
    """The spool of one ledger, and this process's files in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._name = ""
        self._lock: int | None = None
        self._count = 0
        self._interim: InterimUsage | None = None

    def segment(self) -> Segment:
        """A new file to append to."""
        self._take_name()
        self._count += 1
        return Segment(self.folder / f"{self._name}-{self._count}.jsonl")

    def _take_name(self) -> None:
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._name, self._count = f"{os.getpid()}-{new_request_id()[-12:]}", 0  # never a name used before
            self._lock = _lock(self.folder / f"{self._name}.lock")

    def interim(self) -> InterimUsage:
        """The file for marks."""
        if self._interim is None:
            self._take_name()
            self._interim = InterimUsage(self.folder / f"{self._name}{_MARKS}")
        return self._interim

    def end_marks(self, identity: Identity) -> None:
        """A request has its record, so that its marks no longer count."""
        if self._interim is not None:
            self._interim.end(identity)

    def keep(self, segment: Segment) -> Path:
        """Leave a file on the disk, flushed, for later."""
        segment.sync()
        segment.close()
        return segment.path

    def close(self, segments: Iterable[Segment] = ()) -> None:
        """Close this process's files, of which empty ones are removed."""
        for segment in segments:
            segment.close()
            if segment.records == 0:
                segment.path.unlink(missing_ok=True)
        if self._interim is not None:
            self._interim.close()
            self._interim = None
        if self._lock is not None:
            os.close(self._lock)
            (self.folder / f"{self._name}.lock").unlink(missing_ok=True)
            self._lock = None
        with suppress(OSError):  # others have files there
            self.folder.rmdir()

    def abandon(self, segments: Iterable[Segment]) -> None:
        """Close what a forked child inherited; the parent keeps using it, and keeps its lock."""
        for segment in segments:
            segment.close()
        if self._interim is not None:
            self._interim.abandon()
        if self._lock is not None:
            os.close(self._lock)

    def reject(self, entries: Sequence[Entry], answers: Sequence[StoredUsage | BillingError]) -> None:
        """Keep those of some records that `Ledger.store` refused, flushed to the disk.

        Raises:
            StoreError: They cannot be kept; the records stay where they are, and are refused once more later.
        """
        pairs = zip(entries, answers, strict=True)
        self._reject_lines([line_of(entry) for entry, answer in pairs if isinstance(answer, BillingError)])

    def keep_audit(self, audit: Audit, source: str) -> Path:
        """Keep an audit, flushed to the disk, in a file of its own, for later.

        Raises:
            OSError: It could not be written.
        """
        segment = self.segment()
        segment.append_audit(audit, source)
        return self.keep(segment)

    def reject_audits(self, audits: Sequence[Audit], source: str, answers: Sequence[BillingError | None]) -> None:
        """Keep those of some audits that the ledger refused, as `reject` does."""
        pairs = zip(audits, answers, strict=True)
        self._reject_lines([audit_line(audit, source) for audit, refused in pairs if refused is not None])

    def _reject_lines(self, lines: list[bytes]) -> None:
        if lines:
            with _written(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / _REJECTED).open("ab") as file:
                    file.writelines(lines)
                    file.flush()
                    os.fsync(file.fileno())

    def abandoned(self) -> Iterator[Unfinished]:
        """Files of processes that have ended, locked for the caller while it has them.

        The marks of a process come last: they count only where its other files have no record.
        """
        if not self.folder.is_dir():
            return
        names = {path.name.rpartition("-")[0] for path in self.folder.glob("*-*-*.jsonl")}
        names |= {path.stem for path in self.folder.glob(f"*-*{_MARKS}")}
        for name in sorted(names):
            if name == self._name and self._lock is not None:
                continue
            try:
                lock = _lock(self.folder / f"{name}.lock")
            except OSError:  # its process lives, or this one may only read
                continue
            try:
                yield from (Unfinished(path) for path in self._files_of(name))
                if not self._files_of(name):
                    (self.folder / f"{name}{_MARKS}.new").unlink(missing_ok=True)
                    (self.folder / f"{name}.lock").unlink(missing_ok=True)
            finally:
                os.close(lock)

    def _files_of(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}-*.jsonl")) + list(self.folder.glob(f"{name}{_MARKS}"))

    def status(self) -> SpoolStatus:
        """Count what waits, is rejected or is damaged."""
        files = [Unfinished(path) for path in self.folder.glob("*-*-*.jsonl")]
        return SpoolStatus(
            self.folder,
            sum(len(lines.entries) + len(lines.audits) for lines in (file.lines() for file in files)),
            sum(path.read_bytes().count(b"\n") for path in self.folder.glob(_REJECTED)),
            sum(count_damaged(path) for path in self.folder.glob("*.damaged")),
        )


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:  # the ledger's, which is an OSError, too, and says more
        raise
    except OSError as error:
        raise StoreError(
            f"spool {str(folder)!r} cannot be written ({error.strerror}).",
            hint="Free some space on that disk, or make it writable; nothing is lost.",
        ) from error


def store_file(ledger: Ledger, spool: Spool, file: Unfinished) -> None:
    """Store a file of the spool and delete it.

    Raises:
        StoreError: The ledger cannot take records now; the file stays.
    """
    with _written(spool.folder):
        entries = file.entries(ledger.find_books)
        if file.path.suffix == _MARKS:
            entries = [mark.interrupted() for mark in last_marks(entries) if not ledger.is_recorded(mark)]
        for start in range(0, len(entries), BATCH):
            batch = entries[start : start + BATCH]
            spool.reject(batch, ledger.store(batch, settle))
        for source, audits in groupby(file.audits(), key=itemgetter(1)):
            found = [audit for audit, _ in audits]
            spool.reject_audits(found, source, Audits(ledger, source).store(found))
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
    """A warning for readers of this ledger about its spool; None if nothing waits."""
    folder = spool_folder(ledger.url)
    if folder is None or not folder.is_dir():
        return None
    status = Spool(folder).status()
    counts = [f"{status.waiting:,} request(s) wait to be stored"] if status.waiting else []
    counts += [f"{status.rejected:,} were refused as conflicts"] if status.rejected else []
    counts += [f"{status.damaged:,} line(s) are damaged"] if status.damaged else []
    return f"spool {str(folder)!r}: {', '.join(counts)}." if counts else None
