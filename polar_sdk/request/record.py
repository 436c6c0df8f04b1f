"""The usage record of a job, and its marks.

While a long answer runs, its sink is informed of what it has used, in case the process is killed. The engine's thread
only notes the progress of a job; another thread makes the record and passes it to the sink. If the sink is slow, only
the latest mark waits. Knows no store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from contextvars import copy_context
from queue import Empty
from typing import TYPE_CHECKING, Final, Literal

from polar_sdk.programs.program import Program
from polar_sdk.serving.threads import Inbox
from polar_sdk.usage import STOPPED_TAG, Outcome, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from polar_sdk.serving.job import Job, Progress
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.usage import UsageSink

_log: Final = logging.getLogger(__name__)
MARK_TOKENS: Final = 64
MARK_NS: Final = 1_000_000_000
"""A running job is marked after this number of tokens, or this time. Unit: nanoseconds."""
_IDLE_SECONDS: Final = 2.0
"""The thread ends after this time without a mark."""
_FINISH: dict[Outcome, Literal["cancelled", "error"] | None] = {
    Outcome.COMPLETED: None,
    Outcome.CANCELLED: "cancelled",
    Outcome.ERROR: "error",
}


def record_of(
    model: LoadedModel, job: Job, progress: Progress, outcome: Outcome, error: BaseException | None = None
) -> UsageRecord:
    """The record of a job that a model ran: what it had computed, how it ended, and by which error."""
    request, row, now = job.request, job.row, time.perf_counter_ns()
    begin, decoding = progress.begin_ns or now, progress.prefill_end_ns
    flops = progress.work.flops(request.router_flops)
    return UsageRecord(
        request_id=request.request_id,
        tenant=request.tenant,
        tags={**request.tags, **({STOPPED_TAG: "repeats"} if job.repeated else {})},
        model=model.name,
        model_fingerprint=model.fingerprint,
        router=request.router,
        router_version=request.router_version,
        tier=request.tier,
        program=request.program.text,
        outcome=outcome,
        finish_reason=_FINISH[outcome] or job.finish or "error",
        error=type(error).__name__ if outcome is Outcome.ERROR else None,
        tokens=TokenUsage(
            input=len(request.tokens),
            cached=progress.cached,
            output=progress.output,
            drafted=progress.work.drafted,
            accepted=progress.work.accepted,
        ),
        visits=progress.work.visits(),
        loops_stopped=progress.loops_stopped,
        flops=flops,
        identity_flops=_identity_flops(job, progress, flops.total),
        kv_bytes_peak=progress.kv_bytes,
        device=str(row.decoder.placement),
        dtype=row.decoder.dtype_name,
        started_at=request.started_at,
        queue_ns=begin - request.created_ns,
        prefill_ns=max((decoding or now) - begin, 0),
        decode_ns=max((progress.end_ns or now) - decoding, 0) if decoding else 0,
    )


def _identity_flops(job: Job, progress: Progress, executed: int) -> int:
    """FLOPs of the finished passes at full depth; where not even the prefill finished, no saving is claimed."""
    work = progress.work
    if not work.prefilled:
        return executed
    cost = job.row.decoder.cost
    identity = Program.identity(cost.depth)
    prompt, scored = len(job.request.tokens), job.request.prompt_logprobs is not None
    return cost.request(identity, prompt, work.decode_steps + 1, cached=progress.cached, scored=scored).total


class Marker:
    """Marks one job of a model while it runs, from now on; a sink takes the marks."""

    def __init__(self, model: LoadedModel, job: Job, sink: UsageSink) -> None:
        self._model, self._job, self._sink = model, job, sink
        self._latest: deque[Progress] = deque(maxlen=1)
        self._marking = threading.Lock()
        """Held while the sink is notified, so that no mark comes after the record."""
        self._ended = self._failed = False
        self._context = copy_context()
        """The caller's."""
        self._tokens = self._ns = self._flops = 0
        """Progress at the last mark."""
        job.on_round = self._look

    def _look(self, now: int) -> None:
        """Mark the job if enough was computed since the last mark; run by the engine's thread."""
        job = self._job
        if not job.begin_ns or job.done:
            return
        tokens = len(job.tokens)
        if tokens - self._tokens < MARK_TOKENS and now - (self._ns or job.begin_ns) < MARK_NS:
            return
        if (flops := job.row.metered.total) > self._flops:  # else it runs again what has run, or is paused
            self._tokens, self._ns, self._flops = tokens, now, flops
            self.note(job.progress())

    def note(self, progress: Progress) -> None:
        """Mark that soon; waits for nothing."""
        self._latest.append(progress)
        with suppress(RuntimeError):  # no thread starts now: the next mark tries again
            MARKS.put(self, _mark)

    def end(self) -> None:
        """The record comes next, and no mark after it."""
        self._job.on_round = None
        with self._marking:
            self._ended = True

    def mark(self) -> None:
        """Tell the sink the latest, if it does not know it yet."""
        with self._marking:
            if self._ended or not self._latest:
                return
            record = record_of(self._model, self._job, self._latest.pop(), Outcome.CANCELLED)
            try:
                self._context.run(self._sink.mark, record)
            except Exception as error:  # any sink, any error: the answer goes on, and its record counts
                if not self._failed:
                    _log.warning("request %r could not be marked (%s)", record.request_id, error)
                self._failed = True


def _mark() -> None:
    with suppress(Empty):
        while True:
            MARKS.take(_IDLE_SECONDS).mark()


MARKS: Final[Inbox[Marker]] = Inbox("polar-mark")
"""Jobs that have come further since they were marked."""
