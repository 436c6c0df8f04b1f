"""A job: one request on its way through the engine, from the queue to its last token.

The scheduler's thread advances it; the caller's thread takes pieces of its `delivery`, and calls `cancel`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from polar_sdk.engine.row import Row
from polar_sdk.engine.sampling import Sampler, TokenLogprobs, apply_hook, near_ties, read_logprobs
from polar_sdk.engine.steering import Repeats
from polar_sdk.engine.text import TextStream
from polar_sdk.errors import LogitsError, RequestTimeoutError
from polar_sdk.programs.cost import CHUNK
from polar_sdk.serving.delivery import Delivery, Piece
from polar_sdk.serving.drafts import drafts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from polar_sdk.engine.work import Work
    from polar_sdk.programs.policy import LoopGuard
    from polar_sdk.serving.drafts import Experience
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.serving.request import Request


FinishReason = Literal["stop", "length", "cancelled"]
SCORED_AT_ONCE: Final = 64
"""Number of prompt tokens whose logits are held together: V floats each."""


class Progress(NamedTuple):
    """State of a job at one moment: all that its usage record says and the request does not."""

    output: int
    """Sampled tokens."""
    cached: int
    """Prompt tokens whose keys and values were already available."""
    work: Work
    loops_stopped: int
    kv_bytes: int
    """Largest key and value storage. Unit: bytes."""
    begin_ns: int
    prefill_end_ns: int
    end_ns: int
    """Time of the last token."""


@dataclass(slots=True)
class Standing:
    """Standing of a job with the scheduler."""

    arrived: bool = False
    """Whether the scheduler's thread has taken it in."""
    has_place: bool = False
    """Whether it is among the jobs that run together."""
    placed_at: int = 0
    """Number of tokens that had run when the job was given its place."""
    rounds_paused: int = 0
    """Rounds in a row in which the reader had paused, for a job with a place."""
    charged: int = 0
    """FLOPs counted on its tenant's clock."""
    behind: tuple[str, int] | None = None
    """Id of the one request whose prompt it may wait for, and how many tokens of it it could take over then."""


