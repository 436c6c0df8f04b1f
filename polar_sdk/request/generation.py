"""Answers and their records: requests in, text out, and exactly one usage record per request, however it ends.

The scheduler computes; this module waits for its jobs and records them, in the caller's thread. Metering happens in
`finally` here and nowhere else, so that a closed stream, a cancelled task and an error in mid-layer are all recorded up
to the last executed layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

from polar_sdk.errors import RequestTimeoutError
from polar_sdk.programs.program import Program
from polar_sdk.request.admission import admit
from polar_sdk.serving.job import FinishReason, Job
from polar_sdk.serving.threads import AHEAD
from polar_sdk.usage import Outcome, Receipt, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from polar_sdk.engine.sampling import TokenLogprobs
    from polar_sdk.programs.policy import LoopGuard
    from polar_sdk.serving.job import Piece
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.serving.request import Request
    from polar_sdk.usage import UsageSink


_FINISH: dict[Outcome, Literal["cancelled", "error"] | None] = {
    Outcome.COMPLETED: None,
    Outcome.CANCELLED: "cancelled",
    Outcome.ERROR: "error",
}
_STOPS = (GeneratorExit, KeyboardInterrupt, SystemExit, RequestTimeoutError)
"""What ends a request without being its error: its stream was closed, the process was asked to end (the command `polar`
turns SIGTERM into SystemExit), or its time was up."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    Attributes:
        text: The answer, without stop string and special tokens.
        token_ids: Every sampled token, including the end-of-text token and those of a stop string.
        finish_reason: `stop` (end of text or stop string), `length` or `cancelled`.
        usage: What was executed.
        receipt: What the sink answered, such as the cost; None where it prices nothing.
        logprobs: One per token of `token_ids`, by the logits after the hook and before temperature, top-k and top-p;
            None where the request asks for none.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: UsageRecord
    receipt: Receipt | None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer; `generation` is set on exactly the last one.

    Attributes:
        text: The piece; text that may begin a stop string is held back until it is certain.
        generation: The whole answer.
        logprobs: Of the token sampled for this piece; empty in a last piece without one, after a cancellation. None
            where the request asks for none.
    """

    text: str
    generation: Generation | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


def answer(
    model: LoadedModel, requests: Sequence[Request], sink: UsageSink, guard: LoopGuard | None = None
) -> list[Generation]:
    """Answer requests; their rows run together, and with those of other callers.

    Raises:
        SinkError: Before compute, if usage could not be recorded.
        BudgetExceededError: Before compute, if a budget has no room for one of them; then none runs.
        QueueFullError: Too many requests are waiting.
        CacheMemoryError: A request does not fit the memory for keys and values.
        RequestTimeoutError: A request ran out of time; the record of every request is stored by then.
    """
    if not requests:
        return []
    sink.check()
    ended: SimpleQueue[Job] = SimpleQueue()
    requests = admit(requests, model.decoder.cost, sink)
    jobs = [
        Job(request, model.decoder, model.tokenizer, model.end_tokens, guard=guard, on_end=ended.put)
        for request in requests
    ]
    with _Recorder(model, jobs, sink) as recorder:
        model.scheduler.submit(jobs)
        finished = {job: recorder.finish(job) for job in (ended.get() for _ in jobs)}
    return [finished[job] for job in jobs]


def stream(
    model: LoadedModel, request: Request, sink: UsageSink, guard: LoopGuard | None = None
) -> Generator[Chunk, None, None]:
    """Answer one request piece by piece.

    Yields:
        One chunk per sampled token; the last one carries the generation, and its usage record is stored before that
        chunk is handed out.

    Raises:
        As `answer`.
    """
    sink.check()
    (request,) = admit([request], model.decoder.cost, sink)
    job = Job(request, model.decoder, model.tokenizer, model.end_tokens, guard=guard, max_ahead=AHEAD)
    with _Recorder(model, [job], sink) as recorder:
        model.scheduler.submit([job])
        held: Piece | None = None
        for piece in job.pieces():
            if held is not None:
                yield Chunk(held[0], None, held[1])
            held = piece
        text, logprobs = held or ("", None)
        yield Chunk(text, recorder.finish(job), logprobs)


class _Recorder:
    """Guarantees one usage record per job of a call, however the block exits."""

    def __init__(self, model: LoadedModel, jobs: Sequence[Job], sink: UsageSink) -> None:
        self._model, self._jobs, self._sink = model, jobs, sink
        self._records: dict[Job, UsageRecord] = {}
        """Final records; those not stored yet are stored at the end, unchanged if the sink failed before."""
        self._stored: set[Job] = set()

    def finish(self, job: Job) -> Generation:
        """Wait for a job and store its record.

        Raises:
            BaseException: What ended the job, where it did not finish.
        """
        job.wait()
        if job.error is not None:
            if isinstance(job.error, RequestTimeoutError):
                job.error.usage = self._record(job, Outcome.CANCELLED)
            raise job.error
        assert job.finish is not None
        usage = self._record(job, Outcome.CANCELLED if job.finish == "cancelled" else Outcome.COMPLETED)
        receipt = self._sink.emit(usage)
        self._stored.add(job)
        logprobs = None if job.logprobs is None else tuple(job.logprobs)
        return Generation(job.text.text, tuple(job.tokens), job.finish, usage, receipt, logprobs)

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: object) -> None:
        """Stop what still runs and store its records; a sink that fails for one job is still called for the others."""
        unrecorded = [job for job in self._jobs if job not in self._stored]
        for job in unrecorded:
            job.cancel()
        problems: list[Exception] = []
        for job in unrecorded:
            if job.submitted:
                job.wait()  # at most one token
            try:
                # The same record under the same id: if the first attempt stored it after all, nothing is counted twice.
                self._sink.emit(self._final(job, failure))
            except Exception as problem:  # any sink, any error: the remaining jobs must be recorded all the same
                problems.append(problem)
        # A timeout is an OSError, like the errors of disks, which it must not hide.
        if problems and (failure is None or isinstance(failure, _STOPS) or not isinstance(failure, type(problems[0]))):
            raise problems[0]

    def _final(self, job: Job, failure: BaseException | None) -> UsageRecord:
        cause = job.error or failure
        stopped = cause is None or isinstance(cause, _STOPS) or (job.error is None and job.finish == "cancelled")
        return self._record(job, Outcome.CANCELLED if stopped else Outcome.ERROR, cause)

    def _record(self, job: Job, outcome: Outcome, error: BaseException | None = None) -> UsageRecord:
        if job not in self._records:
            self._records[job] = _usage(self._model, job, outcome, error)
        return self._records[job]


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
    return cost.request(identity, len(job.request.tokens), work.decode_steps + 1, cached=job.cached).total
