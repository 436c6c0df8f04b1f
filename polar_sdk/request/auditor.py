"""Audits: a share of answered requests is compared with full depth, while the engine has nothing else to do.

An audit measures the loss that the certificate counts: identity answers the prompt greedily, and the program that
served the request keeps those tokens of that answer that it would also choose. As long as the served answer was greedy
and equals identity's, the program's choices are known; beyond that, it runs again along identity's answer. Both runs
decode token by token, in the same way, and are requests of the provider's own tenant with their own usage records.
Prompts are held in memory until their audit has run, for an hour at most.

Knows requests and the sink; the router knows the promises, and the sink what follows from audits.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import Empty
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import torch

from polar_sdk.engine.sampling import Sampling
from polar_sdk.errors import SinkError
from polar_sdk.locks import renewed_in_child
from polar_sdk.programs.program import Program
from polar_sdk.promises.audit import Audit
from polar_sdk.promises.losses import ANSWER_TOKENS, is_lost, tokens_kept
from polar_sdk.promises.novelty import Novelty, Usualness
from polar_sdk.request.generation import answer
from polar_sdk.router.base import fixed_router
from polar_sdk.serving.prefixes import common_start
from polar_sdk.serving.request import Request
from polar_sdk.serving.threads import Inbox
from polar_sdk.usage import AUDIT_TAG, FALLBACK_TAG, new_request_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.grammar import Grammar
    from polar_sdk.programs.policy import LoopGuard
    from polar_sdk.promises.audit import PromiseTerms
    from polar_sdk.promises.novelty import Usual
    from polar_sdk.request.generation import Generation
    from polar_sdk.request.kept import KeptPrompts
    from polar_sdk.request.selection import Selection
    from polar_sdk.serving.job import Job
    from polar_sdk.serving.loaded import LoadedModel
    from polar_sdk.usage import UsageSink

_log: Final = logging.getLogger(__name__)
TENANT: Final = "polar.audit"
"""The provider's own tenant, where no other is named."""
QUEUE: Final = 64
"""Maximum number of chosen requests that wait; one more is not audited."""
WAIT_SECONDS: Final = 3600.0
"""A request that has waited longer is not audited."""
RAISED: Final = 0.5
"""Share of a tier's requests that are audited, one after another, while prompts are suspect or audits speak against a
promise of it: a doubt is soon settled, and costs little where it was none."""
_REST_SECONDS: Final = 2.0
"""The thread ends after this time without a chosen request."""
_AGAIN_SECONDS: Final = 1.0
"""How often an audit is offered to a sink that cannot store it."""
_CLOSE_SECONDS: Final = 5.0
"""How long the end of the process waits for an audit that is under way: it is cancelled, and ends within a pass."""
_LIVING: Final[WeakSet[Auditor]] = WeakSet()


@atexit.register  # after that of the scheduler, and so called before it
def _close_all() -> None:
    """End the threads before the interpreter does: it would stop one inside torch, which aborts the process."""
    for auditor in list(_LIVING):
        auditor.close()


@dataclass(frozen=True, slots=True)
class _Case:
    """A request that is to be audited."""

    tenant: str
    request_id: str
    tier: str
    tokens: tuple[int, ...]
    program: Program
    promises: tuple[PromiseTerms, ...]
    weight: float
    answer: tuple[int, ...]
    """Tokens of the answer served, as far as its program chose greedily; empty if it did not."""
    choices: Grammar | None
    """The texts that it chose among; None = it wrote freely."""
    max_tokens: int
    keep: bool
    """Whether the prompt may be kept."""
    process: int
    since: float


