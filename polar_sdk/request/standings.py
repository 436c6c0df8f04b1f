"""The state of promises by the ledger, for the path of a request: at most a second old, and read by another thread.

The thread reads while requests come, and ends when none has for a while; the first request after that waits for it, a
fifth of a second at most. If the sink does not answer, its last answer holds for a minute, and after that no promise
holds. Knows no certificate and no store.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from queue import Empty
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary, ref

from polar_sdk.promises.monitor import State
from polar_sdk.serving.threads import Inbox

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_sdk.promises.audit import PromiseStanding
    from polar_sdk.usage import UsageSink

_log: Final = logging.getLogger(__name__)
_READ_SECONDS: Final = 0.5
_STALE_SECONDS: Final = 1.0
_REST_SECONDS: Final = 10.0
"""The thread ends after this time without a request."""
_WAIT_SECONDS: Final = 0.2
TRUST_SECONDS: Final = 60.0
"""After this time in which the sink gave no answer, no promise is trusted."""


class Standings:
    """The standings of promises by one sink."""

    def __init__(self, sink: UsageSink) -> None:
        self._sink = ref(sink)
        self._inbox: Inbox[None] = Inbox("polar-standings")
        self._known: Mapping[str, PromiseStanding] = {}
        self._asked = self._tried = float("-inf")
        self._trusted = time.monotonic()
        """When the sink answered last, or was asked again after a rest."""
        self._fails = False

    def at_risk(self, promise: str) -> bool:
        """Whether a promise is, by its digest; one that was never audited is in force."""
        self._asked = now = time.monotonic()
        if now - self._tried > _STALE_SECONDS and not self._inbox.is_served:
            self._trusted = now
            with suppress(RuntimeError):  # no thread starts at the end of the process
                self._inbox.put(None, self._serve)
            while self._tried < now and time.monotonic() - now < _WAIT_SECONDS:
                time.sleep(0.001)
        if now - self._trusted > TRUST_SECONDS:
            return True
        standing = self._known.get(promise)
        return standing is not None and standing.state is State.AT_RISK

    def doubtful(self, promise: str) -> bool:
        """Whether audits of late speak against a promise, by its digest, as far as is known."""
        standing = self._known.get(promise)
        return standing is not None and standing.doubtful

    def _serve(self) -> None:
        while time.monotonic() - self._asked < _REST_SECONDS and (sink := self._sink()) is not None:
            try:
                self._known = sink.standings()
                self._trusted, self._fails = time.monotonic(), False
            except Exception as error:  # any sink, any error: what it said last holds
                if not self._fails:
                    _log.warning("where promises stand cannot be read now (%s)", error)
                self._fails = True
            del sink
            self._tried = time.monotonic()
            time.sleep(_READ_SECONDS)
        with suppress(Empty):
            while True:
                self._inbox.take()


_STANDINGS: Final[WeakKeyDictionary[UsageSink, Standings]] = WeakKeyDictionary()


def standings_of(sink: UsageSink) -> Standings:
    """The standings of promises by a sink; objects that share the sink share them."""
    return _STANDINGS.setdefault(sink, Standings(sink))
