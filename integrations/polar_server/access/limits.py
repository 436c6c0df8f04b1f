"""Rate limits: requests and tokens per minute, and concurrent answers, per key, over all servers that share a store.

A bucket holds a minute's worth and fills evenly. Requests are taken when a call arrives, tokens when its record states
their number: a call is admitted while any are left, so the last one may exceed the limit, and later ones wait until
that is made up.

The store decides, and may take as long as a database does. So calls that arrive meanwhile wait and are decided
together. A key without limits needs no decision.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Final

from polar_server.access.stores import find_access
from polar_server.errors import ApiError

if TYPE_CHECKING:
    from polar_server.access.stores import Key, RateStore, Verdict

_RENEW_S: Final = 7.5
"""How often a store hears of answers that run; it counts them for four times as long. Unit: seconds."""
_RETRY_S: Final = 1.0
"""Time after a failure until the store is informed again. Unit: seconds."""
_MAX_BATCH: Final = 1_000
_log: Final = logging.getLogger("polar_server")


class Limits:
    """The limits of all keys; for the event loop alone.

    Args:
        store: What decides; None = a ledger in memory, for this process alone.
    """

    def __init__(self, store: RateStore | None = None) -> None:
        self._given = store
        self._asking: list[tuple[Key, asyncio.Future[Verdict]]] = []
        self._used: list[tuple[Key, int]] = []
        self._running: Counter[str] = Counter()
        self._changed: set[str] = set()
        """Keys whose number of answers the store does not know yet."""
        self._work: asyncio.Task[None] | None = None
        self._renewing: asyncio.TimerHandle | None = None

    @cached_property
    def _store(self) -> RateStore:
        """The deciding store, found when the first key has a limit."""
        found: RateStore = self._given or find_access("sqlite://").rates
        return found

    async def enter(self, key: Key) -> dict[str, str]:
        """Let a call in.

        Returns:
            Headers that say what is left.

        Raises:
            ApiError: 429: a limit is reached.
            SinkError: The store cannot say.
        """
        if not _is_limited(key):
            return {}
        asked: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._asking.append((key, asked))
        self._start()
        verdict = await asked
        headers = _headers(key, verdict)
        if verdict.refused is not None:
            raise _refusal(key, verdict, headers)
        return headers

    def leave(self, key: Key, tokens: int) -> None:
        """An admitted call has ended, and used N tokens."""
        if not _is_limited(key):
            return
        if key.parallel is not None:
            self._running[key.key_id] -= 1
            self._changed.add(key.key_id)
        if key.tokens_per_minute is not None and tokens:
            self._used.append((key, tokens))
        self._start()

    async def close(self) -> None:
        """Tell the store what it does not know yet, if it takes it now."""
        if self._renewing is not None:
            self._renewing.cancel()
        if self._work is not None:
            await asyncio.wait([self._work], timeout=_RETRY_S)

    def _start(self) -> None:
        if self._work is None or self._work.done():
            self._work = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        """Tell the store what there is, until there is nothing more."""
        while self._asking or self._used or self._changed:
            asking, self._asking = self._asking[:_MAX_BATCH], self._asking[_MAX_BATCH:]
            used, self._used = self._used, []
            changed, self._changed = self._changed, set()
            counted = {key.key_id for key, _ in asking if key.parallel is not None}
            running = {key_id: self._running[key_id] for key_id in changed | counted}
            try:
                verdicts = await asyncio.to_thread(self._store.update, [key for key, _ in asking], used, running)
            except Exception as error:
                self._used, self._changed = used + self._used, changed | self._changed
                for _, asked in asking:
                    if not asked.done():
                        asked.set_exception(error)
                if not self._asking:
                    _log.warning("limits of API keys could not be written now (%s)", error)
                    await asyncio.sleep(_RETRY_S)
                continue
            for (key, asked), verdict in zip(asking, verdicts, strict=True):
                self._answer(key, asked, verdict)

    def _answer(self, key: Key, asked: asyncio.Future[Verdict], verdict: Verdict) -> None:
        if verdict.refused is None and key.parallel is not None:
            self._running[key.key_id] += 1
            if self._renewing is None:
                self._renewing = asyncio.get_running_loop().call_later(_RENEW_S, self._renew)
        if not asked.done():
            asked.set_result(verdict)
        elif verdict.refused is None:  # whoever asked is gone
            self.leave(key, 0)

    def _renew(self) -> None:
        """Tell the store of all answers that run, so that it goes on counting them."""
        self._renewing = None
        self._running = +self._running
        if self._running:
            self._changed |= self._running.keys()
            self._renewing = asyncio.get_running_loop().call_later(_RENEW_S, self._renew)
            self._start()


def _is_limited(key: Key) -> bool:
    return (key.requests_per_minute, key.tokens_per_minute, key.parallel) != (None, None, None)


def _limits(key: Key) -> dict[str, int]:
    limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
    return {what: limit for what, limit in limits.items() if limit is not None}


def _headers(key: Key, verdict: Verdict) -> dict[str, str]:
    headers = {}
    for what, limit in _limits(key).items():
        left, seconds = verdict.left[what]
        headers[f"x-ratelimit-limit-{what}"] = str(limit)
        headers[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(left + 1e-6)))
        headers[f"x-ratelimit-reset-{what}"] = f"{seconds:.3f}s"
    return headers


def _refusal(key: Key, verdict: Verdict, headers: dict[str, str]) -> ApiError:
    if verdict.refused == "parallel":
        message = f"{key.parallel} answers at a time are the limit of API key {key.key_id}."
    else:
        assert verdict.refused is not None
        message = f"{_limits(key)[verdict.refused]} {verdict.refused} per minute are the limit of API key {key.key_id}."
    seconds = verdict.wait_s
    retry = {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1_000))}
    return ApiError(message, status=429, code="rate_limit_exceeded", headers={**headers, **retry})
