"""Rate limits of one process: requests and tokens per minute, and answers at a time, per key.

A bucket holds a minute's worth and fills evenly. Requests are taken when a call comes, tokens when its record says how
many there were: a call is let in while any are left, so the last one may overdraw, and later ones wait for that.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from polar_server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_server.access import Key

_MINUTE: Final = 60.0


@dataclass
class Bucket:
    """What is left of an amount per minute."""

    limit: int
    clock: Callable[[], float] = time.monotonic
    left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self._at = float(self.limit), self.clock()

    def fill(self) -> None:
        """Add what time has brought."""
        now = self.clock()
        self.left = min(self.limit, self.left + (now - self._at) * self.limit / _MINUTE)
        self._at = now

    def seconds_until(self, amount: float) -> float:
        """Time until so much is there. Unit: seconds."""
        return max(0.0, (amount - self.left) * _MINUTE / self.limit)


class _Use:
    """The buckets of one key."""

    def __init__(self, key: Key) -> None:
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        self.buckets = {what: Bucket(limit) for what, limit in limits.items() if limit is not None}
        self.limits = limits
        self.open = 0


class Limits:
    """The limits of all keys; for the event loop alone."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}

    def enter(self, key: Key) -> dict[str, str]:
        """Let a call in.

        Returns:
            Headers that say what is left.

        Raises:
            ApiError: 429: a limit is reached.
        """
        use = self._use(key)
        headers = self._headers(use)
        if key.parallel is not None and use.open >= key.parallel:
            raise _limited(f"{use.open} answers at a time are the limit of API key {key.key_id}.", 1.0, headers)
        for what, needed in (("requests", 1.0), ("tokens", 0.001)):
            bucket = use.buckets.get(what)
            if bucket is not None and bucket.left < needed:
                message = f"{bucket.limit} {what} per minute are the limit of API key {key.key_id}."
                raise _limited(message, bucket.seconds_until(needed), headers)
        if "requests" in use.buckets:
            use.buckets["requests"].left -= 1
        use.open += 1
        return self._headers(use)

    def leave(self, key: Key, tokens: int) -> None:
        """A call that was let in has ended, and used so many tokens."""
        use = self._use(key)
        use.open = max(0, use.open - 1)
        if "tokens" in use.buckets:
            use.buckets["tokens"].left -= tokens

    def _use(self, key: Key) -> _Use:
        use = self._uses.get(key.key_id)
        wanted = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        if use is None or use.limits != wanted:
            still_open = 0 if use is None else use.open
            use = self._uses[key.key_id] = _Use(key)
            use.open = still_open
        return use

    @staticmethod
    def _headers(use: _Use) -> dict[str, str]:
        headers = {}
        for what, bucket in use.buckets.items():
            bucket.fill()
            headers[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.left)))
            headers[f"x-ratelimit-reset-{what}"] = f"{bucket.seconds_until(bucket.limit):.3f}s"
        return headers


def _limited(message: str, seconds: float, headers: dict[str, str]) -> ApiError:
    retry = {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1_000))}
    return ApiError(message, status=429, code="rate_limit_exceeded", headers={**headers, **retry})
