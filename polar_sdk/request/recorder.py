"""Usage records: exactly one per request, however it ends, and whoever ends it.

A record is made where the caller leaves its answer, in the caller's thread, so that it is stored before control
returns. Two things stand against that. Ctrl-C must not cut off the waiting and the storing: in the main thread, both
are done by another one. And a request that its caller only dropped is ended by a finaliser, which may run in any
thread, the engine's included: it must not wait for the engine, nor enter a sink, so it leaves the record to a thread
that does nothing else.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from contextlib import suppress
from contextvars import copy_context
from functools import cache, partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, Literal
from weakref import WeakSet, ref

from polar_sdk.errors import RequestTimeoutError
from polar_sdk.programs.program import Program
from polar_sdk.request.admission import admit
from polar_sdk.serving.threads import may_wait, run_uncut, start_detached
from polar_sdk.usage import Outcome, Receipt, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polar_sdk.errors import PolarError
    from polar_sdk.serving.job import Job
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.serving.request import Request
    from polar_sdk.usage import UsageSink


_log: Final = logging.getLogger(__name__)
_FINISH: dict[Outcome, Literal["cancelled", "error"] | None] = {
    Outcome.COMPLETED: None,
    Outcome.CANCELLED: "cancelled",
    Outcome.ERROR: "error",
}
_STOPS = (GeneratorExit, KeyboardInterrupt, SystemExit, RequestTimeoutError)
"""What ends a request without being its error: its stream was closed, the process was asked to end (the command `polar`
turns SIGTERM into SystemExit), or its time was up."""
_IDLE_SECONDS: Final = 2.0
"""The thread of late records ends after this time without one."""
_PATIENCE_SECONDS: Final = 5.0
"""How long dropping a stream waits for its record, where it may: forever would hang a caller that holds a lock which
its sink needs."""
_MAX_INTERRUPTIONS: Final = 8
"""Signals that do not keep a dropped stream from leaving its record to the thread."""
_EXIT_SECONDS: Final = 10.0
"""How long the end of the process waits for records."""


class Recorder:
    """Guarantees one usage record per job of a call, however the call ends.

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
        self._receipts: dict[Job, Receipt | None] = {}
        """Of the jobs whose records are stored."""
        self._ended = False
        self._storing = threading.Lock()
        self._process = os.getpid()
        self._context = copy_context()
        """The caller's, for a record that another thread stores."""

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
        _OPEN.add(self)
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
        if not self._is_open():
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
        if not self._is_open():
            return None
        for job in self._unrecorded():
            job.cancel()
        return self._hand_over(None)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: object) -> None:
        self.end(failure)

    def __del__(self) -> None:
        """The caller dropped its stream, or was interrupted on the way to `end`."""
        interruption: BaseException | None = None
        for _ in range(_MAX_INTERRUPTIONS):
            try:
                stored = self.drop()
                if stored is not None and may_wait():
                    stored.acquire(timeout=_PATIENCE_SECONDS)
                break
            except BaseException as raised:  # a signal handler's: once more, which does nothing twice
                interruption = interruption or raised
        if interruption is not None:
            raise interruption  # Python reports it, and goes on

    def _unrecorded(self) -> list[Job]:
        return [job for job in self._jobs if job not in self._receipts]

    def _is_open(self) -> bool:
        return not self._ended and self._process == os.getpid() and bool(self._reserved or self._unrecorded())

    def _hand_over(self, failure: BaseException | None) -> threading.Lock:
        stored = threading.Lock()
        stored.acquire()
        _LATE.put(partial(self._store_late, failure, stored))
        return stored

    def _store_late(self, failure: BaseException | None, stored: threading.Lock) -> None:
        try:
            problems = self._context.copy().run(self._store, failure)
        except BaseException as failed:  # no caller is left to hand it to
            problems = [failed]
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
                if job.submitted:
                    job.wait()  # at most one token
                try:
                    # The same record under the same id: if an attempt stored it after all, nothing is counted twice.
                    self._receipts[job] = self._sink.emit(self._final(job, failure))
                except Exception as problem:  # any sink, any error: the remaining jobs must be recorded all the same
                    problems.append(problem)
            self._ended = True
        return problems

    def store_revoked(self, job: Job) -> None:
        """Store the record of a job that was revoked now: its caller may not come back for a long time."""
        if job.submitted:
            job.wait()
        with self._storing:
            if job.error is not None and job not in self._receipts:
                self._receipts[job] = self._sink.emit(self._final(job, None))

    def _final(self, job: Job, failure: BaseException | None) -> UsageRecord:
        cause = job.error or failure
        stopped = cause is None or isinstance(cause, _STOPS) or (job.error is None and job.finish == "cancelled")
        return self._record(job, Outcome.CANCELLED if stopped else Outcome.ERROR, cause)

    def _record(self, job: Job, outcome: Outcome, error: BaseException | None = None) -> UsageRecord:
        if job not in self._records:
            self._records[job] = _usage(self._model, job, outcome, error)
        return self._records[job]


