"""The stores of a ledger as the server sees them: API keys, their use, accounts of tenants, and replies.

They come from the package that registers them under the entry point `polar_server.access`, and may take as long as a
database does. Knows no database; only replies also have a store here, for a server without a ledger.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Protocol

from polar_sdk.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

GROUP: Final = "polar_server.access"
_MAX_KEPT_BYTES: Final = 64 * 2**20


class Key(Protocol):
    """An API key as its store returns it; see `polar_billing.access.keys.ApiKey`."""

    @property
    def key_id(self) -> str:
        """The public part."""

    @property
    def tenant(self) -> str:
        """The tenant that is billed."""

    @property
    def secret_hash(self) -> str:
        """SHA-256 of the secret, hexadecimal."""

    @property
    def tags(self) -> Mapping[str, str]:
        """On every usage record of it."""

    @property
    def scopes(self) -> Sequence[str]:
        """Its scopes."""

    @property
    def models(self) -> Sequence[str]:
        """Ids of models; empty = any."""

    @property
    def tiers(self) -> Sequence[str]:
        """Tiers; empty = any."""

    @property
    def max_tokens(self) -> int | None:
        """Longest answer. Unit: tokens."""

    @property
    def requests_per_minute(self) -> int | None:
        """Requests per minute; None = any number."""

    @property
    def tokens_per_minute(self) -> int | None:
        """Tokens per minute, prompt and answer; None = any number."""

    @property
    def parallel(self) -> int | None:
        """Answers at a time; None = any number."""

    def state(self, at: datetime) -> str:
        """`active`, or why it opens nothing."""


class AccountStore(Protocol):
    """A tenant's view of itself; see `polar_billing.access.accounts`. Takes as long as a database does."""

    def usage(
        self,
        tenant: str,
        *,
        by: Sequence[str] = ...,
        month: str | None = ...,
        since: str | None = ...,
        until: str | None = ...,
        zone: str = ...,
        currency: str | None = ...,
    ) -> dict[str, Any]:
        """Usage and spend in a period; a `ValueError` says what is wrong with the question."""

    def receipt(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """The receipt of a request; None if the tenant has no such request."""


class KeyStore(Protocol):
    """Keeps API keys."""

    def find(self, key_id: str) -> Key | None:
        """The key of an id, active or not; may take as long as a database does."""

    def any_active(self, scope: str | None = None) -> bool:
        """Whether there is a key that opens something, or this."""


class Verdict(Protocol):
    """The decision on a call; see `polar_billing.access.rates.Verdict`."""

    @property
    def refused(self) -> str | None:
        """The limit that is reached: `requests`, `tokens` or `parallel`; None = it is let in."""

    @property
    def wait_s(self) -> float:
        """When to ask again. Unit: seconds."""

    @property
    def left(self) -> Mapping[str, tuple[float, float]]:
        """Rest of `requests` and `tokens`, and the seconds until each is full."""


class RateStore(Protocol):
    """The store of keys' use; see `polar_billing.access.rates.Rates`. Called by one thread at a time."""

    def update(
        self, asking: Sequence[Key], used: Sequence[tuple[Key, int]], running: Mapping[str, int]
    ) -> Sequence[Verdict]:
        """Let calls in, in their order, and note what answers used and how many run; an error lets none in."""


class ReplyStore(Protocol):
    """Keeps replies; see `polar_billing.access.replies.Replies`. Calls may take as long as a database does.

    A caller that gets `claimed` calls `keep` or `give_up` afterwards.
    """

    def claim(self, tenant: str, key: str, fingerprint: str) -> tuple[str, bytes | None]:
        """`claimed`, `other`, `running`, or `done` with the answer."""

    def keep(self, tenant: str, key: str, answer: bytes) -> bool:
        """Keep the answer to a claimed request; False while the store cannot, which is to be asked again."""

    def give_up(self, tenant: str, key: str) -> None:
        """A claimed request has no answer to keep."""

    def close(self) -> None:
        """The server ends."""


class AlertSender(Protocol):
    """Tells a webhook of promises whose state has changed; see `polar_billing.access.alerts`."""

    def start(self, is_unusual: Callable[[], bool]) -> None:
        """Begin, in a thread of its own; `is_unusual` says whether this process finds its prompts unusual."""

    def close(self) -> None:
        """The server ends."""


@dataclass(frozen=True)
class Access:
    """The stores that a server with a ledger has.

    Attributes:
        keys: API keys.
        replies: Answers to repeated requests.
        accounts: What tenants may know of themselves.
        rates: The use of keys' limits.
        alerts: From the URL of a webhook and the file of its secret to what tells it.
    """

    keys: KeyStore
    replies: ReplyStore
    accounts: AccountStore
    rates: RateStore
    alerts: Callable[[str, Path], AlertSender]


def find_installed(group: str, *arguments: Any) -> Any | None:
    """Call what an installed distribution registered under an entry point; None if none did, or it cannot run.

    Args:
        group: Of the entry point, whose name is `default`.
        *arguments: What it is called with.
    """
    for entry in entry_points(group=group, name="default"):
        try:
            return entry.load()(*arguments)
        except ModuleNotFoundError:  # registered by this distribution, but the extra is not installed
            return None
    return None


def find_access(url: str | None) -> Access:
    """The stores that are installed.

    Args:
        url: The ledger; None for the default one.

    Raises:
        MissingExtraError: None are.
    """
    stores = find_installed(GROUP, url)
    if stores is not None:
        return Access(*stores)
    raise MissingExtraError(
        "API keys need a ledger, and none is installed.",
        hint="Install the extra billing of polar-llm, in a clone: `pip install '.[billing]'`.",
    )


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
