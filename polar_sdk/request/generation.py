"""Answers: requests in, text out, whole or in pieces.

The scheduler computes; this module waits for its jobs, in the caller's thread. Their recorder is notified when the
caller leaves, so that a closed stream, a cancelled task and an error within a layer are all recorded up to the last
executed layer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from polar_sdk.errors import IncompleteAnswerError, InvalidRequestError
from polar_sdk.reading import ANSWER_DIGITS, Unreadable, parse_json
from polar_sdk.request.recorder import Recording
from polar_sdk.serving.delivery import Piece
from polar_sdk.serving.job import FinishReason, Job
from polar_sdk.serving.threads import AHEAD

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from polar_sdk.engine.sampling import TokenLogprobs
    from polar_sdk.programs.policy import LoopGuard
    from polar_sdk.request.recorder import Recorder
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.serving.request import Request
    from polar_sdk.usage import Receipt, UsageRecord, UsageSink


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    Attributes:
        text: The answer, without stop string and special tokens.
        token_ids: Every sampled token, including the end-of-text token and those of a stop string.
        finish_reason: `stop` (end of text or stop string), `length` or `cancelled`.
        usage: What was executed.
        receipt: What the sink answered, such as the cost; None if it has no prices.
        logprobs: One per token of `token_ids`, by the logits after the hook and the grammar and before temperature,
            top-k and top-p; None if the request asks for none.
        complete: Whether the text as a whole matches the schema, regular expression, choice or grammar of the request;
            false if the answer was cut off. None if the request has none.
        prompt_ids: The tokens of the prompt, chat template included.
        prompt_logprobs: One per token of the prompt after the first; None if the request asks for none.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: UsageRecord
    receipt: Receipt | None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    complete: bool | None = None
    prompt_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None

    def json(self) -> Any:
        """The value of an answer that is JSON.

        Raises:
            IncompleteAnswerError: It ended too early, or is not JSON.
        """
        reason = f"it ended after {len(self.token_ids)} tokens (finish_reason={self.finish_reason})"
        if self.complete is not False:
            try:
                return parse_json(self.text, max_digits=ANSWER_DIGITS)
            except Unreadable as error:
                reason += f"; {error}"
        raise IncompleteAnswerError(
            f"the answer is not complete JSON: {reason}.",
            hint="Raise max_tokens, or remove the stop string.",
            text=self.text,
        )


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
    model: LoadedModel,
    requests: Sequence[Request],
    sink: UsageSink,
    guard: LoopGuard | None = None,
    on_answer: Callable[[Job], object] | None = None,
) -> list[Generation]:
    """Answer requests; their rows run together, and with those of other callers.

    Args:
        model: The model that answers.
        requests: The requests.
        sink: Receives their records.
        guard: Guard of loops.
        on_answer: Called with every job that has finished and is recorded.

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
    with Recording(model, sink) as recorder:
        jobs = [Job(request, model, guard=guard, on_end=ended.put) for request in recorder.admit(requests)]
        recorder.begin(jobs)
        model.scheduler.submit(jobs)
        finished = {job: _generation(job, recorder, on_answer) for job in (ended.get() for _ in jobs)}
    return [finished[job] for job in jobs]


def stream(
    model: LoadedModel,
    request: Request,
    sink: UsageSink,
    guard: LoopGuard | None = None,
    on_answer: Callable[[Job], object] | None = None,
) -> Generator[Chunk, None, None]:
    """Answer one request piece by piece.

    Yields:
        One chunk per sampled token; the last one carries the generation, and its usage record is stored before that
        chunk is returned.

    Raises:
        As `answer`.
    """
    process = os.getpid()
    sink.check()
    with Recording(model, sink) as recorder:
        (request,) = recorder.admit([request])
        job = Job(request, model, guard=guard, max_ahead=AHEAD)
        recorder.begin([job])
        model.scheduler.submit([job])
        last = Piece("", None, last=True)
        for piece in job.delivery.pieces():
            if piece.last:
                last = piece
            else:
                yield Chunk(piece.text, None, piece.logprobs)
                if process != os.getpid():  # a generator runs on in a forked child, whose jobs nobody computes
                    raise InvalidRequestError(
                        f"a stream of process {process} cannot be read in process {os.getpid()}, forked from it.",
                        hint="Start the stream in the process that reads it.",
                    )
        yield Chunk(last.text, _generation(job, recorder, on_answer), last.logprobs)


def _generation(job: Job, recorder: Recorder, on_answer: Callable[[Job], object] | None) -> Generation:
    """Wait for a job and its record.

    Raises:
        BaseException: What ended the job, where it did not finish.
    """
    usage, receipt = recorder.finish(job)
    assert job.finish is not None
    if on_answer is not None:
        on_answer(job)
    logprobs = None if job.logprobs is None else tuple(job.logprobs)
    return Generation(
        job.text.text,
        tuple(job.tokens),
        job.finish,
        usage,
        receipt,
        logprobs,
        job.complete,
        job.request.tokens,
        None if job.request.prompt_logprobs is None else tuple(job.prompt_logprobs),
    )