class Job:
    """One request, what it has computed so far, and how it ended.

    Args:
        request: What to answer.
        model: What answers it.
        guard: What watches loops.
        max_ahead: Maximum number of pieces computed before the caller takes them; None = any number.
        on_end: Called by the scheduler's thread when nothing more will be computed.
    """

    def __init__(
        self,
        request: Request,
        model: LoadedModel,
        *,
        guard: LoopGuard | None = None,
        max_ahead: int | None = None,
        on_end: Callable[[Job], None] | None = None,
    ) -> None:
        self.request, self.model, decoder = request, model, model.decoder
        self.standing, self.delivery = Standing(), Delivery(max_ahead)
        self.row = Row(decoder, request.program, guard, len(request.tokens))
        # A grammar allows no special tokens but those that it names.
        self.text = TextStream(model.tokenizer, request.stops, special=request.grammar is not None)
        self.tokens: list[int] = []
        """Every sampled token."""
        self.logprobs: list[TokenLogprobs] | None = None if request.logprobs is None else []
        """One per sampled token, where the request wants them."""
        self.prompt_logprobs: list[TokenLogprobs] = []
        """One per prompt token after the first, where the request wants them."""
        budget = request.max_tokens if request.fit_max_tokens else None
        self.grammar = None if request.grammar is None else request.grammar.start(budget)
        """State of the answer in its grammar; None = it has none."""
        exact, float32 = self.row.independent, decoder.dtype.itemsize == 4
        self.drafts = drafts_of(
            request.tokens, request.speculate, request.sampling, exact=exact, repeats=exact or float32
        )
        """Proposes its next tokens; None = nothing does."""
        looking = (request.steering, request.logits_hook, request.logprobs, self.grammar)
        self.needs_logits = any(each is not None for each in looking)
        """True if logits are looked at: to change them, for a grammar, or for log-probabilities."""
        self._repeats = None if request.stop_repeats is None else Repeats(request.stop_repeats)
        self.repeated = False
        """Whether the answer was ended because it repeats itself."""
        self.cached = 0
        """Prompt tokens whose keys and values were already available."""
        self.finish: FinishReason | None = None
        self.error: BaseException | None = None
        """The error that ended the job; None = it runs or finished normally."""
        self.kv_bytes = 0
        """Largest key and value storage. Unit: bytes."""
        self.begin_ns = self.prefill_end_ns = self.end_ns = 0
        self.on_round: Callable[[int], None] | None = None
        """Called by the scheduler's thread after each round, with the time in nanoseconds; must not wait."""
        self.sampler = Sampler(request.sampling, decoder.placement.last)
        self._on_end = on_end
        self._shown = 0
        """Number of tokens whose pieces have been put out."""
        self._cancelled = False
        self._revoked: BaseException | None = None

    # -- the caller's side ------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """True once nothing more will be computed."""
        return self.delivery.done

    @property
    def left(self) -> bool:
        """Whether the job was asked to stop, by `cancel` or `revoke`."""
        return self._cancelled or self._revoked is not None

    def cancel(self) -> None:
        """Request the job to stop; it does so before its next token."""
        self._cancelled = True

    def revoke(self, error: BaseException) -> None:
        """Request the job to end with an error; it does so before its next token. Waits for nothing."""
        self._revoked = error

    def progress(self) -> Progress:
        """Progress so far; for the scheduler's thread, or when nothing more will be."""
        row = self.row
        return Progress(
            output=len(self.tokens),
            cached=self.cached,
            work=row.metered.copy(),
            loops_stopped=row.loops_stopped,
            kv_bytes=max(self.kv_bytes, row.page_table.nbytes),
            begin_ns=self.begin_ns,
            prefill_end_ns=self.prefill_end_ns,
            end_ns=self.end_ns,
        )

    # -- the scheduler's side ---------------------------------------------------------------------------------------

    @property
    def chunk(self) -> Sequence[int]:
        """The next chunk of the prompt, or of what runs again after it.

        It ends at a multiple of `cost.CHUNK` and at the end of the prompt, whatever else is running.
        """
        prompt, start = self.request.tokens, self.row.length
        end = start + CHUNK - start % CHUNK
        if self.row.replaying:
            end = min(end, self.row.replay_end)
        if start < len(prompt):
            return prompt[start : min(end, len(prompt))]
        return self.tokens[start - len(prompt) : end - len(prompt)]

    @property
    def decoding(self) -> bool:
        """Whether the next pass runs the token sampled last, after everything before it."""
        return bool(self.tokens) and not self.row.replaying

    @property
    def complete(self) -> bool | None:
        """Whether the text matches the grammar as a whole; None = there is none."""
        return None if self.grammar is None else self.grammar.accepting and not self.text.stopped

    @property
    def max_length(self) -> int:
        """Number of tokens in the row if the answer is as long as it may be."""
        return len(self.request.tokens) + self.request.max_tokens

    def stop_if_due(self) -> None:
        """End the job if its caller has cancelled it, it was revoked, or its time is up."""
        if self._cancelled or self.request.cancelled:
            self.finish = "cancelled"
            self.end(self.text.finish())
        elif self._revoked is not None:
            self.fail(self._revoked)
        elif self.request.late:
            self.fail(
                RequestTimeoutError(
                    f"the answer was stopped after {len(self.tokens)} tokens by timeout={self.request.timeout} s.",
                    hint="Raise timeout, lower max_tokens, or use a cheaper tier.",
                )
            )

    def score_prompt(self, states: torch.Tensor) -> None:
        """Read how likely each prompt token was, from the states (T, E) of prompt tokens that have just run.

        Raises:
            LogitsError: The model computed nothing that a token could be chosen by.
        """
        start, prompt = len(self.prompt_logprobs), self.request.tokens
        targets = prompt[start + 1 : start + 1 + len(states)]  # the last token of the prompt precedes the answer
        for first in range(0, len(targets), SCORED_AT_ONCE):
            some = targets[first : first + SCORED_AT_ONCE]
            logits = self.row.decoder.head(states[first : first + len(some)])
            self.row.work.head(len(some))
            self._check(float(logits.max()))
            for place, token in enumerate(some):
                self.prompt_logprobs.append(read_logprobs(logits[place], token, self.request.prompt_logprobs or 0))

    def choose(self, logits: torch.Tensor, likeliest: int, logit: float) -> None:
        """Choose the next token from logits (V,), given the likeliest one and its logit, which is nan if any is.

        Raises:
            LogitsError: The model computed nothing that a token could be chosen by.
            GrammarError: The grammar cannot be followed any further.
            Exception: Whatever the hook raises.
        """
        self._check(logit)
        if self.needs_logits:
            self._sample(logits)
        else:
            self._take(likeliest if self.sampler.greedy else self.sampler(logits))

    def _check(self, highest: float) -> None:
        """Refuse logits by which no token can be chosen, given the highest one."""
        if math.isfinite(highest):
            return
        self.row.page_table.clear(len(self.request.tokens))  # the next row must not find nan in its pages
        raise LogitsError(
            f"the highest logit of model {self.model.name!r} is {highest} after {len(self.tokens)} tokens of request "
            f"{self.request.request_id!r} (program {self.request.program.text!r}, {self.row.decoder.dtype_name}).",
            hint="Try precision='fp32' and compute='exact': if that helps, the precision or the program's bridges are "
            "to blame, else the weights or the configuration of the model.",
        )

    def look_up_drafts(self, room: int, experience: Experience) -> int:
        """Look for tokens that may follow, at most `room`, and none that could not be kept.

        Returns:
            How many the draft head may guess besides, from the state of the last token that ran.
        """
        if self.drafts is None:
            return 0
        room = min(room, self.request.max_tokens - len(self.tokens) - 1)
        count = self.drafts.look_up(self.tokens, room, experience, self.request.tenant)
        return 0 if self.row.states is None else count

    def judge(
        self,
        piece: Sequence[int],
        logits: torch.Tensor,
        likeliest: Sequence[int],
        highest: Sequence[float],
        unsure: Sequence[bool],
        experience: Experience,
        count: Callable[[], None],
    ) -> None:
        """Choose the tokens that follow, one after another, as long as the next one was drafted.

        Each is chosen as it would be without drafts: the same token by the same logits and the same random numbers. So
        a drafted token is kept exactly where it would have been sampled. Errors are those of `choose`.

        Args:
            piece: Tokens that ran: the one sampled last, and the drafted ones, T in all.
            logits: After each of them, (T, V).
            likeliest: The likeliest token of each.
            highest: Its logit.
            unsure: Whether two tokens are so near to each other that a pass of another size might choose the other.
            experience: How often drafts are right; learns from these.
            count: Called before each token is chosen.
        """
        start, kept = self.row.length - len(piece), 0
        while settled := self._is_sure(piece, logits[kept], unsure[kept]):
            if kept:
                self.row.work.keep_draft()
            kept += 1
            count()
            self.choose(logits[kept - 1], likeliest[kept - 1], highest[kept - 1])
            if self.done or kept == len(piece) or self.tokens[-1] != piece[kept] or self._stops():
                break
        if self.drafts is not None and len(piece) > 1:
            self.drafts.judged(len(piece) - 1, kept, experience, settled=settled)
        self.row.keep_state(kept - 1)
        if self.done:
            return
        if not kept:
            self.row.work.drop_pass()
        if not all(map(math.isfinite, highest[kept:])):
            self.row.page_table.clear_after(start + kept)
        self.row.page_table.shorten(start + kept)

    def _stops(self) -> bool:
        self.stop_if_due()
        return self.done

    def _is_sure(self, piece: Sequence[int], logits: torch.Tensor, near: bool) -> bool:
        """Whether a pass of one token would choose the same from logits (V,); `near`: two are likeliest."""
        if len(piece) == 1:
            return True
        if self.row.breached:
            return False
        if self.row.independent:
            return True
        if self.sampler.greedy and self.grammar is not None:
            allowed = self.grammar.restrict(logits)
            near = near_ties(allowed[None], [float(allowed.max())], self.row.decoder.dtype)[0]
        return not (near and self.sampler.greedy)

    def _sample(self, logits: torch.Tensor) -> None:
        """Choose the next token from logits (V,): the hook may change them, and then the grammar forbids tokens.

        Log-probabilities are by the logits that result.
        """
        request = self.request
        if request.steering is not None:
            logits = request.steering(request.tokens, self.tokens, logits)
        if request.logits_hook is not None:
            logits = apply_hook(request.logits_hook, self.tokens, logits)
        token = self.sampler(logits) if self.grammar is None else self.grammar.sample(self.sampler, logits)
        if self.logprobs is not None:
            if self.grammar is not None:
                logits = self.grammar.restrict(logits)
            self.logprobs.append(read_logprobs(logits, token, request.logprobs or 0))
        self._take(token)

    def _take(self, token: int) -> None:
        """Add a sampled token; ends the job where the answer ends."""
        now = time.perf_counter_ns()
        self.prefill_end_ns = self.prefill_end_ns or now
        self.end_ns = now
        self.tokens.append(token)
        ended = token in self.model.end_tokens
        piece = "" if ended else self.text.push(token)
        if self.grammar is not None and not ended:
            self.grammar.accept(token)
            ended = self.grammar.ended  # nothing but an end could follow, so that it need not be computed
        self.repeated = not ended and self._repeats is not None and self._repeats.follow(self.tokens)
        if ended or self.repeated or self.text.stopped or len(self.tokens) >= self.request.max_tokens:
            piece += self.text.finish()  # what was held back may contain a stop string, too
            cut = self.grammar is not None and self.grammar.cut
            self.finish = "stop" if (ended and not cut) or self.repeated or self.text.stopped else "length"
            self.end(piece)
        else:
            self._put(piece)

    def drop_pages(self) -> None:
        """Give the pages up to others while the job has no place; see `Row.drop_pages`."""
        self.kv_bytes = max(self.kv_bytes, self.row.page_table.nbytes)
        self.row.drop_pages()

    def fail(self, error: BaseException) -> None:
        """End the job with an error."""
        self.error = error
        self.end("")

    def end(self, piece: str) -> None:
        """Nothing more will be computed: free the pages and wake the caller."""
        self.kv_bytes = max(self.kv_bytes, self.row.page_table.nbytes)
        self.row.page_table.release()
        self.row.end_replay()
        self._put(piece, last=True)
        if self._on_end is not None:
            self._on_end(self)

    def _put(self, text: str, *, last: bool = False) -> None:
        new = None if self.logprobs is None else tuple(self.logprobs[self._shown :])
        self._shown = len(self.tokens)
        self.delivery.put(Piece(text, new, last))
