"""Continuous batching: one thread runs the rows of all callers together, token by token.

Finished rows leave and waiting ones join between two tokens. Prompts run in chunks, so that a long one does not hold
up rows that are decoding. A row is admitted only when the maximum number of pages it may need is free, so that no
answer ends for lack of memory.

Who is admitted next is fair between tenants (start-time fair queueing): every tenant has a clock that ticks when one of
its jobs is served, and the tenant whose clock is furthest behind is next. A new tenant starts at the clock of those who
wait, so that neither a flood nor a long absence earns a privilege.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import torch

from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.pages import PAGE
from polar_sdk.errors import CacheMemoryError, QueueFullError
from polar_sdk.serving.job import asked_by_engine, choose
from polar_sdk.serving.prefixes import PrefixCache
from polar_sdk.serving.threads import InternalThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.serving.job import Job


_IDLE_SECONDS: Final = 2.0
"""The thread ends after this time without work, so that it keeps no weights alive."""
_LIVING: Final[WeakSet[Scheduler]] = WeakSet()
"""Schedulers that may have a thread."""
_POLL_SECONDS: Final = 0.02
"""How often to check whether a caller that lags behind has cancelled or run out of time, which wakes nobody."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one engine takes on at a time.

    Attributes:
        max_rows: Maximum number of rows that run together.
        max_waiting: Maximum number of requests that wait; one more is refused with `QueueFullError`.
        prefill_beside: Prompt tokens that run in one pass while other rows are decoding, to the next whole chunk.
        prefill_alone: The same while no row is decoding.
        prefix_share: Maximum share of the pages that keep starts of prompts for later requests; 0 turns that off.
    """

    max_rows: int = 32
    max_waiting: int = 1024
    prefill_beside: int = 256
    prefill_alone: int = 2048
    prefix_share: float = 0.25


class FairQueue:
    """Jobs that wait, in order of arrival per tenant. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Job]] = {}
        self._clocks: dict[str, int] = {}
        self._now = 0
        """Clock of the tenant served last."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._waiting.values() for job in jobs)

    def put(self, jobs: Sequence[Job], limit: int) -> None:
        """Add jobs, all or none.

        Raises:
            QueueFullError: More than `limit` would wait.
        """
        if len(self) + len(jobs) > limit:
            raise QueueFullError(
                f"{len(self)} requests are already waiting; {len(jobs)} more would exceed the limit of {limit}.",
                hint="Try again when some are done, or raise max_waiting in the limits of the scheduler.",
            )
        for job in jobs:
            tenant = job.request.tenant
            if tenant not in self._waiting:
                self._waiting[tenant] = deque()
                self._clocks[tenant] = max(self._clocks.get(tenant, 0), self._now)
            self._waiting[tenant].append(job)

    def first(self) -> Job | None:
        """The job to serve next, or None; between tenants with equal clocks, the job that has waited longest."""
        oldest = [jobs[0] for jobs in self._waiting.values()]
        return min(oldest, key=lambda job: (self._clocks[job.request.tenant], job.request.created_ns), default=None)

    def serve(self, job: Job) -> None:
        """Take a job out to be served; its tenant's clock ticks."""
        tenant = job.request.tenant
        self._now = self._clocks[tenant]
        self._clocks[tenant] += 1
        self.remove(job)

    def remove(self, job: Job) -> None:
        """Take a job out without serving it."""
        tenant = job.request.tenant
        self._waiting[tenant].remove(job)
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            if self._clocks[tenant] <= self._now:
                del self._clocks[tenant]  # it would start at the same clock again


