"""Continuous batching: one thread runs the rows of all callers together, token by token.

Finished rows leave and waiting ones join between two tokens. Prompts run in chunks, so that a long one does not hold
up those who are decoding. A row is let in only when the pages it may need at most are there, so that no answer breaks
off for want of memory. The thread lives while there is work, and a little longer.
"""

from __future__ import annotations

import atexit
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import torch

from polar_sdk.engine.forward import advance, next_logits
from polar_sdk.engine.pages import PAGE
from polar_sdk.errors import CacheMemoryError
from polar_sdk.serving.job import choose
from polar_sdk.serving.prefixes import PrefixCache
from polar_sdk.serving.queue import FairQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.serving.job import Job


_IDLE_SECONDS: Final = 2.0
"""The thread ends after so long without work, so that it keeps no weights alive."""
_LIVING: Final[WeakSet[Scheduler]] = WeakSet()
"""Schedulers that may have a thread."""
_POLL_SECONDS: Final = 0.02
"""How often to look whether a caller that lags behind has set `cancel` or run out of time; those tell nobody."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes on at a time.

    Attributes:
        max_rows: Rows that run together.
        max_waiting: Requests that may wait; one more is refused with `QueueFullError`.
        beside: Prompt tokens that run in one pass while others are decoding, to the next whole chunk.
        alone: The same while nobody is.
        prefix_share: Most of the pages that may keep starts of prompts for later requests; 0 turns that off.
    """

    max_rows: int = 32
    max_waiting: int = 1024
    beside: int = 256
    alone: int = 2048
    prefix_share: float = 0.25


