"""Stores of replies to repeated requests: the contract, and one for a single process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final, Protocol

_MAX_KEPT_BYTES: Final = 64 * 2**20


class ReplyStore(Protocol):
    """Keeps replies; see `polar_billing.access.replies.Replies`. Calls may take as long as a database does.

    Whoever is told `claimed` calls `keep` or `give_up` afterwards.
    """

    def claim(self, tenant: str, key: str, fingerprint: str) -> tuple[str, bytes | None]:
        """`claimed`, `other`, `running`, or `done` with the answer."""

    def keep(self, tenant: str, key: str, answer: bytes) -> bool:
        """Keep the answer to a claimed request; False while the store cannot, which is to be asked again."""

    def give_up(self, tenant: str, key: str) -> None:
        """A claimed request has no answer to keep."""

    def close(self) -> None:
        """The server ends."""


class MemoryReplies:
    """Replies of one process, for a server without a ledger; the oldest make room for new ones."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[str, bytes | None]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def claim(self, tenant: str, key: str, fingerprint: str) -> tuple[str, bytes | None]:
        """As `ReplyStore`."""
        with self._lock:
            if (tenant, key) not in self._kept:
                self._kept[tenant, key] = (fingerprint, None)
                return "claimed", None
            known, answer = self._kept[tenant, key]
        if known != fingerprint:
            return "other", None
        return "running" if answer is None else "done", answer

    def keep(self, tenant: str, key: str, answer: bytes) -> bool:
        """As `ReplyStore`."""
        with self._lock:
            fingerprint, _ = self._kept[tenant, key]
            self._kept[tenant, key] = (fingerprint, answer)
            self._bytes += len(answer)
            for place, (_, old) in list(self._kept.items()):
                if self._bytes <= _MAX_KEPT_BYTES:
                    break
                if old is not None:
                    del self._kept[place]
                    self._bytes -= len(old)
        return True

    def give_up(self, tenant: str, key: str) -> None:
        """As `ReplyStore`."""
        with self._lock:
            self._kept.pop((tenant, key), None)

    def close(self) -> None:
        """As `ReplyStore`."""