def _revoke(recorder: ref[Recorder], job: Job, error: PolarError) -> None:
    """End a job whose hold is lost, and have its record stored by the thread of late records."""
    job.revoke(error)
    if (living := recorder()) is not None:
        _LATE.put(partial(_store_revoked, living, job))


def _store_revoked(recorder: Recorder, job: Job) -> None:
    try:
        recorder.store_revoked(job)
    except Exception:  # the caller offers it to the sink again when it leaves
        _log.exception("the usage record of a request that lost its hold could not be stored yet")


class _LateRecords:
    """One thread that stores the records of dropped requests. `put` is safe in finalisers: it waits for no lock."""

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._thread = threading.Lock()
        """Held while the thread runs."""

    def put(self, call: Callable[[], object]) -> None:
        """Leave a call to the thread."""
        if self._process != os.getpid():
            self._start_anew()
        self._calls.put(call)
        if self._thread.acquire(blocking=False):
            try:
                start_detached(self._run, "polar-record")
            except RuntimeError:  # no thread starts now: the next call tries again, or `flush`
                self._thread.release()

    def flush(self, seconds: float) -> bool:
        """Wait until all calls so far have run; False if that takes too long."""
        done = threading.Lock()
        done.acquire()
        self.put(done.release)
        if self._thread.acquire(blocking=False):
            self._run_all()
            self._thread.release()
        return done.acquire(timeout=seconds)

    def _run_all(self) -> None:
        with suppress(Empty):
            while True:
                self._calls.get(timeout=0)()

    def _run(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=_IDLE_SECONDS)
            except Empty:
                self._thread.release()
                if self._calls.empty() or not self._thread.acquire(blocking=False):
                    return
                continue
            call()
            del call  # holds a request's memory


_LATE: Final = _LateRecords()
_OPEN: Final[WeakSet[Recorder]] = WeakSet()
"""Recorders that may have jobs to record."""


def flush(seconds: float = _EXIT_SECONDS) -> bool:
    """Wait until the records of all requests dropped so far are stored; False if that takes too long."""
    return _LATE.flush(seconds)


@cache
def _finish_at_exit() -> None:
    """Store the records of open streams when the process ends; called late, so that it runs before sinks close."""
    atexit.register(run_uncut, _finish_all)


def _finish_all() -> None:
    for recorder in list(_OPEN):
        recorder.drop()
    if not flush():
        _log.error("the process ended before the usage records of its dropped requests could be stored")


def _usage(model: LoadedModel, job: Job, outcome: Outcome, error: BaseException | None) -> UsageRecord:
    """The usage record of a job that computes no more."""
    request, row, now = job.request, job.row, time.perf_counter_ns()
    begin = job.begin_ns or now
    flops = row.work.flops(request.route.flops)
    return UsageRecord(
        request_id=request.request_id,
        tenant=request.tenant,
        tags=dict(request.tags),
        model=model.name,
        model_fingerprint=model.fingerprint,
        router=request.router,
        router_version=request.router_version,
        tier=request.tier,
        program=request.route.program.text,
        outcome=outcome,
        finish_reason=_FINISH[outcome] or job.finish or "error",
        error=type(error).__name__ if outcome is Outcome.ERROR else None,
        tokens=TokenUsage(input=len(request.tokens), cached=job.cached, output=len(job.tokens)),
        visits=row.work.visits(),
        loops_stopped=row.loops_stopped,
        flops=flops,
        identity_flops=_identity_flops(job, flops.total),
        kv_bytes_peak=job.kv_bytes,
        device=str(row.decoder.placement),
        dtype=row.decoder.dtype_name,
        started_at=request.started_at,
        queue_ns=begin - request.created_ns,
        prefill_ns=max((job.prefill_end_ns or now) - begin, 0),
        decode_ns=max((job.end_ns or now) - job.prefill_end_ns, 0) if job.prefill_end_ns else 0,
    )


def _identity_flops(job: Job, executed: int) -> int:
    """FLOPs of the finished passes at full depth; where not even the prefill finished, no saving is claimed."""
    work = job.row.work
    if not work.prefilled:
        return executed
    cost = job.row.decoder.cost
    identity = Program.identity(cost.depth)
    prompt, scored = len(job.request.tokens), job.request.prompt_logprobs is not None
    return cost.request(identity, prompt, work.decode_steps + 1, cached=job.cached, scored=scored).total