class Scheduler:
    """Runs jobs on one model. Safe to use from any thread."""

    def __init__(self, decoder: Decoder, limits: Limits | None = None) -> None:
        self.decoder = decoder
        self.limits = limits or Limits()
        self.prefixes = PrefixCache(decoder)
        self._queue = FairQueue()
        self._running: list[Job] = []
        self._promised: dict[Job, list[int]] = {}
        """Pages of each store that each running job may need at most."""
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        _LIVING.add(self)

    def __len__(self) -> int:
        """Jobs that wait or run."""
        with self._work:
            return len(self._queue) + len(self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs run, together if there is room.

        Raises:
            QueueFullError: Too many wait already.
            CacheMemoryError: One could never run, because its keys and values do not fit the memory for them.
        """
        for job in jobs:
            self._check_size(job)
            job.wake = self._wake
        with self._work:
            self._queue.put(jobs, self.limits.max_waiting)
            for place, job in enumerate(jobs, len(self._queue) + len(self._running) - len(jobs)):
                if place >= 2 * self.limits.max_rows:  # what waits for long must not hold memory meanwhile
                    job.row.end_lead()
                job.submitted = True
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name="polar-engine", daemon=True)
                self._thread.start()
            self._work.notify()

    def _check_size(self, job: Job) -> None:
        pool = self.decoder.pool
        for pages, size in zip(self._pages(job), pool.sizes, strict=True):
            if pages > size:
                raise CacheMemoryError(
                    f"prompt and answer of {job.most_tokens} tokens need {pages * pool.page_bytes / 2**20:.0f} MiB of "
                    f"keys and values; {size * pool.page_bytes / 2**20:.0f} MiB are set aside.",
                    hint="Shorten the prompt, lower max_tokens, or load the model with a larger kv_memory.",
                )

    def _pages(self, job: Job) -> list[int]:
        """Pages of each store that a job may need at most."""
        visits = Counter(self.decoder.stores(job.request.route.program))
        blocks = -(-job.most_tokens // PAGE)
        return [blocks * visits[store] for store in range(len(self.decoder.pool.sizes))]

    @torch.inference_mode()
    def _serve(self) -> None:
        while self._await_work():
            try:
                self._round()
            except BaseException as error:  # a fault of this module: no caller may wait forever for it
                self._fail_all(error)

    def _round(self) -> None:
        self._sweep()
        self._admit()
        # Decoding first: a row gets one token per round, so that `cancel` is looked at before each.
        passes = [self._decode(), self._prefill()]
        if not any(passes):
            with self._work:  # every caller lags behind: wait for one to read on, and look for cancellations
                self._work.wait(_POLL_SECONDS)

    def _fail_all(self, error: BaseException) -> None:
        with self._work:
            jobs = [*self._queue, *self._running]
            self._queue, self._running, self._promised = FairQueue(), [], {}
        for job in jobs:
            if not job.done:
                job.fail(error)

    def _await_work(self) -> bool:
        """Wait for something to do; False once there was nothing for a while, and then this thread is over."""
        with self._work:
            self._work.wait_for(lambda: self._busy() or self._closing, _IDLE_SECONDS)
            if not self._busy():
                self._thread, self._closing = None, False
                return False
            return True

    def close(self) -> None:
        """Cancel every job and wait for the thread to end; a later job starts another."""
        with self._work:
            thread = self._thread
            if thread is None:
                return
            self._closing = True
            for job in [*self._queue, *self._running]:
                job.cancel()
            self._work.notify()
        thread.join()

    def _wake(self) -> None:
        with self._work:
            self._work.notify()

    def _busy(self) -> bool:
        return bool(self._running) or len(self._queue) > 0

    def _sweep(self) -> None:
        """Let go of jobs that are done, cancelled or out of time, whether they run or wait."""
        with self._work:
            waiting = list(self._queue)
        for job in [*waiting, *self._running]:
            if not job.done:
                self._attempt([job], job.stop_if_asked)
        with self._work:
            for job in waiting:
                if job.done:
                    self._queue.remove(job)
        self._running = [job for job in self._running if not job.done]
        self._promised = {job: self._promised[job] for job in self._running}

    def _admit(self) -> None:
        """Take waiting jobs in as far as rows and pages reach; the next in turn is never passed over."""
        pool = self.decoder.pool
        while len(self._running) < self.limits.max_rows:
            with self._work:
                job = self._queue.first()
                if job is None:
                    return
                needed = self._pages(job)
                promised = [sum(column) for column in zip(*self._promised.values(), needed, strict=True)]
                if any(most > size for most, size in zip(promised, pool.sizes, strict=True)):
                    return
                self._queue.serve(job)
            self.prefixes.make_room(promised)
            job.cached = self.prefixes.lend(job.request, job.row)
            self._running.append(job)
            self._promised[job] = needed

    def _prefill(self) -> bool:
        """One pass over the next chunk of the prompts that have not run to their end, oldest first."""
        lone = not any(job.prefilled for job in self._running)
        left = self.limits.alone if lone else self.limits.beside
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
        hidden = advance(self.decoder, [job.row for job in jobs], chunks)
        ended = [job for job, end in zip(jobs, ends, strict=True) if end]
        if not ended:
            return
        lasts = torch.tensor([len(chunk) for chunk in chunks], device=hidden.device).cumsum(0) - 1
        logits = self.decoder.head(hidden[lasts[torch.tensor(ends, device=hidden.device)]])
        for job in ended:
            job.row.work.head()
            job.row.work.end_prefill()
            self.prefixes.keep(job.request, job.row, self.limits.prefix_share)
        self._sample(ended, logits)

    def _decode(self) -> bool:
        """One token for every row that is past its prompt and whose caller keeps up."""
        jobs = [job for job in self._running if job.prefilled and not job.done and not job.paused]
        if jobs:
            self._attempt(jobs, lambda: self._run_decode(jobs))
        return bool(jobs)

    def _run_decode(self, jobs: Sequence[Job]) -> None:
        logits = next_logits(self.decoder, [job.row for job in jobs], [job.pending for job in jobs])
        self._sample(jobs, logits)

    def _sample(self, jobs: Sequence[Job], logits: Tensor) -> None:
        for row, (job, token) in enumerate(zip(jobs, choose(jobs, logits), strict=True)):
            if token is None:  # a hook is the caller's code: its errors end this job alone
                self._attempt([job], partial(job.sample, logits[row]))
            else:
                job.take(token)

    def _attempt(self, jobs: Sequence[Job], run: Callable[[], None]) -> None:
        """Run a pass; an error ends the jobs that were in it, and no others."""
        try:
            run()
        except BaseException as error:  # handed to the callers, whatever it is; the thread serves the others
            for job in jobs:
                if not job.done:
                    job.fail(error)


@atexit.register
def _close_all() -> None:
    """End the threads before the interpreter ends: it would stop one within torch, which aborts the process."""
    for scheduler in list(_LIVING):
        scheduler.close()
