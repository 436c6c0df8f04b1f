"""Usage records: exactly one per request, however the request ends.

A request that runs to its end is recorded in its caller's thread. One that ends early, by an error, Ctrl-C, a cancelled
task or a stream that is closed or dropped, is left to the thread `polar-record`, which waits for the engine's last pass
and stores the record; the caller waits for that, for a few seconds at most. So neither a further signal nor a lock that
the caller holds prevents a record: a garbage collection in the middle of a sink may be what ends the request. If
signals interrupt everything that a call does at its end, the thread notices within moments that the call is gone; a
finaliser would not suffice, since a signal may interrupt that as well, unnoticed. What is lost nevertheless, such as in
a killed process, is bounded by the request's marks.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from contextlib import suppress
from contextvars import copy_context
from functools import cache, partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final
from weakref import ref

from polar_sdk.errors import RequestTimeoutError
from polar_sdk.request.admission import admit
from polar_sdk.request.record import Marker, record_of
from polar_sdk.serving.threads import Inbox, InternalThread
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
"""Ends of a request that are not its error: its stream was closed, the process was asked to end (the command `polar`
turns SIGTERM into SystemExit), or its time was up."""
_PATIENCE_SECONDS: Final = 5.0
"""How long the caller of a request that ended early waits for its record: for ever would hang one that holds a lock
which its sink needs."""
_EXIT_SECONDS: Final = 10.0
"""How long the end of the process waits for records."""
_SWEEP_SECONDS: Final = 0.25
"""How often to look for calls that are gone, while any are open."""


class Recording:
    """Guarantees one usage record per job of a call, however the call ends: a context manager around it.

    Nothing but the call refers to it, so that it is gone when the call is; what its end needs is kept apart from it.
    """

    def __init__(self, model: LoadedModel, sink: UsageSink) -> None:
        self._recorder = Recorder(model, sink, ref(self))

    def __enter__(self) -> Recorder:
        return self._recorder

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: object) -> None:
        self._recorder.end(failure)


class Recorder:
    """Makes and stores the records of a call. Kept alive until they are stored.

    Args:
        model: What answers.
        sink: Takes the records.
        call: The call; where it is gone, nobody else will end its requests.
    """

    def __init__(self, model: LoadedModel, sink: UsageSink, call: ref[Recording]) -> None:
        self._model, self._sink, self._call = model, sink, call
        self._reserved: list[Request] = []
        """Requests that the sink may hold something for, and that have no job yet."""
        self._jobs: tuple[Job, ...] = ()
        self._records: dict[Job, UsageRecord] = {}
        """Final records; those not stored yet are stored at the end, unchanged if the sink failed before."""
        self._markers: dict[Job, Marker] = {}
        """Marks each job while it runs; empty if the sink keeps no marks."""
        self._receipts: dict[Job, Receipt | None] = {}
        """Receipts of the jobs whose records are stored."""
        self._ended = False
        self._storing = threading.Lock()
        self._process = os.getpid()
        self._context = copy_context()
        """The caller's, for a record that another thread stores."""
        _finish_at_exit()
        _OPEN[self] = None
        LATE.start(_run_late)
        if LATE.resting:
            LATE.put(_sweep, _run_late)

    def admit(self, requests: Sequence[Request]) -> list[Request]:
        """Reserve for requests with the sink; what never gets a job is released, however the call ends.

        Raises:
            BudgetExceededError: A budget has no room for one of them.
            SinkError: The sink cannot decide.
        """
        return admit(requests, self._model.decoder.cost, self._sink, self._reserved.append)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Take on the jobs of the requests that were admitted; from now on, each is recorded."""
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
        job.delivery.wait()
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

        In a forked child this does nothing: the jobs are the parent's.

        Args:
            failure: What ended the call.

        Raises:
            BaseException: What the sink raised.
        """
        if not self._open:
            _OPEN.pop(self, None)
            return
        if isinstance(threading.current_thread(), InternalThread):
            self._leave(failure, None)
            return
        stored: SimpleQueue[Sequence[BaseException]] = SimpleQueue()
        self._leave(failure, stored)
        try:
            problems = stored.get(timeout=_PATIENCE_SECONDS)
        except Empty:
            _log.warning("a usage record is not stored after %g s; it will be when its sink allows", _PATIENCE_SECONDS)
            return
        # A timeout is an OSError, like the errors of disks, which it must not hide.
        if problems and (failure is None or isinstance(failure, _STOPS) or not isinstance(failure, type(problems[0]))):
            raise problems[0]

    @property
    def is_lost(self) -> bool:
        """Whether the call is gone, so that it will not end this."""
        return self._call() is None

    def leave(self) -> None:
        """As `end`, without waiting: for a call that is gone, and at the end of the process."""
        if self._open:
            self._leave(None, None)
        else:
            _OPEN.pop(self, None)

    def _unrecorded(self) -> list[Job]:
        return [job for job in self._jobs if job not in self._receipts]

    @property
    def _open(self) -> bool:
        """Whether a record is due that this process has to store."""
        return not self._ended and self._process == os.getpid() and bool(self._reserved or self._unrecorded())

    def _leave(self, failure: BaseException | None, stored: SimpleQueue[Sequence[BaseException]] | None) -> None:
        for job in self._unrecorded():
            job.cancel()
        with suppress(RuntimeError):  # no thread starts at the end of the process, but this one lives by then
            LATE.put(partial(self._context.copy().run, self._store_late, failure, stored), _run_late)

    def _store_late(self, failure: BaseException | None, stored: SimpleQueue[Sequence[BaseException]] | None) -> None:
        """Wait for what runs, store what is not stored, and tell who waits what the sink raised."""
        problems: list[BaseException] = []
        with self._storing:
            if not self._ended:
                for request in self._reserved:
                    with suppress(Exception):  # any sink, any error: jobs must be recorded, a hold expires by itself
                        self._sink.release(request.tenant, request.request_id)
                for job in self._unrecorded():
                    try:
                        self._model.scheduler.settle(job)  # at most one pass
                        self._store(job, failure)
                    except BaseException as problem:  # any sink, any error: the other jobs must be recorded, too
                        problems.append(problem)
                self._ended = True
        _OPEN.pop(self, None)
        for one in problems:  # what a dropped stream raises reaches nobody
            _log.error("the usage record of a request that ended early could not be stored", exc_info=one)
        if stored is not None:
            stored.put(problems)

    def store_revoked(self, job: Job) -> None:
        """Store the record of a job that was revoked now: its caller may not come back for a long time."""
        self._model.scheduler.settle(job)
        with self._storing:
            if job.error is not None and job not in self._receipts:
                self._store(job, None)

    def _store(self, job: Job, failure: BaseException | None) -> None:
        cause = job.error or failure
        stopped = cause is None or isinstance(cause, _STOPS) or (job.error is None and job.finish == "cancelled")
        record = self._record(job, Outcome.CANCELLED if stopped else Outcome.ERROR, cause)
        # The same record under the same id: if an attempt stored it after all, nothing is counted twice.
        self._receipts[job] = self._sink.emit(record)

    def _record(self, job: Job, outcome: Outcome, error: BaseException | None = None) -> UsageRecord:
        if job not in self._records:
            if (marker := self._markers.get(job)) is not None:
                marker.end()
            self._records[job] = record_of(self._model, job, job.progress(), outcome, error)
        return self._records[job]


