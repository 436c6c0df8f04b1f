"""API keys: looked up and checked, and what each allows.

A key that is sent counts, even if none is needed: a wrong one is refused, and a valid one determines who is billed and
what is allowed. A result is cached for five seconds, found or not, so that a revoked key is refused everywhere within
that time and an unknown one costs one look-up. Knows HTTP headers, and no database.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

from polar_server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polar_server.access.stores import Key, KeyStore

FRESH_S: Final = 5.0
"""How long a look-up is good. Unit: seconds."""
KeyRule = Literal["always", "forwarded", "never"]
"""The calls that need a key: all; those that did not come straight from this machine; none."""
LOCAL_HOST: Final = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
"""A `host` header that names this machine."""
_PLACEHOLDERS: Final = frozenset({"", "none", "no-key", "empty", "unused", "not-needed", "sk-no-key-required"})
"""No key, as clients write it that do not go without one; in lower case."""
_PROXIES: Final = frozenset({"forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"})
"""Headers that proxies add, beside those that begin with `x-forwarded-`."""
_REMEMBERED: Final = 10_000
_TEXT: Final = re.compile(r"pk_([a-z0-9]{4,16})_([A-Za-z0-9_-]{20,100})")


class KeyGuard:
    """Finds the key of a call, and refuses calls that need one and have none.

    Args:
        store: Where keys are kept; None = there are none, so that none is valid.
        rule: Which calls need one.
        clock: Returns seconds that only rise.
    """

    def __init__(
        self, store: KeyStore | None, rule: KeyRule = "always", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._rule, self.clock = store, rule, clock
        self._found: OrderedDict[str, tuple[float, Key | None]] = OrderedDict()

    async def check(
        self, headers: Mapping[str, str], scope: str, *, peer: str | None = None, browser: bool = False
    ) -> Key | None:
        """The key of a call, which may do what the call wants; None if the call has none and needs none.

        Args:
            headers: Of the call.
            scope: What it needs: `infer`, `usage:read`, `metrics` or `dashboard`.
            peer: Address that the call came from; None = a socket of this machine.
            browser: Let a browser ask its user for the key: as a password, with any name.

        Raises:
            ApiError: 401 with a key that is not valid, or without one that is needed; 403 with one that may not do
                this.
        """
        given = _given(headers, browser=browser)
        how = "as the password, with any name" if browser else "as `Authorization: Bearer pk_…`"
        if given is None:
            if self._rule == "never" or (self._rule == "forwarded" and _is_local(headers, peer)):
                return None
            why = " (it did not come straight from this machine)" if self._rule == "forwarded" else ""
            raise _unauthorised(f"the call needs an API key{why}; pass it {how}.", browser=browser)
        match = _TEXT.fullmatch(given)
        key = None if match is None else await self._find(match[1])
        if match is None or key is None or not _opens(key, match[2]):
            else_none = "" if self._rule == "always" else ", or none at all"
            raise _unauthorised(f"the API key is unknown or wrong; pass a valid one {how}{else_none}.", browser=browser)
        if (state := key.state(datetime.now(UTC))) != "active":
            raise _unauthorised(f"API key {key.key_id} is {state}; ask for a new one.", browser=browser)
        if scope not in key.scopes:
            raise ApiError(f"API key {key.key_id} lacks the scope {scope}.", status=403, code="insufficient_scope")
        return key

    async def _find(self, key_id: str) -> Key | None:
        now = self.clock()
        known = self._found.get(key_id)
        if known is not None and now - known[0] < FRESH_S:
            return known[1]
        key = None if self._store is None else await asyncio.to_thread(self._store.find, key_id)
        self._found[key_id] = (now, key)
        self._found.move_to_end(key_id)
        if len(self._found) > _REMEMBERED:
            self._found.popitem(last=False)
        return key


def _given(headers: Mapping[str, str], *, browser: bool) -> str | None:
    """The key of a call as it was sent; None if there is none."""
    kind, _, text = headers.get("authorization", "").partition(" ")
    if browser and kind.lower() == "basic":
        text = _password(text)
    elif kind.lower() != "bearer":
        return None
    return None if text.strip().lower() in _PLACEHOLDERS else text.strip()


def _is_local(headers: Mapping[str, str], peer: str | None) -> bool:
    """Whether a call came straight from this machine: from its address, to its name, and through no proxy."""
    if any(name.startswith("x-forwarded-") or name in _PROXIES for name in headers):
        return False
    if LOCAL_HOST.fullmatch(headers.get("host", "localhost")) is None:
        return False
    try:
        return peer is None or ipaddress.ip_address(peer).is_loopback
    except ValueError:
        return False


def _opens(key: Key, secret: str) -> bool:
    return hmac.compare_digest(hashlib.sha256(secret.encode()).hexdigest(), key.secret_hash)


def _password(encoded: str) -> str:
    """The password of HTTP's basic scheme; empty if that is not what was sent."""
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _unauthorised(message: str, *, browser: bool = False) -> ApiError:
    asks = 'Basic realm="PoLar", charset="UTF-8"' if browser else "Bearer"
    return ApiError(message, status=401, code="invalid_api_key", headers={"www-authenticate": asks})
