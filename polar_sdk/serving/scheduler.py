"""Continuous batching: one thread runs the rows of all callers together, token by token.

Finished rows leave and waiting ones join between two tokens. Prompts run in chunks, so that a long one does not hold
up rows that are decoding. Three parts keep tenants from each other's harm: `queue` says whose request is next, `places`
who gives way to it, and `pace` how much those who run may add to each other's passes.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import torch

from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.sampling import likeliest_tokens
from polar_sdk.errors import CacheMemoryError, QueueFullError
from polar_sdk.serving.job import asked_by_engine
from polar_sdk.serving.pace import PROMPT_DISCOUNT, Pace
from polar_sdk.serving.places import Limits, Places
from polar_sdk.serving.prefixes import PrefixCache
from polar_sdk.serving.queue import FairQueue
from polar_sdk.serving.threads import InternalThread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.serving.job import Job


_IDLE_SECONDS: Final = 2.0
"""The thread ends after this time without work, so that it keeps no weights alive."""
_LIVING: Final[WeakSet[Scheduler]] = WeakSet()
"""Schedulers that may have a thread."""
_FORK_SECONDS: Final = 5.0
"""How long a fork waits for the round to end that is under way: a hook in it may wait for whoever forks."""
_CHECKS: Final = 64
"""Jobs that wait of which is checked in one round whether their time is up or their caller's `cancel` is set."""
_POLL_SECONDS: Final = 0.02
"""How often to check whether a caller that lags behind has cancelled or run out of time, which wakes nobody."""


