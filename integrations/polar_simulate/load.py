"""The load: sends requests at their times, whether or not earlier ones are answered, and notes how each ended.

The loop is open. A request that comes while the engine is busy waits, and its latency runs from the moment it should
have been sent, so that neither a slow engine nor a late sender hides how long a caller waits. Knows no ledger.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import BudgetExceededError, PolarError, QueueFullError
from polar_simulate.tally import Sent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from polar_sdk import PolarModel
    from polar_simulate.day import Arrival
    from polar_simulate.tally import End

CALLERS: Final = 256
"""Requests under way at a time, each in a thread of its own; further ones wait, and their latency runs."""


class Load:
    """Sends requests to a model.

    Args:
        model: What answers them.
        tier: Of all requests; None = the one each was drawn for.
        prefix: Of request ids, which end in the number of the arrival.
        on_end: Called with each request that has ended, in the thread that sent it, one at a time.
    """

    def __init__(
        self, model: PolarModel, *, tier: str | None, prefix: str, on_end: Callable[[Sent], None] = lambda _: None
    ) -> None:
        self._model, self._tier, self._prefix, self._on_end = model, tier, prefix, on_end
        self._stop = threading.Event()
        self._done = threading.Lock()
        self._broken: BaseException | None = None

    def id_of(self, number: int) -> str:
        """The request id of an arrival."""
        return f"{self._prefix}-{number}"

    def run(self, arrivals: Iterable[tuple[float, Arrival]], *, until: float = float("inf")) -> float:
        """Send requests, and wait for their answers.

        Args:
            arrivals: When each is due, from now on, in order. Unit: seconds.
            until: When to send no more. Unit: seconds from now on.

        Returns:
            How long it took. Unit: seconds.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was under way is cancelled and recorded first.
            Exception: Something other than a `PolarError` ended a request.
        """
        start = time.monotonic()
        pool = ThreadPoolExecutor(CALLERS, thread_name_prefix="polar-caller")
        try:
            for due, arrival in arrivals:
                if due > until:
                    break
                if self._stop.wait(max(0.0, start + due - time.monotonic())):
                    break
                pool.submit(self._send, arrival, start + due)
            pool.shutdown(wait=True)
        except BaseException:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        if self._broken is not None:
            raise self._broken
        return time.monotonic() - start

    def _send(self, arrival: Arrival, due: float) -> None:
        tier = self._tier or arrival.tier
        begun = time.monotonic()
        answer: int | None = None
        error: str | None = None
        end: End = "failed"
        try:
            generation = self._model.generate(
                arrival.prompt,
                compute=tier,
                tenant=arrival.tenant,
                max_tokens=arrival.max_tokens,
                request_id=self.id_of(arrival.number),
                cancel=self._stop,
            )
        except BudgetExceededError:
            end = "refused"
        except QueueFullError:
            end = "queue full"
        except PolarError as failure:
            error = f"{type(failure).__name__}: {failure}"
        except BaseException as failure:
            self._broken = self._broken or failure
            self._stop.set()
            return
        else:
            end = "cancelled" if generation.finish_reason == "cancelled" else "answered"
            answer = hash(generation.token_ids)
        ended = time.monotonic()
        with self._done:
            self._on_end(Sent(arrival.number, arrival.tenant, tier, end, ended - due, begun - due, answer, error))
