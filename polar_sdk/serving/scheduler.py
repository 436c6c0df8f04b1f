"""Continuous batching: one thread runs the rows of all callers together, token by token.

Finished rows leave and waiting ones join between two tokens. Prompts run in chunks, so that a long one does not hold up
rows that are decoding. Three parts protect tenants from each other: `queue` decides whose request is next, `places` who
gives way to it, and `pace` how much running tenants may add to each other's passes. Idle requests are outside of this:
one of them runs when nobody else has had work for a moment, and waits again when somebody has.

Callers pass their jobs through a queue and touch nothing else, since a signal may stop a caller anywhere: queue and
places belong to the thread alone.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import torch

from polar_sdk.errors import CacheMemoryError, QueueFullError
from polar_sdk.serving.delivery import asked_by_engine
from polar_sdk.serving.pace import Pace
from polar_sdk.serving.passes import Passes, attempt
from polar_sdk.serving.places import Limits, Places
from polar_sdk.serving.prefixes import LEAST_SHARED, PrefixCache
from polar_sdk.serving.queue import FairQueue, who_gives_room
from polar_sdk.serving.threads import Inbox

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.serving.job import Job


_THREAD: Final = "polar-engine"
_STARTING_SECONDS: Final = 0.001
_QUIET_SECONDS: Final = 0.05
"""An idle request begins, or goes on, after this time without others: who waits for an answer often asks again."""
_IDLE_SECONDS: Final = 2.0
"""The thread ends after this time without work, so that it keeps no weights alive."""
_LIVING: Final[WeakSet[Scheduler]] = WeakSet()
"""Schedulers that may have a thread."""
_FORK_SECONDS: Final = 5.0
"""How long a fork waits for the round to end that is under way: a hook in it may wait for whoever forks."""
_LATELY_SECONDS: Final = 5.0
"""A tenant that was served within this time may come again at any moment."""
_JUST_BEGUN: Final = 8
"""Rows with at most this many tokens are new."""
_BURST: Final = 4
"""Factor of the prompt tokens of a pass beside new rows."""
_WORTH_A_PASS: Final = 128
"""Minimum number of prompt tokens saved that is worth one pass more."""
_CHECKS: Final = 64
"""Number of waiting jobs that are checked for cancels and timeouts in one round."""
_POLL_SECONDS: Final = 0.02
"""How often to check whether a caller that lags behind has cancelled or run out of time, which wakes nobody."""


class Scheduler:
    """Runs jobs on one model, as many as its limits allow. Safe to use from any thread."""

    def __init__(self, decoder: Decoder, limits: Limits | None = None) -> None:
        self.decoder = decoder
        self.limits = limits or Limits()
        self.prefixes = PrefixCache(decoder)
        self.replayed_flops = 0
        """Executed again for rows that had given their pages up. In no usage record: nobody pays for it."""
        self._served: dict[str, float] = {}
        """When each tenant had rows last, of those that had some lately."""
        self._queue = FairQueue()
        self._places = Places(decoder, self.prefixes, self._queue.clocks)
        self._idle: deque[Job] = deque()
        """Jobs of idle requests; the first one runs next. They hold pages as long as nobody else needs them."""
        self._busy_at = float("-inf")
        """When others had a pass last."""
        self._pace = Pace()
        self._passes = Passes(decoder)
        self._checked = 0
        """Start of the next part of the waiting jobs that is checked for cancels and timeouts."""
        self._known: set[str] = set()
        """Tenants that waited when the round began."""
        self._hurried = False
        """Whether the last round left out a token of those who decode, for the prompt of a newcomer."""
        self._arrivals: Inbox[Sequence[Job]] = Inbox(_THREAD)
        """Jobs on their way to the thread; no job wakes it."""
        self._open: dict[Job, None] = {}
        """Jobs that were submitted and have not ended."""
        self._arriving = threading.Lock()
        """Held while it is decided who may wait, so that no more do than may."""
        self._round_lock = threading.RLock()
        """Held by the engine's thread while anything in memory is half done."""
        self._closing = False
        _LIVING.add(self)

    def __len__(self) -> int:
        """Number of jobs that wait or run, without idle ones."""
        return sum(not job.request.idle for job in list(self._open))

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a place among those that run."""
        return len(self._waiting())

    @property
    def sampled_tokens(self) -> int:
        """Tokens chosen since the model was loaded, for watching its speed."""
        return self._passes.sampled_tokens

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run jobs, together if there is room.

        Raises:
            QueueFullError: Too many are waiting already.
            CacheMemoryError: One could never run, because its keys and values exceed the memory set aside for them.
            InvalidRequestError: A logits hook of this model asks for it.
        """
        if self.runs_here():
            raise asked_by_engine()
        for job in jobs:
            self._check_size(job)
        with self._arriving:
            waiting = sorted(self._waiting(), key=lambda job: not job.begin_ns)  # stable
            counted = [job for job in jobs if not job.request.idle]
            for loser in who_gives_room(waiting, counted, self.limits.max_waiting, self.limits.weights):
                loser.revoke(
                    QueueFullError(
                        "this request waited, or its stream was not read, while the queue reached its limit of "
                        f"{self.limits.max_waiting}; its tenant had most of the requests in it, so another tenant's "
                        "took its place.",
                        hint="Try again when some are done, or raise max_waiting in the limits of the scheduler.",
                    )
                )
            for job in jobs:
                job.delivery.begin(self, partial(self._open.pop, job, None))
                self._open[job] = None
        self._arrivals.put(jobs, self._serve)

    def _waiting(self) -> list[Job]:
        """Jobs without a place, in the order in which they came; those that are about to end do not count."""
        return [job for job in list(self._open) if not (job.standing.has_place or job.left or job.request.idle)]

    def settle(self, job: Job) -> None:
        """Wait until nothing more will be computed for a job that was cancelled, also where `submit` was cut off."""
        if job.delivery.host is None or job.done:
            return
        try:
            self._arrivals.put([job], self._serve)
        except RuntimeError:  # no thread can be started, and none lives
            job.stop_if_due()
        job.delivery.wait()

    # -- what a job asks --------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """See `Host`."""
        self._arrivals.put((), self._serve)

    def runs_here(self) -> bool:
        """See `Host`."""
        return threading.current_thread() is self._arrivals.thread

    # -- the thread -------------------------------------------------------------------------------------------------

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
        try:
            while True:
                self._take_in(0.0 if self._busy or self._closing else self._patience)
                if self._busy:
                    self._round()
                    self._busy_at = time.monotonic()
                elif self._idle:
                    self._run_idle()
                else:  # after a while without work, this thread ends
                    return
        finally:
            self._closing = False

    def _take_in(self, seconds: float) -> None:
        """Take in what has arrived, after waiting for it for some time."""
        with suppress(Empty):
            while True:
                jobs = self._arrivals.take(seconds)
                seconds = 0.0
                with self._round_lock:
                    new = [job for job in jobs if not (job.standing.arrived or job.done)]
                    for job in new:
                        job.standing.arrived = True
                    self._idle.extend(job for job in new if job.request.idle)
                    self._queue.put([job for job in new if not job.request.idle], self._places.jobs)

    def _round(self) -> None:
        try:
            with self._round_lock:
                self._sweep()
                self._admit()
                passes = self._run_passes()
                now = time.perf_counter_ns()
                for job in self._places.jobs:
                    if (look := job.on_round) is not None:
                        look(now)
        except BaseException as error:  # a bug in this module must not leave callers waiting forever
            self._begin_anew()
            for job in list(self._open):
                if job.standing.arrived:
                    job.fail(error)
            return
        if not passes:
            self._take_in(_POLL_SECONDS)  # every caller lags behind: wait for one to read on or to cancel

    @property
    def _patience(self) -> float:
        """How long to wait for jobs where none but idle ones are here. Unit: seconds."""
        return max(0.0, self._busy_at + _QUIET_SECONDS - time.monotonic()) if self._idle else _IDLE_SECONDS

    def _run_idle(self) -> None:
        """One pass of the first idle job, which gives its place up again. No start of its prompt is kept."""
        job = self._idle[0]
        try:
            with self._round_lock:
                attempt([job], job.stop_if_due)
                if not job.done and not self._places.has_room(job):
                    job.fail(CacheMemoryError("an idle request found no room for its keys and values."))
                if not job.done:
                    self._places.add(job, ())
                    if job.request.starts_of is not None:
                        self._places.lend(job)
                    attempt([job], partial(self._run_alone, job))
                    self._places.remove(job)
                    if (look := job.on_round) is not None:
                        look(time.perf_counter_ns())
        except BaseException as error:  # a bug in this module must not leave callers waiting forever
            self._begin_anew()
            job.fail(error)
        self._idle = deque(other for other in self._idle if not other.done)

    def _run_alone(self, job: Job) -> None:
        if job.decoding:
            self._passes.decode([job], self._charge)
        else:
            self._passes.read([job], [job.chunk], self._charge, lambda _: None)

    def _begin_anew(self) -> None:
        self._queue = FairQueue()
        self._places = Places(self.decoder, self.prefixes, self._queue.clocks)

    def close(self) -> None:
        """Cancel every job and wait for the thread to end; a later job starts a new one."""
        while self._arrivals.is_served:
            self._closing = True
            for job in list(self._open):
                job.cancel()
            self.wake()
            if (thread := self._arrivals.thread) is None:
                time.sleep(_STARTING_SECONDS)  # it has just begun
            else:
                thread.join()

    def hold_for_fork(self) -> bool:
        """Hold the engine between two rounds, so that a child inherits no half of a pass; False if that takes long."""
        return self._round_lock.acquire(timeout=_FORK_SECONDS)

    def go_on_after_fork(self) -> None:
        """In the parent, after `hold_for_fork`."""
        self._round_lock.release()

    def restart_after_fork(self) -> None:
        """In a forked child: the thread is not here, and what it was computing is the parent's."""
        self._closing = False
        self._arriving, self._round_lock = threading.Lock(), threading.RLock()
        self._begin_anew()
        self._idle.clear()
        for job in list(self._open):
            job.delivery.reset()  # the caller is in the parent, and so is the answer
            job.cancel()
        self._open.clear()
        self.prefixes.forget()
        self.decoder.restart_after_fork()

    @property
    def _busy(self) -> bool:
        return bool(self._queue or self._places)

    def _sweep(self) -> None:
        """Remove jobs that are done, cancelled or out of time, whether they run or wait."""
        waiting = list(self._queue)
        # Of those that wait, the ones whose call has ended, and a part of the others: all would slow each token.
        start = self._checked = self._checked % max(len(waiting), 1)
        self._checked += _CHECKS
        part = waiting[start : start + _CHECKS]
        waiting = part + [job for job in waiting if job.left and job not in part]
        for job in [*waiting, *self._places.jobs, *self._idle]:
            if not job.done:
                attempt([job], job.stop_if_due)
        self._idle = deque(job for job in self._idle if not job.done)
        for job in waiting:
            if job.done:
                self._queue.remove(job)
        for job in self._places.jobs:
            if job.done and job.drafts is not None and not job.drafts.always:  # it would have taken from earlier ones
                self._passes.drafting.others.add(job.request.tenant, job.request.tokens, job.tokens)
        self._places.begin_round()

    def _admit(self) -> None:
        """Give places to those who wait, as long as others give way; the next in turn is never passed over."""
        limits = self.limits
        while True:
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
            for other in self._idle:
                if other.row.page_table.blocks and not self._places.has_room(job, self._idle):
                    other.drop_pages()  # before a kept start of a prompt is lost for it
            self._places.add(job, [*self._idle, *self._queue.resting])

    def _run_passes(self) -> bool:
        """A pass over prompts, and one token for every row whose prompt has run and whose caller keeps up."""
        jobs = [job for job in self._places.jobs if not job.delivery.paused]
        rows = self._passes.rows([job for job in jobs if job.decoding])
        tenants, now = {job.request.tenant: job for job in jobs}, time.perf_counter()
        served = self._served | dict.fromkeys(tenants, now)
        self._served = {tenant: at for tenant, at in served.items() if now - at < _LATELY_SECONDS}
        needs = {tenant: rows.get(tenant, 0.0) / self._weight(job) for tenant, job in tenants.items()}
        self._pace.begin(needs, self.limits.pace)
        jobs = [job for job in jobs if self._pace.may_run(job.request.tenant)] or jobs
        decoding = [job for job in jobs if job.decoding]
        prompts, chunks = self._next_chunks([job for job in jobs if not job.decoding], decoding)
        # Prompts first: who has just come gets a first token before others get a further one. Rows that end their
        # prompt here decode in the next round, so that `cancel` is checked before each token.
        if prompts:
            attempt(prompts, partial(self._run_chunks, prompts, chunks))
            self._hurried = not self._hurried and self._has_newcomer()
        if decoding and not (prompts and self._hurried):
            attempt(decoding, partial(self._run_decode, decoding))
        return bool(jobs)

    def _has_newcomer(self) -> bool:
        """Whether a tenant without a place has come during this round."""
        here = {job.request.tenant for job in self._places.jobs} | self._known
        self._take_in(0.0)
        return any(tenant not in here for tenant in self._queue.tenants)

    def _next_chunks(self, jobs: list[Job], decoding: Sequence[Job]) -> tuple[list[Job], list[Sequence[int]]]:
        """Prompts to run now and their next chunks: first of the tenant whose clock is furthest behind.

        Tenants with more rows than the first one do not lengthen the pass that brings it its first token.
        """
        if not jobs:
            return [], []
        left = self._prompt_tokens(decoding)
        rows = Counter(job.request.tenant for job in self._places.jobs)
        jobs.sort(key=lambda job: self._queue.clocks[job.request.tenant])  # stable: the oldest of a tenant first
        chosen: list[Job] = []
        chunks: list[Sequence[int]] = []
        waiting = self._behind_others(jobs)
        for job in jobs:
            if left > 0 and rows[job.request.tenant] <= rows[jobs[0].request.tenant] and job not in waiting:
                self._places.lend(job)
                chosen.append(job)
                chunks.append(job.chunk)
                left -= len(chunks[-1])
        return chosen, chunks

    def _behind_others(self, jobs: Iterable[Job]) -> set[Job]:
        """Prompts that wait for one before them to run the start that both have in common, where that is worth it.

        So of a batch of questions about one text, the text runs once. A prompt waits for one other at most.
        """
        if not self.limits.prefix_share:
            return set()
        first: dict[tuple[object, ...], Job] = {}
        gains: dict[Job, int] = {}
        for job in jobs:
            request, row = job.request, job.row
            alike = (request.tenant, request.program, request.tokens[:LEAST_SHARED])
            before = first.setdefault(alike, job)
            if before is job or row.page_table.blocks:
                continue
            if job.standing.behind is None:
                job.standing.behind = (before.request.request_id, self.prefixes.gain(request, row, before.request))
            name, gain = job.standing.behind
            if name == before.request.request_id and gain >= LEAST_SHARED:
                gains[job] = gain
        return set(gains) if sum(gains.values()) >= _WORTH_A_PASS else set()

    def _prompt_tokens(self, decoding: Sequence[Job]) -> int:
        """How many tokens of prompts to run in one pass beside rows that decode.

        Many prompts that come at once are read in few passes, which takes less time: rows that have just begun to
        answer wait for those that came with them. Not where another tenant waits or was served lately, which would
        wait for these longer passes too.
        """
        if not decoding:
            return self.limits.prefill_alone
        alone = len({*self._served, *self._queue.tenants}) == 1
        burst = alone and all(len(job.tokens) <= _JUST_BEGUN for job in decoding)
        return self.limits.prefill_beside * (_BURST if burst else 1)

    def _run_chunks(self, jobs: Sequence[Job], chunks: Sequence[Sequence[int]]) -> None:
        began, tokens = time.perf_counter(), Counter[str]()
        for job, chunk in zip(jobs, chunks, strict=True):
            tokens[job.request.tenant] += len(chunk)
        share = self.limits.prefix_share
        self._passes.read(jobs, chunks, self._charge, lambda job: self.prefixes.keep(job.request, job.row, share))
        self._pace.read(tokens, time.perf_counter() - began, self.limits.weights)

    def _run_decode(self, jobs: Sequence[Job]) -> None:
        began = time.perf_counter()
        rows = self._passes.decode(jobs, self._charge)
        self._pace.decoded(rows, time.perf_counter() - began, self.limits.weights)

    def _charge(self, jobs: Sequence[Job]) -> None:
        """Count what a pass executed, for the fairness between tenants."""
        for job in jobs:
            work = job.row.executed - job.standing.charged
            job.standing.charged += work
            if job.row.replaying:
                self.replayed_flops += work
            self._queue.clocks.advance(job.request.tenant, work / self._weight(job))

    def _weight(self, job: Job) -> float:
        return self.limits.weights.get(job.request.tenant, 1.0)


@atexit.register
def _close_all() -> None:
    """End the threads before the interpreter does: it would stop one inside torch, which aborts the process."""
    for scheduler in list(_LIVING):
        scheduler.close()


_held_for_fork: Final[list[Scheduler]] = []


def _go_on_after_fork() -> None:
    while _held_for_fork:
        _held_for_fork.pop().go_on_after_fork()


def _restart_after_fork() -> None:
    _held_for_fork.clear()
    for scheduler in list(_LIVING):
        scheduler.restart_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=lambda: _held_for_fork.extend(each for each in list(_LIVING) if each.hold_for_fork()),
        after_in_parent=_go_on_after_fork,
        after_in_child=_restart_after_fork,
    )
