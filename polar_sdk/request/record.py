"""The usage record of a job: of one that computes no more, or of one that runs, as far as it has come."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from polar_sdk.programs.program import Program
from polar_sdk.usage import Outcome, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from polar_sdk.serving.job import Job, Progress
    from polar_sdk.serving.loaded import LoadedModel

_FINISH: dict[Outcome, Literal["cancelled", "error"] | None] = {
    Outcome.COMPLETED: None,
    Outcome.CANCELLED: "cancelled",
    Outcome.ERROR: "error",
}


def record_of(
    model: LoadedModel, job: Job, progress: Progress, outcome: Outcome, error: BaseException | None = None
) -> UsageRecord:
    """The record of a job.

    Args:
        model: What ran it.
        job: The job.
        progress: What it had computed.
        outcome: How it ended.
        error: What ended it.
    """
    request, row, now = job.request, job.row, time.perf_counter_ns()
    begin, decoding = progress.begin_ns or now, progress.prefill_end_ns
    flops = progress.work.flops(request.router_flops)
    return UsageRecord(
        request_id=request.request_id,
        tenant=request.tenant,
        tags=dict(request.tags),
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
