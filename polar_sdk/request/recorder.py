"""Usage records: exactly one per request, however it ends, and whoever ends it.

A record is made where the caller leaves its answer, in the caller's thread, so that it is stored before control
returns. Two things stand against that. Ctrl-C must not cut off the waiting and the storing: in the main thread, both
are done by another one. And a request that its caller only dropped is ended by a finaliser, which may run in any
thread, the engine's included: it must not wait for the engine, nor enter a sink, so it leaves the record to a thread
that does nothing else. A signal may cut off a finaliser before its first step, so that the interpreter itself leaves
the word there, too.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from contextlib import suppress
from contextvars import copy_context
from functools import cache, partial
from queue import Empty
from typing import TYPE_CHECKING, Final
from weakref import ref

from polar_sdk.errors import RequestTimeoutError
from polar_sdk.request.admission import admit
from polar_sdk.request.marker import Marker
from polar_sdk.request.record import record_of
from polar_sdk.serving.threads import Inbox, may_wait, run_uncut
from polar_sdk.usage import Outcome, Receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polar_sdk.errors import PolarError
    from polar_sdk.serving.job import Job
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.serving.request import Request
    from polar_sdk.usage import UsageRecord, UsageSink


_log: Final = logging.getLogger(__name__)
_STOPS = (GeneratorExit, KeyboardInterrupt, SystemExit, RequestTimeoutError)
"""What ends a request without being its error: its stream was closed, the process was asked to end (the command `polar`
turns SIGTERM into SystemExit), or its time was up."""
_PATIENCE_SECONDS: Final = 5.0
"""How long dropping a stream waits for its record, where it may: forever would hang a caller that holds a lock which
its sink needs."""
_MAX_INTERRUPTIONS: Final = 8
"""Signals that do not keep a finaliser from waiting for the record."""
_EXIT_SECONDS: Final = 10.0
"""How long the end of the process waits for records."""


class Recorder:
    """Guarantees one usage record per job of a call, however the call ends.

    Args:
        model: What runs the jobs.
        sink: Where their records go.
    """

    def __init__(self, model: LoadedModel, sink: UsageSink) -> None:
        records = self._records = _Records(model, sink)
        self.admit, self.begin, self.finish = records.admit, records.begin, records.finish
        self.end = records.end
        """See `_Records`, of which these are methods: a signal finds no further step between."""
        records.watch(self)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: object) -> None:
        self.end(failure)

    def __del__(self) -> None:
        """The caller dropped its stream, or was interrupted on the way to `end`: wait for the record where it may."""
        interruption: BaseException | None = None
        for _ in range(_MAX_INTERRUPTIONS if hasattr(self, "end") else 0):
            try:
                stored = self._records.drop()
                if stored is not None and may_wait():
                    stored.acquire(timeout=_PATIENCE_SECONDS)
                break
            except BaseException as raised:  # a signal handler's: once more, which does nothing twice
                interruption = interruption or raised
        if interruption is not None:
            raise interruption  # Python reports it, and goes on


class _Records:
    """The jobs of a call, and the records that they have or are due.

    Args:
        model: What runs the jobs.
        sink: Where their records go.
    """

    def __init__(self, model: LoadedModel, sink: UsageSink) -> None:
        self._reserved: list[Request] = []
        """Requests that the sink may hold something for, and that have no job yet."""
        self._jobs: tuple[Job, ...] = ()
        self._model, self._sink = model, sink
        self._records: dict[Job, UsageRecord] = {}
        """Final records; those not stored yet are stored at the end, unchanged if the sink failed before."""
        self._markers: dict[Job, Marker] = {}
        """What marks each job while it runs; empty if nobody keeps marks."""
        self._receipts: dict[Job, Receipt | None] = {}
        """Of the jobs whose records are stored."""
        self._ended = False
        self._watched: ref[Recorder] | None = None
        self._storing = threading.Lock()
        self._process = os.getpid()
        self._context = copy_context()
        """The caller's, for a record that another thread stores."""

    def watch(self, recorder: Recorder) -> None:
        """Store what is due when that is dropped."""
        self._watched = _LATE.watch(recorder, self)

    def admit(self, requests: Sequence[Request]) -> list[Request]:
        """Reserve for requests with the sink; what never gets a job is released, however the call ends.

        Raises:
            BudgetExceededError: A budget has no room for one of them.
            SinkError: The sink cannot decide.
        """
        return admit(requests, self._model.decoder.cost, self._sink, self._reserved.append)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Take on the jobs of the requests that were admitted; from now on, each is recorded."""
        _finish_at_exit()
        self._jobs = tuple(jobs)
        self._reserved.clear()
        if self._sink.wants_marks:
            self._markers = {job: Marker(self._model, job, self._sink) for job in jobs}
        for job in jobs:
            self._sink.watch(job.request.tenant, job.request.request_id, partial(_revoke, ref(self), job))

    def finish(self, job: Job) -> tuple[UsageRecord, Receipt | None]:
        """Wait for a job and store its record.

        Raises:
            BaseException: What ended the job, where it did not finish.
        """
        job.wait()
        with self._storing:
            if job.error is not None:
                if isinstance(job.error, RequestTimeoutError):
                    job.error.usage = self._record(job, Outcome.CANCELLED)
                raise job.error
            record = self._record(job, Outcome.CANCELLED if job.finish == "cancelled" else Outcome.COMPLETED)
            if job not in self._receipts:
                self._receipts[job] = self._sink.emit(record)
            return record, self._receipts[job]

    def end(self, failure: BaseException | None = None) -> None:
        """Stop what still runs and store its records; a sink that fails for one job is still called for the others.

        Where this thread must not wait, another one does, and what the sink raises is logged. In a forked child this
        does nothing: the jobs are the parent's.

        Args:
            failure: What ended the call.

        Raises:
            Exception: What the sink raised.
            BaseException: What a signal handler raised meanwhile.
        """
        if not self.open:
            _LATE.forget(self._watched)
            return
        for job in self._unrecorded():
            job.cancel()
        if not may_wait():
            self._hand_over(failure)
            return
        problems = run_uncut(partial(self._store, failure))
        # A timeout is an OSError, like the errors of disks, which it must not hide.
        if problems and (failure is None or isinstance(failure, _STOPS) or not isinstance(failure, type(problems[0]))):
            raise problems[0]

    def drop(self) -> threading.Lock | None:
        """As `end`, without waiting and without the sink, whatever the thread; the lock is free when it is done."""
        if not self.open:
            return None
        for job in self._unrecorded():
            job.cancel()
        return self._hand_over(None)

    def _unrecorded(self) -> list[Job]:
        return [job for job in self._jobs if job not in self._receipts]

    @property
    def open(self) -> bool:
        """Whether a record is due that this process has to store."""
        return not self._ended and self._process == os.getpid() and bool(self._reserved or self._unrecorded())

    def _hand_over(self, failure: BaseException | None) -> threading.Lock:
        stored = threading.Lock()
        stored.acquire()
        _LATE.put(partial(self._store_late, failure, stored))
        return stored

    def store_dropped(self) -> None:
        """As `drop`, in the thread that stores."""
        if self.open:
            for job in self._unrecorded():
                job.cancel()
            self._store_late(None, None)

    def _store_late(self, failure: BaseException | None, stored: threading.Lock | None) -> None:
        try:
            problems = self._context.copy().run(self._store, failure)
        except BaseException as failed:  # no caller is left to hand it to
            problems = [failed]
        if stored is not None:
            stored.release()
        for problem in problems:
            _log.error("the usage record of a dropped request could not be stored", exc_info=problem)

    def _store(self, failure: BaseException | None) -> Sequence[BaseException]:
        """Wait for what runs and store what is not stored; returns what the sink raised."""
        problems: list[Exception] = []
        with self._storing:
            if self._ended:
                return ()
            for request in self._reserved:
                with suppress(Exception):  # any sink, any error: jobs must be recorded, and a hold expires by itself
                    self._sink.release(request.tenant, request.request_id)
            for job in self._unrecorded():
                self._model.scheduler.settle(job)  # at most one pass
                try:
                    # The same record under the same id: if an attempt stored it after all, nothing is counted twice.
                    self._receipts[job] = self._sink.emit(self._final(job, failure))
                except Exception as problem:  # any sink, any error: the remaining jobs must be recorded all the same
                    problems.append(problem)
            self._ended = True
            _LATE.forget(self._watched)
        return problems

    def store_revoked(self, job: Job) -> None:
        """Store the record of a job that was revoked now: its caller may not come back for a long time."""
        self._model.scheduler.settle(job)
        with self._storing:
            if job.error is not None and job not in self._receipts:
                self._receipts[job] = self._sink.emit(self._final(job, None))

    def _final(self, job: Job, failure: BaseException | None) -> UsageRecord:
        cause = job.error or failure
        stopped = cause is None or isinstance(cause, _STOPS) or (job.error is None and job.finish == "cancelled")
        return self._record(job, Outcome.CANCELLED if stopped else Outcome.ERROR, cause)

    def _record(self, job: Job, outcome: Outcome, error: BaseException | None = None) -> UsageRecord:
        if job not in self._records:
            if (marker := self._markers.get(job)) is not None:
                marker.end()
            self._records[job] = record_of(self._model, job, job.progress(), outcome, error)
        return self._records[job]


def _revoke(records: ref[_Records], job: Job, error: PolarError) -> None:
    """End a job whose hold is lost, and have its record stored by the thread of late records."""
    job.revoke(error)
    if (living := records()) is not None:
        _LATE.put(partial(_store_revoked, living, job))


def _store_revoked(records: _Records, job: Job) -> None:
    try:
        records.store_revoked(job)
    except Exception:  # the caller offers it to the sink again when it leaves
        _log.exception("the usage record of a request that lost its hold could not be stored yet")


class _LateRecords:
    """One thread that stores the records of dropped requests, and lives as long as the process once it is needed.

    Leaving something to it waits for no lock, so that finalisers may.
    """

    def __init__(self) -> None:
        self._watched: dict[ref[Recorder], _Records] = {}
        self._start_anew()

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._left: Inbox[Callable[[], object] | ref[Recorder]] = Inbox("polar-record")
        self._watched.clear()

    def watch(self, recorder: Recorder, records: _Records) -> ref[Recorder]:
        """Store what is due when a recorder is dropped, until it is forgotten.

        The interpreter itself leaves the word here. It calls a method of the interpreter, which no signal can cut off.
        """
        if self._process != os.getpid():
            self._start_anew()
        dropped = ref(recorder, self._left.put_quietly)
        self._watched[dropped] = records
        with suppress(RuntimeError):  # no thread starts now: the next request tries again, or `flush`
            self._left.start(self._run)
        return dropped

    def forget(self, dropped: ref[Recorder] | None) -> None:
        """Nothing is due."""
        if dropped is not None:
            self._watched.pop(dropped, None)

    def put(self, call: Callable[[], object]) -> None:
        """Leave a call to the thread."""
        if self._process != os.getpid():
            self._start_anew()
        with suppress(RuntimeError):  # no thread starts now: the next call tries again, or `flush`
            self._left.put(call, self._run)

    def flush(self, seconds: float) -> bool:
        """Wait until all calls so far have run; False if that takes too long."""
        done = threading.Lock()
        done.acquire()
        self.put(done.release)
        self._left.run_instead(self._run_all)
        return done.acquire(timeout=seconds)

    def drop_all(self) -> None:
        """Have everything stored that is due."""
        for records in list(self._watched.values()):
            records.drop()

    def _run(self) -> None:
        while True:
            self._store(self._left.take(None))

    def _run_all(self) -> None:
        with suppress(Empty):
            while True:
                self._store(self._left.take())

    def _store(self, left: Callable[[], object] | ref[Recorder]) -> None:
        if not isinstance(left, ref):
            left()
        elif (records := self._watched.pop(left, None)) is not None:
            records.store_dropped()


_LATE: Final = _LateRecords()


def flush(seconds: float = _EXIT_SECONDS) -> bool:
    """Wait until the records of all requests dropped so far are stored; False if that takes too long."""
    return _LATE.flush(seconds)


@cache
def _finish_at_exit() -> None:
    """Store the records of open streams when the process ends; called late, so that it runs before sinks close."""
    atexit.register(run_uncut, _finish_all)


def _finish_all() -> None:
    _LATE.drop_all()
    if not flush():
        _log.error("the process ended before the usage records of its dropped requests could be stored")