LATE: Final[Inbox[Callable[[], object]]] = Inbox("polar-record")
"""What the thread `polar-record` is to do; once started, it lives as long as the process."""
_OPEN: Final[dict[Recorder, None]] = {}
"""Recorders of calls that have not ended."""


def _run_late() -> None:
    while True:
        try:
            _next_call()()
        except Exception:  # the record of a request that lost its hold: its caller offers it again when it leaves
            _log.exception("a usage record could not be stored yet")


def _next_call() -> Callable[[], object]:
    """What to do next: what was left to the thread, or a sweep if nothing is for a while and calls are open."""
    LATE.resting = True  # before the look at what is open: who opens a call after that look wakes the thread
    LATE.resting = not _OPEN
    with suppress(Empty):
        return LATE.take(None if LATE.resting else _SWEEP_SECONDS)
    return _sweep


def _sweep(done: SimpleQueue[None] | None = None) -> None:
    """Leave the records of calls that are gone to the thread, and say when they are stored."""
    for recorder in list(_OPEN):
        if recorder.is_lost:
            recorder.leave()
    if done is not None:
        LATE.put(partial(done.put, None), _run_late)


def _revoke(recorder: ref[Recorder], job: Job, error: PolarError) -> None:
    """End a job whose hold is lost, and have its record stored by the thread."""
    job.revoke(error)
    if (living := recorder()) is not None:
        LATE.put(partial(living.store_revoked, job), _run_late)


def flush(seconds: float = _EXIT_SECONDS) -> bool:
    """Wait until the records of all requests dropped so far are stored; False if that takes too long."""
    done: SimpleQueue[None] = SimpleQueue()
    LATE.put(partial(_sweep, done), _run_late)
    try:
        done.get(timeout=seconds)
    except Empty:
        return False
    return True


@cache
def _finish_at_exit() -> None:
    """Store the records of open streams when the process ends; called late, so that it runs before sinks close."""
    atexit.register(_finish_all)


def _finish_all() -> None:
    for recorder in list(_OPEN):
        recorder.leave()
    if not flush():
        _log.error("the process ended before the usage records of its dropped requests could be stored")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_OPEN.clear)  # the parent's
