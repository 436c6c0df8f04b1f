"""Which requests are audited: by a keyed hash of tenant and request id, so that nobody without the key can tell.

Replicas with the same key choose the same requests. The key is 32 random bytes in a file that only its owner may read,
made when it is first needed. Does not know the content of requests.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from platformdirs import user_data_path

from polar_sdk.errors import AuditError, did_you_mean
from polar_sdk.reading import shown

if TYPE_CHECKING:
    from collections.abc import Collection

    from polar_sdk.usage import UsageSink

_log: Final = logging.getLogger(__name__)
DEFAULT_SHARE: Final = 0.005
"""Share of a tier's requests that are audited, where the sink keeps audits and nothing else is asked for. With what
doubts add, audits cost 0.5 to 1.3 % of a tier's compute where nothing is wrong; see `benchmarks/drift.py`."""
_FEWEST: Final = 32
"""Minimum length of a key. Unit: bytes."""


class Selection:
    """Chooses requests with one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def chooses(self, tenant: str, request_id: str, share: float) -> bool:
        """Whether a request is among that share of all; with a larger share it stays among them."""
        name = f"{len(tenant)} {tenant} {request_id}".encode()
        return int.from_bytes(hmac.digest(self._key, name, hashlib.sha256)[:8]) < share * 2**64


def key_path() -> Path:
    """The file of the key where none is named."""
    return user_data_path("polar", appauthor=False) / "audit.key"


def find_key(path: str | Path | None = None) -> bytes:
    """Read the key; the default file is made if it is missing, and where it cannot be, the key is this process's own.

    Raises:
        AuditError: It cannot be read, is too short, or others may read it.
    """
    file = key_path() if path is None else Path(path).expanduser()
    if path is None:
        try:
            if not file.exists():
                _make(file)
        except OSError as error:
            _log.warning("no key of audits can be stored in %s (%s): replicas choose each its own", file, error)
            return secrets.token_bytes(_FEWEST)
    try:
        if os.name == "posix" and (mode := stat.S_IMODE(file.stat().st_mode)) & 0o077:
            raise AuditError(
                f"the key of audits {str(file)!r} has mode {mode:o}, so that others may read it and see which requests "
                f"are audited; run `chmod 600 {file}`, or remove it to have a new one made."
            )
        key = file.read_bytes().strip()
    except OSError as error:
        raise AuditError(
            f"the key of audits {str(file)!r} cannot be read ({error.strerror}); name a file that its owner may read."
        ) from error
    if len(key) < _FEWEST:
        raise AuditError(
            f"the key of audits {str(file)!r} has {len(key)} bytes; it needs {_FEWEST} or more: write random ones, as "
            "`openssl rand -hex 32` makes them."
        )
    return key


def _make(file: Path) -> None:
    """Write a new key; of several processes that do so at once, all read the same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(secrets.token_hex(32) + "\n")
    try:
        with suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink()


def shares_of(
    asked: float | Mapping[str, float] | None, tiers: Collection[str], sink: UsageSink, *, kept: bool
) -> dict[str, float]:
    """The share of each tier's requests that are audited.

    Args:
        asked: One share, or shares by tier; None = the default.
        tiers: Those with a promise that audits can test.
        sink: Where audits go.
        kept: Whether the sink takes any at all.

    Raises:
        AuditError: A share cannot be, a tier is unknown, or a promise is settled from audits that would not be made.
    """
    default = DEFAULT_SHARE if sink.keeps_audits else 0.0
    named = asked if isinstance(asked, Mapping) else {}
    for tier in named:
        if tier not in tiers:
            raise AuditError(
                f"audit_share names the tier {shown(tier)}, of which audits can test nothing here; "
                f"{did_you_mean(str(tier), tiers)}"
            )
    every = default if asked is None or isinstance(asked, Mapping) else asked
    shares = {tier: named.get(tier, every) for tier in tiers}
    for tier, share in shares.items():
        if (
            isinstance(share, bool)
            or not isinstance(share, (int, float))
            or not math.isfinite(share)
            or not 0 <= share <= 1
        ):
            raise AuditError(f"audit_share={shown(share)} is not a share; use a number from 0 to 1, such as 0.01.")
        if share == 0 and tier in sink.settled_tiers:
            raise AuditError(
                f"audit_share is 0 for the tier {tier!r}, whose promise is settled from audits; use a share above 0, "
                "such as 0.01, or take the tier's credits out of the terms in force."
            )
    if asked is not None and not kept and any(shares.values()):
        raise AuditError("audit_share is above 0, but ledger=None keeps no audit; name a ledger, or leave it out.")
    return shares