class Auditor:
    """Audits the answers of one model.

    Args:
        model: What answers.
        sink: Takes the records of audits, and what they found.
        guard: What watches loops.
        shares: Of each tier's requests.
        selection: Chooses them.
        tenant: Who pays.
        doubtful: Whether audits of late speak against a promise, by its digest.
        kept: Keeps prompts of audited requests; None = nobody does.
        usual: Where prompts fell in calibration; None = nobody knows, and none is found unusual.

    Attributes:
        shares: Of each tier's requests, while nothing speaks against a promise.
        usualness: What the prompts of late are found to be.
        dropped: Number of chosen requests that were not audited, because too many waited, or for too long.
    """

    def __init__(
        self,
        model: LoadedModel,
        sink: UsageSink,
        guard: LoopGuard | None,
        shares: Mapping[str, float],
        selection: Selection,
        tenant: str,
        doubtful: Callable[[str], bool],
        kept: KeptPrompts | None,
        usual: Usual | None = None,
    ) -> None:
        self._model, self._sink, self._guard = model, sink, guard
        self.shares, self._selection, self.tenant, self._kept = dict(shares), selection, tenant, kept
        self._doubtful = doubtful
        self.dropped = 0
        self.usualness = Usualness.USUAL
        self._novelty = None if usual is None else Novelty(usual)
        self._observing = renewed_in_child(threading.Lock())
        self._waiting: deque[_Case] = deque()
        self._judges: int | None = None
        """The process that judges an answer now."""
        self._inbox: Inbox[None] = Inbox("polar-audit")
        self._ending = threading.Event()
        _LIVING.add(self)

    @property
    def unusual(self) -> bool:
        """Whether prompts of late are so unlike those of the calibration that no promise is for them."""
        return self.usualness is Usualness.UNUSUAL

    def __len__(self) -> int:
        """Number of chosen requests that wait."""
        return len(self._waiting)

    @property
    def judging(self) -> bool:
        """Whether an answer is judged now."""
        return self._judges == os.getpid()

    def answered(self, job: Job) -> None:
        """A request was answered and is recorded: have it audited where it is chosen. Waits for nothing."""
        request = job.request
        if self._novelty is not None and request.likeness is not None:
            with self._observing:
                before, self.usualness = self.unusual, self._novelty.observe(request.likeness)
                if self.unusual and not before:
                    _log.warning(
                        "prompts are unlike those that the router was calibrated on, so its promises do not cover them"
                    )
                elif before and not self.unusual:
                    _log.warning("prompts resemble those of the calibration again")
        promises, fallen = request.promises, FALLBACK_TAG in request.tags
        if not (promises or fallen) or job.finish not in ("stop", "length") or request.tenant == self.tenant:
            return
        # Where full depth serves in place of all tiers, nothing can be lost, but a new calibration needs the prompts.
        least = self.shares.get(promises[0].tier, 0.0) if promises else max(self.shares.values())
        share = max(least, RAISED) if least and self._looks_closer(promises) else least
        if not (share and self._selection.chooses(request.tenant, request.request_id, share)):
            return
        if len(request.tokens) + ANSWER_TOKENS > self._model.decoder.context_window:
            return  # as in calibration
        if len(self._waiting) >= QUEUE:
            self.dropped += 1
            return
        grammar = request.grammar if request.chooses else None
        changed = (request.steering, request.logits_hook, None if request.chooses else request.grammar)
        greedy = job.sampler.greedy and all(each is None for each in changed)
        self._waiting.append(
            _Case(
                tenant=request.tenant,
                request_id=request.request_id,
                tier=request.tier or "",
                tokens=request.tokens,
                program=request.program,
                promises=promises,
                weight=least / share,
                answer=tuple(job.tokens) if greedy else (),
                choices=grammar,
                max_tokens=request.max_tokens if request.chooses else ANSWER_TOKENS,
                keep=self._kept is not None and self._kept.may_keep(request.tenant, request.tags),
                process=os.getpid(),
                since=time.monotonic(),
            )
        )
        with suppress(RuntimeError):  # no thread starts at the end of the process
            self._inbox.put(None, self._serve)

    def _looks_closer(self, promises: Sequence[PromiseTerms]) -> bool:
        """Whether more requests than usual are audited: there is a doubt, and nothing under way that may settle it."""
        if self._waiting or self.judging:
            return False
        return self.usualness is not Usualness.USUAL or any(self._doubtful(each.digest) for each in promises)

    def close(self) -> None:
        """Audit nothing more, and end the thread; waits a moment for an audit that is under way."""
        self._ending.set()
        if (thread := self._inbox.thread) is not None:
            self._inbox.put(None, self._serve)  # it may rest
            thread.join(_CLOSE_SECONDS)

    def _serve(self) -> None:
        with suppress(Empty):
            while True:
                self._inbox.take(0 if self._ending.is_set() else _REST_SECONDS)
                while self._waiting:
                    self._judges = os.getpid()  # before the request waits no more: at no moment is it neither
                    try:
                        self._take(self._waiting.popleft())
                    finally:
                        self._judges = None

    def _take(self, case: _Case) -> None:
        if self._ending.is_set() or case.process != os.getpid():  # a forked child has the parent's
            return
        if time.monotonic() - case.since > WAIT_SECONDS:
            self.dropped += 1
            return
        try:
            self._audit(case)
        except Exception as error:  # any sink, any error: the next one may be audited
            _log.warning("request %r could not be audited (%s)", case.request_id, error)

    def _audit(self, case: _Case) -> None:
        if case.keep and self._kept is not None:
            self._kept.keep(case.tokens, case.tenant, case.tier)
        judged = self._judged(case) if case.promises else None
        if judged is None:
            return
        compared, kept, flops, paid = judged
        for place, promise in enumerate(case.promises):
            audit = Audit(
                audit_id=new_request_id(),
                request_id=case.request_id,
                tenant=case.tenant,
                tier=promise.tier,
                promise=promise.digest,
                loss=promise.loss,
                alpha=promise.alpha,
                delta=promise.delta,
                lost=compared > 0 and is_lost(kept / compared, promise.loss),
                compared=compared,
                kept=kept,
                weight=case.weight,
                prompt_tokens=len(case.tokens),
                flops=0 if place else flops,
                audit_request_id=paid,
                at=datetime.now(UTC),
            )
            self._store(audit)

    def _judged(self, case: _Case) -> tuple[int, int, int, str | None] | None:
        """Tokens compared and kept, FLOPs, and the id of the record that paid; None if a run ended early."""
        identity = Program.identity(self._model.decoder.depth)
        if case.program.is_identity(self._model.decoder.depth):
            return 0, 0, 0, None  # nothing can be lost
        paid = new_request_id()
        full = self._run(case, identity, paid, case.max_tokens)
        runs, reference = [full], full.token_ids
        chosen, follow = case.answer, _Follow(reference)
        if common_start(chosen, reference) < len(reference) and not (case.choices and chosen):
            hook = None if case.choices else follow
            runs.append(self._run(case, case.program, f"{paid}.tier", case.max_tokens, hook))
            chosen = tuple(follow.chosen) if hook else runs[1].token_ids
        if any(run.finish_reason == "cancelled" for run in runs):
            self._waiting.clear()  # the process ends
            return None
        flops = sum(run.usage.flops.executed for run in runs)
        if case.choices:
            return 1, int(chosen == reference), flops, paid
        return len(reference), tokens_kept(chosen[: len(reference)], reference), flops, paid

    def _run(
        self, case: _Case, program: Program, request_id: str, max_tokens: int, hook: _Follow | None = None
    ) -> Generation:
        fixed = fixed_router(program, self._model.decoder.depth)
        request = Request(
            tokens=case.tokens,
            program=program,
            router=fixed.kind,
            router_version=fixed.version,
            router_flops=0,
            tier=None,
            sampling=Sampling(),
            stops=(),
            max_tokens=max_tokens,
            tenant=self.tenant,
            tags={AUDIT_TAG: case.request_id},
            request_id=request_id,
            id_is_new=True,
            cancel=self._ending,
            timeout=None,
            logits_hook=hook,
            grammar=case.choices,
            speculate="off",
            idle=True,
            starts_of=case.tenant,
        )
        return answer(self._model, [request], self._sink, self._guard)[0]

    def _store(self, audit: Audit) -> None:
        """Hand an audit to the sink, and again where that cannot store it now."""
        while not self._ending.is_set():
            try:
                self._sink.audited(audit)
            except SinkError as error:
                _log.warning("an audit is not yet stored (%s)", error)
                self._ending.wait(_AGAIN_SECONDS)
            else:
                return


class _Follow:
    """A logits hook that makes a program follow a reference, and notes what it would have chosen."""

    def __init__(self, reference: Sequence[int]) -> None:
        self._reference = reference
        self.chosen: list[int] = []

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        self.chosen.append(int(logits.argmax()))
        forced = torch.full_like(logits, -torch.inf)
        forced[self._reference[min(len(tokens), len(self._reference) - 1)]] = 0.0
        return forced
