"""Group commit: one thread per meter stores whatever is waiting, in one transaction.

Callers pass records and either wait until they are committed, or continue once they are in the spool. If the ledger
cannot take them now, the spool file is kept, flushed to the disk; the writer tries again before the next records, at
most once a second. Knows no prices and no SQL.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from polar_billing.budgets.settlement import settle
from polar_billing.errors import BillingError, StoreError
from polar_billing.ledger.pending_writers import register_pending
from polar_billing.metering.spool import BATCH, Spool, spool_folder, store_file
from polar_billing.metering.spool_file import Unfinished

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Entry, Identity, StoredUsage
    from polar_billing.metering.spool import SpoolStatus
    from polar_billing.metering.spool_file import Segment
    from polar_sdk.promises.audit import Audit


_log: Final = logging.getLogger("polar_billing")
_IDLE_S: Final = 2.0
"""A thread without work ends after this; the next record starts another."""
_RETRY_S: Final = 1.0
_CAPACITY: Final = 10_000
"""Maximum number of waiting records; callers with more wait for room."""


@dataclass
class Ticket:
    """A record on its way."""

    entry: Entry
    lock: threading.Lock
    turn: threading.Condition
    """The writer's condition, notified after each commit."""
    told: bool = True
    """Whether its caller is informed if another record has taken its request id; else it is stored under a new one."""
    spooled: bool = False
    """Whether the spool's file has it, so that it survives the end of this process."""
    done: bool = False
    stored: StoredUsage | None = None
    """As stored; None while it waits in the spool."""
    error: BillingError | None = None

    def result(self) -> StoredUsage | None:
        """Wait; then what is stored, or None if it waits in the spool.

        Raises:
            ConflictError: The ledger holds this request with other content.
            StoreError: It could not be stored, and will not be by waiting.
        """
        with self.lock:
            self.turn.wait_for(lambda: self.done)
        if self.error is not None:
            raise self.error
        return self.stored