class Scheduler:
    """Runs jobs on one model. Safe to use from any thread."""

    def __init__(self, decoder: Decoder, limits: Limits | None = None) -> None:
        self.decoder = decoder
        self.limits = limits or Limits()
        self.prefixes = PrefixCache(decoder)
        self.replayed_flops = 0
        """Executed again for rows that had given their pages up. In no usage record: nobody pays for it."""
        self._queue = FairQueue()
        self._places = Places(decoder, self.prefixes, self._queue.clocks)
        self._pace = Pace(sum(cost.linear for cost in decoder.cost.layers) + decoder.cost.head)
        self._checked = 0
        """Where the next part of those who wait begins, of which is checked whether they still do."""
        self._known: set[str] = set()
        """Tenants that waited when the round began."""
        self._hurried = False
        """Whether the last round left out a token of those who decode, for the prompt of a newcomer."""
        self._refused: list[Job] = []
        """Jobs that lost their place in the queue, and are yet to be told."""
        self._work = threading.Condition()
        self._round_lock = threading.RLock()
        """Held by the engine's thread while anything in memory is half done."""
        self._thread: threading.Thread | None = None
        self._closing = False
        _LIVING.add(self)

    def __len__(self) -> int:
        """Number of jobs that wait or run."""
        with self._work:
            return len(self._queue) + len(self._places)

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
            limits = self.limits
            self._refused += self._queue.put(jobs, limits.max_waiting, limits.weights, self._places.jobs)
            if self._thread is None or not self._thread.is_alive():
                self._thread = InternalThread(target=self._serve, name="polar-engine", daemon=True)
                self._thread.start()
            for place, job in enumerate(jobs, len(self._queue) + len(self._places) - len(jobs)):
                job.engine = self._thread
                if place >= 2 * self.limits.max_rows:  # a job that waits for long must not hold memory
                    job.row.end_lead()
                job.submitted = True
            self._work.notify()

    def _check_size(self, job: Job) -> None:
        pool = self.decoder.pool
        for pages, size in zip(self._places.pages_needed(job), pool.sizes, strict=True):
            if pages > size:
                raise CacheMemoryError(
                    f"prompt and answer of {job.max_length} tokens need {pages * pool.page_bytes / 2**20:.0f} MiB of "
                    f"keys and values; {size * pool.page_bytes / 2**20:.0f} MiB are set aside.",
                    hint="Shorten the prompt, lower max_tokens, or load the model with a larger kv_memory.",
                )

    @torch.inference_mode()
    def _serve(self) -> None:
        while self._await_work():
            try:
                self._round()
            except BaseException as error:  # a bug in this module must not leave callers waiting forever
                self._fail_all(error)

    def _round(self) -> None:
        with self._round_lock:
            self._sweep()
            self._admit()
            passes = self._run_passes()
        if not passes:
            with self._work:  # every caller lags behind: wait for one to read on, and check for cancellations
                self._work.wait(_POLL_SECONDS)

    def _fail_all(self, error: BaseException) -> None:
        with self._work:
            jobs = self._take_all()
        for job in jobs:
            if not job.done:
                job.fail(error)

    def _take_all(self) -> list[Job]:
        """Begin anew without jobs; returns those that waited or ran."""
        jobs = [*self._refused, *self._queue, *self._places.jobs]
        self._refused, self._queue = [], FairQueue()
        self._places = Places(self.decoder, self.prefixes, self._queue.clocks)
        return jobs

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
            for job in [*self._queue, *self._places.jobs]:
                job.cancel()
            self._work.notify()
        thread.join()

    def hold_for_fork(self) -> bool:
        """Hold the engine between two rounds, so that a child inherits no half of a pass; False if that takes long."""
        return self._round_lock.acquire(timeout=_FORK_SECONDS)

    def go_on_after_fork(self) -> None:
        """In the parent, after `hold_for_fork`."""
        self._round_lock.release()

    def restart_after_fork(self) -> None:
        """In a forked child: the thread is not here, and what it was computing is the parent's."""
        self._work = threading.Condition()  # the parent's threads may have held the old ones
        self._round_lock = threading.RLock()
        self._thread, self._closing = None, False
        for job in self._take_all():
            job.disown()
        self.prefixes.forget()
        self.decoder.restart_after_fork()

    def _wake(self) -> None:
        with self._work:
            self._work.notify()

    def _busy(self) -> bool:
        return bool(self._queue or self._places or self._refused)

    def _sweep(self) -> None:
        """Remove jobs that are done, cancelled or out of time, whether they run or wait."""
        with self._work:
            waiting = self._next_to_check(list(self._queue))
            refused, self._refused = self._refused, []
        for job in refused:
            job.fail(_gave_way(self.limits.max_waiting))
        for job in [*waiting, *self._places.jobs]:
            if not job.done:
                self._attempt([job], job.stop_if_due)
        with self._work:
            for job in waiting:
                if job.done:
                    self._queue.remove(job)
            self._places.drop_done()
        self._places.count_pauses()

    def _next_to_check(self, waiting: list[Job]) -> list[Job]:
        """Of jobs that wait, those whose call has ended and a part of the others: all would slow each token."""
        start = self._checked = self._checked % max(len(waiting), 1)
        self._checked += _CHECKS
        part = waiting[start : start + _CHECKS]
        return part + [job for job in waiting if job.left and job not in part]

    def _admit(self) -> None:
        """Give places to those who wait, as long as others give way; the next in turn is never passed over."""
        limits = self.limits
        while True:
            with self._work:
                self._queue.line_up(self._places.jobs)
                job = self._queue.first(self._places.shares(self._places.jobs, limits.max_rows, limits.weights))
                leaving = None if job is None else self._places.giving_way(job, limits.max_rows, limits.weights)
                if job is None or leaving is None:
                    self._known = set(self._queue.tenants)
                    return
                for other in leaving:
                    self._places.remove(other)
                    self._queue.rest(other)
                self._queue.remove(job)
                self._places.add(job, self._queue.resting)

    def _run_passes(self) -> bool:
        """A pass over prompts, and one token for every row whose prompt has run and whose caller keeps up."""
        jobs = [job for job in self._places.jobs if not job.paused]
        needs = dict.fromkeys((job.request.tenant for job in jobs), 0.0)
        for job in jobs:
            if job.decoding:
                needs[job.request.tenant] += job.row.work.next_token(job.row.length + 1) / self._weight(job)
        self._pace.begin(needs, self.limits.pace)
        jobs = [job for job in jobs if self._pace.may_run(job.request.tenant)] or jobs
        decoding = [job for job in jobs if job.decoding]
        prompts, chunks = self._next_chunks([job for job in jobs if not job.decoding], beside=bool(decoding))
        # Prompts first: who has just come gets a first token before others get a further one. Rows that end their
        # prompt here decode in the next round, so that `cancel` is checked before each token.
        if prompts:
            self._attempt(prompts, lambda: self._run_chunks(prompts, chunks))
            self._hurried = not self._hurried and self._has_newcomer()
        if decoding and not (prompts and self._hurried):
            self._attempt(decoding, lambda: self._run_decode(decoding))
        return bool(jobs)

    def _has_newcomer(self) -> bool:
        """Whether a tenant without a place has come during this round."""
        here = {job.request.tenant for job in self._places.jobs} | self._known
        with self._work:
            return any(tenant not in here for tenant in self._queue.tenants)

    def _next_chunks(self, jobs: list[Job], *, beside: bool) -> tuple[list[Job], list[Sequence[int]]]:
        """Prompts to run now and their next chunks: first of the tenant whose clock is furthest behind.

        Tenants with more rows than the first one do not lengthen the pass that brings it its first token.
        """
        left = self.limits.prefill_beside if beside else self.limits.prefill_alone
        rows = Counter(job.request.tenant for job in self._places.jobs)
        jobs.sort(key=lambda job: self._queue.clocks[job.request.tenant])  # stable: the oldest of a tenant first
        chosen: list[Job] = []
        chunks: list[Sequence[int]] = []
        for job in jobs:
            if left > 0 and rows[job.request.tenant] <= rows[jobs[0].request.tenant]:
                chosen.append(job)
                chunks.append(job.chunk)
                left -= len(chunks[-1])
        return chosen, chunks

    def _run_chunks(self, jobs: Sequence[Job], chunks: Sequence[Sequence[int]]) -> None:
        for job in jobs:
            job.start_clock()
        again = [job.row.replaying for job in jobs]
        ends = [job.row.length + len(chunk) == len(job.request.tokens) for job, chunk in zip(jobs, chunks, strict=True)]
        try:
            logits = next_logits(self.decoder, [job.row for job in jobs], chunks, ends, self._scored(jobs, again))
        finally:
            self._charge(jobs, discount=PROMPT_DISCOUNT)
        ended = [(job, replayed) for job, end, replayed in zip(jobs, ends, again, strict=True) if end]
        for job, replayed in zip(jobs, again, strict=True):
            if replayed:
                job.row.note_replay()
        sampling = [index for index, (_, replayed) in enumerate(ended) if not replayed]
        new = [ended[index][0] for index in sampling]
        self._choose(new, logits[sampling] if len(new) < len(ended) else logits)

    def _scored(self, jobs: Sequence[Job], again: Sequence[bool]) -> dict[int, Callable[[Tensor], None]]:
        """What reads the prompts that are to be scored; an error of one ends its job alone."""

        def reader(job: Job) -> Callable[[Tensor], None]:
            return lambda states: self._attempt([job], partial(job.score_prompt, states))

        wanted = ((index, job) for index, job in enumerate(jobs) if job.request.prompt_logprobs is not None)
        return {index: reader(job) for index, job in wanted if not again[index]}

    def _run_decode(self, jobs: Sequence[Job]) -> None:
        try:
            logits = next_logits(self.decoder, [job.row for job in jobs], [job.tokens[-1:] for job in jobs])
        finally:
            self._charge(jobs)
        self._choose(jobs, logits)

    def _charge(self, jobs: Sequence[Job], discount: int = 1) -> None:
        """Count what a pass executed, for the fairness between tenants."""
        for job in jobs:
            work = job.row.executed - job.charged
            job.charged += work
            if job.row.replaying:
                self.replayed_flops += work
            self._queue.clocks.advance(job.request.tenant, work / self._weight(job))
            self._pace.pay(job.request.tenant, work / self._weight(job) / discount)

    def _weight(self, job: Job) -> float:
        return self.limits.weights.get(job.request.tenant, 1.0)

    def _choose(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """The next token of each job from logits (B, V); an error, such as of a caller's hook, ends its job alone."""
        if not jobs:
            return
        for row, (job, likeliest, logit) in enumerate(zip(jobs, *likeliest_tokens(logits), strict=True)):
            if job.done:  # its prompt could not be scored
                continue
            if not job.tokens and math.isfinite(logit):
                self.prefixes.keep(job.request, job.row, self.limits.prefix_share)
            self._attempt([job], partial(job.choose, logits[row], likeliest, logit))

    def _attempt(self, jobs: Sequence[Job], run: Callable[[], None]) -> None:
        """Run a pass; an error ends the jobs that were part of it, and no others."""
        try:
            run()
        except BaseException as error:  # handed to the callers, whatever it is; the thread goes on serving others
            for job in jobs:
                if not job.done:
                    job.fail(error)


def _gave_way(limit: int) -> QueueFullError:
    """The error of a job that lost its place in the queue."""
    return QueueFullError(
        f"this request waited, or its stream was not read, while the queue reached its limit of {limit}; its tenant "
        "had most of the requests in it, so another tenant's took its place.",
        hint="Try again when some are done, or raise max_waiting in the limits of the scheduler.",
    )


@atexit.register
def _close_all() -> None:
    """End the threads before the interpreter does: it would stop one inside torch, which aborts the process."""
    for scheduler in list(_LIVING):
        scheduler.close()


_held_for_fork: Final[list[Scheduler]] = []


def _hold_for_fork() -> None:
    _held_for_fork[:] = [scheduler for scheduler in list(_LIVING) if scheduler.hold_for_fork()]


def _go_on_after_fork() -> None:
    while _held_for_fork:
        _held_for_fork.pop().go_on_after_fork()


def _restart_after_fork() -> None:
    _held_for_fork.clear()
    for scheduler in list(_LIVING):
        scheduler.restart_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_hold_for_fork, after_in_parent=_go_on_after_fork, after_in_child=_restart_after_fork)
