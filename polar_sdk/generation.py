"""The decode loop: requests in, pieces of text out, and exactly one usage record per request, however it ends.

Rows of one call decode together; each leaves when it is done, and all when their time is up. Metering lives in
`finally` here and nowhere else, so that a stream that is closed, a task that is cancelled and an error in mid-layer are
all recorded up to the last executed layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from polar_sdk.admission import admit
from polar_sdk.engine.forward import Row, next_logits
from polar_sdk.engine.sampling import Sampler
from polar_sdk.engine.text import TextStream
from polar_sdk.errors import RequestTimeoutError
from polar_sdk.program import Program
from polar_sdk.usage import Outcome, Receipt, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from polar_sdk.loading import LoadedModel
    from polar_sdk.requests import Request
    from polar_sdk.usage import UsageSink

__all__ = ["Chunk", "FinishReason", "Generation", "finished", "generate_rows"]

FinishReason = Literal["stop", "length", "cancelled"]
_FINISH: dict[Outcome, Literal["cancelled", "error"] | None] = {
    Outcome.COMPLETED: None,
    Outcome.CANCELLED: "cancelled",
    Outcome.ERROR: "error",
}
_STOPS = (GeneratorExit, KeyboardInterrupt, SystemExit, RequestTimeoutError)
"""What ends a request without being an error of it: its stream was closed, the process was told to end (the command
`polar` turns SIGTERM into SystemExit), or its time was up."""
_PREFILL_TOKENS = 4096
"""Prompts are prefilled together up to this many tokens: enough to fill the matrix products, bounded in memory."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    Attributes:
        text: The answer, without stop string and special tokens.
        token_ids: Every sampled token, the end-of-text token and those of a stop string included.
        finish_reason: `stop` (end of text or stop string), `length` or `cancelled`.
        usage: What was executed.
        receipt: What the sink answered, for example the cost; None where it prices nothing.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: UsageRecord
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer; `generation` is set on exactly the last one."""

    text: str
    generation: Generation | None = None


class _Live:
    """A request that is running: its row, its sampler, its text so far, its clock."""

    def __init__(self, request: Request, model: LoadedModel, index: int) -> None:
        self.request, self.model, self.index = request, model, index
        self.row = Row(model.decoder, request.route.program, len(request.tokens) + min(request.max_tokens, 64))
        self.text = TextStream(model.tokenizer, request.stops)
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.usage: UsageRecord | None = None
        """The record once it is final; stored at the end if it was not yet, unchanged after a sink that failed."""
        self.recorded = False
        self.prefill_begin_ns = self.prefill_end_ns = self.end_ns = 0
        self._end_tokens = _end_tokens(model)
        self._sampler = Sampler(request.sampling, model.decoder.device)

    @property
    def pending(self) -> Sequence[int]:
        """Tokens that the row has not run yet: the prompt, then the one sampled last."""
        return self.tokens[-1:] or self.request.tokens

    def take(self, logits: torch.Tensor) -> str:
        """Sample from logits (V,) and return the text to show; sets `finish` where the answer ends."""
        token = self._sampler(logits)
        self.tokens.append(token)
        piece = "" if token in self._end_tokens else self.text.push(token)
        ended = token in self._end_tokens
        if ended or self.text.stopped or len(self.tokens) >= self.request.max_tokens:
            piece += self.text.finish()  # in what was held back, too, a stop string may be found
            self.finish = "stop" if ended or self.text.stopped else "length"
        return piece

    def record(self, outcome: Outcome, error: BaseException | None = None) -> UsageRecord:
        """The facts up to now."""
        request, row, now = self.request, self.row, time.perf_counter_ns()
        begin = self.prefill_begin_ns or now
        flops = row.work.flops(request.route.flops)
        return UsageRecord(
            request_id=request.request_id,
            tenant=request.tenant,
            tags=dict(request.tags),
            model=self.model.name,
            model_fingerprint=self.model.fingerprint,
            router=request.router.kind,
            router_version=request.router.version,
            tier=request.tier,
            program=request.route.program.text,
            outcome=outcome,
            finish_reason=_FINISH[outcome] or self.finish or "error",
            error=type(error).__name__ if outcome is Outcome.ERROR else None,
            tokens=TokenUsage(input=len(request.tokens), output=len(self.tokens)),
            visits=row.work.visits(),
            flops=flops,
            identity_flops=self._identity_flops(flops.total),
            kv_bytes_peak=row.cache.nbytes,
            device=str(row.decoder.device),
            dtype=str(row.decoder.dtype).removeprefix("torch."),
            started_at=request.started_at,
            queue_ns=begin - request.created_ns,
            prefill_ns=max((self.prefill_end_ns or now) - begin, 0),
            decode_ns=max((self.end_ns or now) - self.prefill_end_ns, 0) if self.prefill_end_ns else 0,
        )

    def _identity_flops(self, executed: int) -> int:
        """The finished passes at full depth; where not even the prefill finished, nothing is claimed as saved."""
        work = self.row.work
        if not work.prefilled:
            return executed
        cost = self.row.decoder.cost
        return cost.request(Program.identity(cost.depth), len(self.request.tokens), work.decode_steps + 1).total


def _end_tokens(model: LoadedModel) -> frozenset[int]:
    """Ids that end an answer: those of the generation settings, and the tokenizer's end of text."""
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in [*listed, model.tokenizer.eos_token_id] if token is not None)