class Scheduler:
    """Runs jobs on one model. Safe to use from any thread."""

    def __init__(self, decoder: Decoder, limits: Limits | None = None) -> None:
        self.decoder = decoder
        self.limits = limits or Limits()
        self.prefixes = PrefixCache(decoder)
        self._queue = FairQueue()
        self._running: list[Job] = []
        self._promised: dict[Job, list[int]] = {}
        """Maximum number of pages of each store that each running job may need."""
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        _LIVING.add(self)

    def __len__(self) -> int:
        """Number of jobs that wait or run."""
        with self._work:
            return len(self._queue) + len(self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run jobs, together if there is room.

        Raises:
            QueueFullError: Too many are waiting already.
            CacheMemoryError: One could never run, because its keys and values exceed the memory set aside for them.
            InvalidRequestError: A logits hook of this model asks for it.
        """
        if threading.current_thread() is self._thread:
            raise asked_by_engine()
        for job in jobs:
            self._check_size(job)
            job.wake = self._wake
        with self._work:
            self._queue.put(jobs, self.limits.max_waiting)
            if self._thread is None or not self._thread.is_alive():
                self._thread = InternalThread(target=self._serve, name="polar-engine", daemon=True)
                self._thread.start()
            for place, job in enumerate(jobs, len(self._queue) + len(self._running) - len(jobs)):
                job.engine = self._thread
                if place >= 2 * self.limits.max_rows:  # a job that waits for long must not hold memory
                    job.row.end_lead()
                job.submitted = True
            self._work.notify()

    def _check_size(self, job: Job) -> None:
        pool = self.decoder.pool
        for pages, size in zip(self._pages_needed(job), pool.sizes, strict=True):
            if pages > size:
                raise CacheMemoryError(
                    f"prompt and answer of {job.max_length} tokens need {pages * pool.page_bytes / 2**20:.0f} MiB of "
                    f"keys and values; {size * pool.page_bytes / 2**20:.0f} MiB are set aside.",
                    hint="Shorten the prompt, lower max_tokens, or load the model with a larger kv_memory.",
                )

    def _pages_needed(self, job: Job) -> list[int]:
        """Maximum number of pages of each store that a job may need."""
        visits = Counter(self.decoder.stores(job.request.route.program))
        blocks = -(-job.max_length // PAGE)
        return [blocks * visits[store] for store in range(len(self.decoder.pool.sizes))]

    @torch.inference_mode()
    def _serve(self) -> None:
        while self._await_work():
            try:
                self._round()
            except BaseException as error:  # a bug in this module must not leave callers waiting forever
                self._fail_all(error)

    def _round(self) -> None:
        self._sweep()
        self._admit()
        # Decoding first: a row gets one token per round, so that `cancel` is checked before each.
        passes = [self._decode(), self._prefill()]
        if not any(passes):
            with self._work:  # every caller lags behind: wait for one to read on, and check for cancellations
                self._work.wait(_POLL_SECONDS)

    def _fail_all(self, error: BaseException) -> None:
        with self._work:
            jobs = [*self._queue, *self._running]
            self._queue, self._running, self._promised = FairQueue(), [], {}
        for job in jobs:
            if not job.done:
                job.fail(error)

    def _await_work(self) -> bool:
        """Wait for something to do; False after a while without work, and then this thread ends."""
        with self._work:
            self._work.wait_for(lambda: self._busy() or self._closing, _IDLE_SECONDS)
            if not self._busy():
                self._thread, self._closing = None, False
                return False
            return True

    def close(self) -> None:
        """Cancel every job and wait for the thread to end; a later job starts a new one."""
        with self._work:
            thread = self._thread
            if thread is None:
                return
            self._closing = True
            for job in [*self._queue, *self._running]:
                job.cancel()
            self._work.notify()
        thread.join()

    def restart_after_fork(self) -> None:
        """In a forked child: what the parent's thread was computing is the parent's, and the thread is not here."""
        self._work = threading.Condition()  # the parent's thread may have held the old one
        self._thread, self._closing = None, False
        for job in [*self._queue, *self._running]:
            job.disown()

    def _wake(self) -> None:
        with self._work:
            self._work.notify()

    def _busy(self) -> bool:
        return bool(self._running) or len(self._queue) > 0

    def _sweep(self) -> None:
        """Remove jobs that are done, cancelled or out of time, whether they run or wait."""
        with self._work:
            waiting = list(self._queue)
        for job in [*waiting, *self._running]:
            if not job.done:
                self._attempt([job], job.stop_if_due)
        with self._work:
            for job in waiting:
                if job.done:
                    self._queue.remove(job)
        self._running = [job for job in self._running if not job.done]
        self._promised = {job: self._promised[job] for job in self._running}

    def _admit(self) -> None:
        """Admit waiting jobs while there are rows and pages for them; the next in turn is never passed over."""
        pool = self.decoder.pool
        while len(self._running) < self.limits.max_rows:
            with self._work:
                job = self._queue.first()
                if job is None:
                    return
                needed = self._pages_needed(job)
                promised = [sum(store) for store in zip(*self._promised.values(), needed, strict=True)]
                if any(pages > size for pages, size in zip(promised, pool.sizes, strict=True)):
                    return
                self._queue.serve(job)
            self.prefixes.make_room(promised)
            job.cached = self.prefixes.lend(job.request, job.row)
            self._running.append(job)
            self._promised[job] = needed

    def _prefill(self) -> bool:
        """One pass over the next chunks of the prompts that have not run to their end, oldest first."""
        decoding = any(job.prefilled for job in self._running)
        left = self.limits.prefill_beside if decoding else self.limits.prefill_alone
        jobs, chunks = [], []
        for job in self._running:
            if not job.prefilled and not job.done and left > 0:
                chunk = job.chunk
                jobs.append(job)
                chunks.append(chunk)
                left -= len(chunk)
        if jobs:
            self._attempt(jobs, lambda: self._run_chunks(jobs, chunks))
        return bool(jobs)

    def _run_chunks(self, jobs: Sequence[Job], chunks: Sequence[Sequence[int]]) -> None:
        for job in jobs:
            job.start_clock()
        ends = [len(chunk) == len(job.pending) for job, chunk in zip(jobs, chunks, strict=True)]
        logits = next_logits(self.decoder, [job.row for job in jobs], chunks, ends)
        ended = [job for job, end in zip(jobs, ends, strict=True) if end]
        for job in ended:
            self.prefixes.keep(job.request, job.row, self.limits.prefix_share)
        self._sample(ended, logits)

    def _decode(self) -> bool:
        """One token for every row whose prompt has run and whose caller keeps up."""
        jobs = [job for job in self._running if job.prefilled and not job.done and not job.paused]
        if jobs:
            self._attempt(jobs, lambda: self._run_decode(jobs))
        return bool(jobs)

    def _run_decode(self, jobs: Sequence[Job]) -> None:
        logits = next_logits(self.decoder, [job.row for job in jobs], [job.pending for job in jobs])
        self._sample(jobs, logits)

    def _sample(self, jobs: Sequence[Job], logits: Tensor) -> None:
        for row, (job, token) in enumerate(zip(jobs, choose(jobs, logits), strict=True)):
            if token is None:  # a hook is the caller's code: its errors end only this job
                self._attempt([job], partial(job.sample, logits[row]))
            else:
                job.take(token)

    def _attempt(self, jobs: Sequence[Job], run: Callable[[], None]) -> None:
        """Run a pass; an error ends the jobs that were part of it, and no others."""
        try:
            run()
        except BaseException as error:  # handed to the callers, whatever it is; the thread goes on serving others
            for job in jobs:
                if not job.done:
                    job.fail(error)


@atexit.register
def _close_all() -> None:
    """End the threads before the interpreter does: it would stop one inside torch, which aborts the process."""
    for scheduler in list(_LIVING):
        scheduler.close()


def _restart_after_fork() -> None:
    for scheduler in list(_LIVING):
        scheduler.restart_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_restart_after_fork)
