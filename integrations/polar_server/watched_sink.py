"""A sink that wraps the model's own: it sees which requests are admitted with which program and what was recorded.

So the server knows the program of an answer before its first token, and counts requests whose record is not yet stored.
The record of a finished answer may be held back until the answer is safe, so that nothing is billed as completed that
is lost with the process: until then, the marks of the request state what it used.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol

from polar_sdk.usage import ForwardingSink, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from polar_sdk.usage import Offer, Receipt, UsageBound, UsageRecord, UsageSink


class Watcher(Protocol):
    """Hears what becomes of one request."""

    @property
    def holds_back(self) -> bool:
        """Whether its record, if it was completed, is stored by `WatchedSink.store_held` alone."""

    def admitted(self, bound: UsageBound, offer: Offer) -> None:
        """It may run, by this offer; an error refuses it after all."""

    def recorded(self, record: UsageRecord, receipt: Receipt | None) -> None:
        """It ended, and its record is stored or held back."""


_log: Final = logging.getLogger("polar_server")
_watcher: Final[ContextVar[Watcher | None]] = ContextVar("polar_server_watcher", default=None)
"""The watcher of the request that is being made here."""


class WatchedSink(ForwardingSink):
    """Passes every call on to another sink, and tells the watcher of the request.

    Attributes:
        inner: The sink that stores.
        on_record: Called with every record that is stored.
    """

    def __init__(self, inner: UsageSink) -> None:
        super().__init__(inner)
        self.on_record: Callable[[UsageRecord], object] = lambda _: None
        self._watchers: dict[str, Watcher] = {}
        self._held: dict[str, UsageRecord] = {}
        """Records that are held back."""
        self._due: set[str] = set()
        self._lock = threading.Lock()

    @property
    def due(self) -> frozenset[str]:
        """Ids of the requests that were admitted and whose record is not stored yet."""
        with self._lock:
            return frozenset(self._due)

    @contextmanager
    def watched_by(self, watcher: Watcher) -> Iterator[None]:
        """Tell `watcher` what becomes of the request that this thread makes in the block."""
        token = _watcher.set(watcher)
        try:
            yield
        finally:
            _watcher.reset(token)

    def reserve(self, bound: UsageBound) -> int:
        """As the inner sink; a watcher that then refuses has the hold released."""
        chosen = super().reserve(bound)
        watcher = _watcher.get()
        if watcher is not None:
            try:
                watcher.admitted(bound, bound.offers[chosen])
            except BaseException:
                self.inner.release(bound.tenant, bound.request_id)
                raise
        with self._lock:
            self._due.add(bound.request_id)
            if watcher is not None:
                self._watchers[bound.request_id] = watcher
        return chosen

    def release(self, tenant: str, request_id: str) -> None:
        """As the inner sink."""
        super().release(tenant, request_id)
        self._done(request_id)

    def emit(self, record: UsageRecord) -> Receipt | None:
        """As the inner sink; where that raises, the record stays due. Or hold it back, and say what it will cost."""
        watcher, receipt = self._watchers.get(record.request_id), None
        if watcher is not None and watcher.holds_back and record.outcome is Outcome.COMPLETED:
            receipt = self.inner.receipt(record)
        if receipt is None:
            receipt = self._store(record)
        else:
            with self._lock:
                self._held[record.request_id] = record
        if watcher is not None:
            watcher.recorded(record, receipt)
        return receipt

    def store_held(self, request_ids: Iterable[str]) -> None:
        """Store records that were held back; what cannot be stored stays due."""
        for request_id in request_ids:
            if (record := self._held.get(request_id)) is not None:
                try:
                    self._store(record)
                except Exception:  # any sink, any error: the other records must be stored
                    _log.exception("the usage record of request %s could not be stored", request_id)

    def close(self) -> None:
        """As the inner sink, which gets what was held back first."""
        self.store_held(list(self._held))
        super().close()

    def _store(self, record: UsageRecord) -> Receipt | None:
        receipt = super().emit(record)
        self._done(record.request_id)
        self.on_record(record)
        return receipt

    def _done(self, request_id: str) -> None:
        with self._lock:
            self._due.discard(request_id)
            self._held.pop(request_id, None)
            self._watchers.pop(request_id, None)