def generate_rows(
    model: LoadedModel, requests: Sequence[Request], sink: UsageSink
) -> Generator[tuple[int, Chunk], None, None]:
    """Run requests together.

    Yields:
        (index of the request, chunk), one per sampled token; the last chunk of each request carries its generation, and
        its usage record is stored before that chunk is handed out.

    Raises:
        SinkError: Before compute, if usage could not be recorded.
        BudgetExceededError: Before compute, if a budget has no room for one of them; then none runs.
        RequestTimeoutError: The time of an unfinished row is up; the record of every row is stored by then.
    """
    sink.check()
    requests = admit(requests, model.decoder.cost, sink)
    lives = [_Live(request, model, index) for index, request in enumerate(requests)]
    failure: BaseException | None = None
    try:
        for group in _prefill_groups(lives):
            yield from _pass(group, sink)
        while active := [live for live in lives if live.finish is None]:
            yield from _pass(active, sink)
    except BaseException as error:
        failure = error
        raise
    finally:
        _record_unfinished(lives, failure, sink)


def finished(rows: Iterator[tuple[int, Chunk]]) -> dict[int, Generation]:
    """Run to the end and keep the finished answers, by index of the request."""
    return {index: chunk.generation for index, chunk in rows if chunk.generation is not None}


def _prefill_groups(lives: Sequence[_Live]) -> Iterator[list[_Live]]:
    """Split rows so that no group has more than `_PREFILL_TOKENS` prompt tokens, unless a single row has."""
    group: list[_Live] = []
    for live in lives:
        if group and sum(len(one.request.tokens) for one in [*group, live]) > _PREFILL_TOKENS:
            yield group
            group = []
        group.append(live)
    yield group


def _pass(lives: Sequence[_Live], sink: UsageSink) -> Iterator[tuple[int, Chunk]]:
    """One pass for rows that are all in prefill or all decoding, and one token for each that goes on."""
    yield from _finish_cancelled(lives, sink)
    going = [live for live in lives if live.finish is None]
    for live in going:
        if live.request.late:
            raise _timed_out(live)
    for live, piece in zip(going, _advance(going) if going else [], strict=True):
        yield live.index, _chunk(live, piece, sink)


@torch.inference_mode()
def _advance(lives: Sequence[_Live]) -> list[str]:
    now = time.perf_counter_ns()
    for live in lives:
        live.prefill_begin_ns = live.prefill_begin_ns or now
    logits = next_logits(lives[0].model.decoder, [live.row for live in lives], [live.pending for live in lives])
    pieces = [live.take(row) for live, row in zip(lives, logits, strict=True)]
    now = time.perf_counter_ns()
    for live in lives:
        live.prefill_end_ns = live.prefill_end_ns or now
        live.end_ns = now
    return pieces


def _finish_cancelled(lives: Sequence[_Live], sink: UsageSink) -> Iterator[tuple[int, Chunk]]:
    for live in lives:
        if live.request.cancelled:
            live.finish = "cancelled"
            yield live.index, _chunk(live, live.text.finish(), sink)


def _timed_out(live: _Live) -> RequestTimeoutError:
    live.usage = live.record(Outcome.CANCELLED)
    return RequestTimeoutError(
        f"the answer was stopped by timeout={live.request.timeout} s after {len(live.tokens)} tokens.",
        hint="Raise timeout, lower max_tokens, or use a cheaper tier.",
        usage=live.usage,
    )


def _chunk(live: _Live, piece: str, sink: UsageSink) -> Chunk:
    """The chunk to hand out; on the last one the record is stored first."""
    if live.finish is None:
        return Chunk(piece)
    usage = live.record(Outcome.CANCELLED if live.finish == "cancelled" else Outcome.COMPLETED)
    live.usage = usage
    receipt = sink.emit(usage)
    live.recorded = True
    return Chunk(piece, Generation(live.text.text, tuple(live.tokens), live.finish, usage, receipt))


def _record_unfinished(lives: Sequence[_Live], failure: BaseException | None, sink: UsageSink) -> None:
    """Store a record for every row that has none; a sink that fails for one row is still asked for the others."""
    stopped = failure is None or isinstance(failure, _STOPS)
    problems: list[Exception] = []
    for live in lives:
        if live.recorded:
            continue
        try:
            # The same facts under the same id: had the first attempt stored them after all, nothing is stored twice.
            sink.emit(live.usage or live.record(Outcome.CANCELLED if stopped else Outcome.ERROR, failure))
        except Exception as problem:  # any sink, any error: the remaining rows must be recorded all the same
            problems.append(problem)
    if problems and (stopped or not isinstance(failure, type(problems[0]))):  # a timeout is an OSError, as disks raise
        raise problems[0]