class Writer:
    """Stores records of one meter in groups. Safe in several threads and after a fork.

    Args:
        ledger: The ledger to store in.
        gather_s: How long a commit waits for more records. Unit: seconds.
    """

    def __init__(self, ledger: Ledger, *, gather_s: float = 0.0) -> None:
        self._ledger = ledger
        self._gather_s = gather_s
        self._folder: Path | None = spool_folder(ledger.url)
        self._start_anew()
        register_pending(ledger.identity, self)
        atexit.register(_drain_at_exit, weakref.ref(self))

    def _start_anew(self) -> None:
        """Start with nothing: at first, and in a forked child, whose parent stores what it had accepted."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        """Taken by `with`, which is one step: Ctrl-C in `Condition.__enter__` would leave it locked for ever."""
        self._turn = threading.Condition(self._lock)
        self._storing = threading.Lock()
        self._queue: list[Ticket] = []
        self._busy = False
        self._rounds = 0
        """How often everything that waited has been stored, or put aside."""
        self._hurry = False
        """True while a caller waits for everything to be stored."""
        self._thread: threading.Thread | None = None
        self._spool = None if self._folder is None else Spool(self._folder)
        self._segment: Segment | None = None
        self._free: list[Segment] = []
        """Files whose records are stored."""
        self._kept: list[Path] = []
        self.kept_records = 0
        """Records of this process that wait in the spool."""
        self.failure: StoreError | None = None
        """Why the ledger did not take the last records; None once it takes some."""
        self.succeeded_at = 0.0
        """When it last took some. Unit: seconds of `time.monotonic`."""
        self.failed_at = 0.0
        self._stored_abandoned = False

    def _restart_after_fork(self) -> None:
        if self._process != os.getpid():
            if self._spool is not None:
                self._spool.abandon(self._segments())
            self._start_anew()

    def submit(self, entry: Entry, *, told: bool = True) -> Ticket:
        """Hand a record over; if another one has taken its request id, the caller is `told`; else a new id is made."""
        self._restart_after_fork()
        with self._lock:
            self._turn.wait_for(lambda: len(self._queue) < _CAPACITY)
            ticket = Ticket(entry, self._lock, self._turn, told, spooled=self._spool_entries([entry]))
            idle = not self._queue
            self._queue.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="polar-meter", daemon=True)
            if self._thread.ident is None:  # a signal may have cut off the call that made it
                self._thread.start()
            if idle:
                self._turn.notify_all()
            return ticket

    def _spool_entries(self, entries: list[Entry]) -> bool:
        if self._spool is None:
            return False
        try:
            if self._segment is None:
                self._segment = self._free.pop() if self._free else self._spool.segment()
            self._segment.append(entries)
        except OSError as error:
            _log.warning("spool %s cannot be written (%s)", self._spool.folder, error)
            return False
        return True

    def mark(self, entry: Entry) -> None:
        """Note what a request that still runs has used, for the case that this process is killed.

        Raises:
            OSError: The spool cannot be written; the mark before holds.
        """
        self._restart_after_fork()
        if self._spool is not None:
            with self._lock:
                interim = self._spool.interim()
            interim.write(entry)

    def end_marks(self, identity: Identity) -> None:
        """A request has its record, so that its marks no longer count."""
        if self._spool is not None and self._process == os.getpid():
            self._spool.end_marks(identity)

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            tickets, segment = taken
            try:
                with self._storing:
                    self._store(tickets, segment)
            except BaseException as error:  # whatever happened, no caller may wait forever
                _log.exception("storing usage failed")
                failure = StoreError(f"ledger {self._ledger.location!r} failed ({error!r}).")
                self._put_aside([ticket for ticket in tickets if not ticket.done], segment, failure)
            with self._lock:
                self._busy = False
                self._rounds += 1
                self._turn.notify_all()

    def _take(self) -> tuple[list[Ticket], Segment | None] | None:
        """Everything that waits, with the spool file that holds it; None after a long time without records."""
        with self._lock:
            self._turn.wait_for(lambda: self._queue, _IDLE_S)
            if self._gather_s and self._queue:
                self._turn.wait_for(lambda: self._hurry or len(self._queue) >= BATCH, self._gather_s)
            if not self._queue:
                self._thread = None
                return None
            self._busy = True
            tickets, self._queue = self._queue, []
            segment, self._segment = self._segment, None
            self._turn.notify_all()
        return tickets, segment

    def _store(self, tickets: list[Ticket], segment: Segment | None) -> None:
        if self.failure is not None and time.monotonic() - self.failed_at < _RETRY_S and segment is not None:
            self._put_aside(tickets, segment, self.failure)
            return
        try:
            self._store_kept()
            for start in range(0, len(tickets), BATCH):
                self._commit(tickets[start : start + BATCH])
        except StoreError as error:
            self.failure, self.failed_at = error, time.monotonic()
            self._put_aside([ticket for ticket in tickets if not ticket.done], segment, error)
            return
        self.failure, self.succeeded_at = None, time.monotonic()
        if segment is not None:
            with self._lock:
                segment.clear()
                self._free.append(segment)

    def _commit(self, tickets: list[Ticket]) -> None:
        told = {n for n, ticket in enumerate(tickets) if ticket.told}
        entries = [ticket.entry for ticket in tickets]
        answers = self._ledger.store(entries, settle, told=told)
        if self._spool is not None:
            self._spool.reject(entries, answers)
        for ticket, answer in zip(tickets, answers, strict=True):
            if isinstance(answer, BillingError):
                ticket.error = answer
            else:
                ticket.stored = answer
        self._finish(tickets)

    def _put_aside(self, tickets: list[Ticket], segment: Segment | None, error: StoreError) -> None:
        """Keep records on the disk. Callers that wait for them get an error only if it will not pass by itself."""
        kept = False
        if segment is not None and self._spool is not None:
            with suppress(OSError):
                self._kept.append(self._spool.keep(segment))
                kept = True
        for ticket in tickets:
            waits = kept and ticket.spooled  # a full disk may not have taken it
            self.kept_records += waits
            ticket.error = None if waits and error.retryable else error
        self._finish(tickets)

    def _finish(self, tickets: list[Ticket]) -> None:
        with self._lock:
            for ticket in tickets:
                ticket.done = True
            self._turn.notify_all()

    def _store_kept(self) -> None:
        """Store what an earlier failure left, of this process and, once, of processes that have ended."""
        if self._spool is None:
            return
        for path in list(self._kept):
            store_file(self._ledger, self._spool, Unfinished(path))
            self._kept.remove(path)
        self.kept_records = 0
        if not self._stored_abandoned:
            self._stored_abandoned = True
            for file in self._spool.abandoned():
                store_file(self._ledger, self._spool, file)

    def keep_audit(self, audit: Audit, source: str) -> None:
        """Keep an audit in the spool until the ledger takes records again.

        Raises:
            OSError: The spool cannot be written.
        """
        self._restart_after_fork()
        if self._spool is not None:
            with self._lock:
                self._kept.append(self._spool.keep_audit(audit, source))
                self.kept_records += 1

    def reject_audits(self, audits: Sequence[Audit], source: str, answers: Sequence[BillingError | None]) -> None:
        """Log those of some audits that the ledger refused, and keep them aside; see `Spool.reject_audits`."""
        for refused in filter(None, answers):
            _log.error("the ledger refused an audit: %s", refused)
        if self._spool is not None:
            self._spool.reject_audits(audits, source, answers)

    @property
    def has_spool(self) -> bool:
        """True if records can wait on the disk."""
        return self._folder is not None

    def failed(self, error: StoreError) -> None:
        """Note that the ledger does not take records now, so that the next ones do not wait in vain."""
        self._restart_after_fork()
        self.failure, self.failed_at = error, time.monotonic()

    def status(self) -> SpoolStatus | None:
        """The state of the spool; None without one."""
        self._restart_after_fork()
        return None if self._spool is None else self._spool.status()

    def recover(self) -> None:
        """Store what waits in the spool now, of this process and of processes that have ended."""
        self._restart_after_fork()
        self.drain()
        with self._storing:
            self._stored_abandoned = False
            self._store_kept()
            self.failure = None

    @property
    def lags(self) -> bool:
        """Whether records are on their way that their callers do not wait for."""
        return self._gather_s > 0 and self._process == os.getpid() and bool(self._queue or self._busy)

    def drain(self) -> None:
        """Return when every record submitted so far is in the ledger, or kept in the spool."""
        if self._process != os.getpid() or threading.current_thread() is self._thread:
            return
        with self._lock:
            last = self._rounds + bool(self._busy) + bool(self._queue)
            if self._rounds < last:
                self._hurry = True
                self._turn.notify_all()
                self._turn.wait_for(lambda: self._rounds >= last)
                self._hurry = False

    def close(self) -> None:
        """Drain, try once more to store what was kept, and remove empty files."""
        if self._process != os.getpid():
            return
        self.drain()
        with self._storing, self._lock:
            try:
                if self._kept:
                    self._store_kept()
            except BillingError as error:
                _log.warning("%d records stay in the spool (%s)", self.kept_records, error)
            if self._spool is not None:
                self._spool.close(self._segments())
                self._segment, self._free = None, []

    def _segments(self) -> list[Segment]:
        """The open files, but for the one whose records are being stored."""
        return self._free if self._segment is None else [self._segment, *self._free]


def _drain_at_exit(reference: weakref.ref[Writer]) -> None:
    writer = reference()
    if writer is not None:
        writer.close()
