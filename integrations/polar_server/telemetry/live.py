"""The state of the engine, for the operations page and the metrics. Reads counters of others, without locking."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

from polar_sdk.engine_state import Look, TierLook
from polar_sdk.router.learned import LearnedRouter

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk import PolarModel
    from polar_server.answers import Answers
    from polar_server.watched_sink import WatchedSink

_SPAN_S: Final = 5.0
"""Over how long tokens per second are counted. Unit: seconds."""


class LiveEngine:
    """Looks at one engine. Safe in several threads.

    Args:
        engine: The model.
        name: Its id.
        answers: What is being computed.
        sink: Says how many requests have no record yet.
        clock: Returns seconds that only rise.
    """

    def __init__(
        self,
        engine: PolarModel,
        name: str,
        answers: Answers,
        sink: WatchedSink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self.name, self._answers, self._sink, self._clock = engine, name, answers, sink, clock
        self._counted: deque[tuple[float, int]] = deque()

    def look(self) -> Look:
        """The engine at this moment."""
        scheduler, pool = self._engine.scheduler, self._engine.decoder.pool
        waiting = scheduler.waiting
        due, being_answered = self._sink.due, self._answers.request_ids()  # in this order: none is missed
        router, void, tiers = self._router()
        auditor = self._engine.auditor
        return Look(
            model=self.name,
            tokens_per_second=self._rate(scheduler.sampled_tokens),
            running=max(len(scheduler) - waiting, 0),
            places=scheduler.limits.max_rows,
            waiting=waiting,
            pages_used=pool.size - pool.free,
            pages=pool.size,
            answers=len(self._answers),
            unrecorded=len(due - being_answered),
            unusual=self.unusual,
            unaudited=0 if auditor is None else auditor.dropped,
            draining=self._answers.draining,
            router=router,
            void=void,
            tiers=tiers,
        )

    @property
    def unusual(self) -> bool:
        """Whether prompts of late are unlike those of the calibration."""
        return self._engine.auditor is not None and self._engine.auditor.unusual

    def _rate(self, tokens: int) -> float | None:
        """Tokens per second since the look that was some seconds ago, or the last one before that."""
        now = self._clock()
        while len(self._counted) > 1 and now - self._counted[1][0] >= _SPAN_S:
            self._counted.popleft()
        first = self._counted[0] if self._counted else (now, tokens)
        self._counted.append((now, tokens))
        return (tokens - first[1]) / (now - first[0]) if now > first[0] else None

    def _router(self) -> tuple[str, str | None, tuple[TierLook, ...]]:
        router = self._engine.router
        if router is None:
            return "none: a tier runs the program that the policy names", None, ()
        words = f"{router.kind} {router.version}"
        if not isinstance(router, LearnedRouter) or router.certificate is None:
            return words, None, ()
        certificate = router.certificate
        tiers = tuple(
            TierLook(tier, promise.text, certificate.saves(tier)) for tier, promise in certificate.tiers.items()
        )
        return words, certificate.subject.difference(router.subject), tiers
