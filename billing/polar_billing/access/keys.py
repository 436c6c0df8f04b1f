"""API keys: created, found, rotated and revoked. Every such step is a separate row, and a link of the tenant's chain.

A key reads `pk_<id>_<secret>`. The secret is 32 random bytes, so a plain SHA-256 of it cannot be reversed; slow hashes
are for passwords. It is shown once, and only its hash is stored. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, insert, select

from polar_billing.errors import AccessError
from polar_billing.ledger import chain
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, AllTenants
from polar_billing.ledger.schema import api_key_table
from polar_sdk.usage import flaw_of_name, flaw_of_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection, Row

SCOPES: Final = ("infer", "usage:read", "metrics", "dashboard")
"""Scopes of keys: answers and models, its tenant's usage, the server's figures, and the operations page of all."""
_ALPHABET: Final = "abcdefghijkmnpqrstuvwxyz23456789"
_NAME: Final = re.compile(r"[^\s]{1,200}")
_LIMITS: Final = ("max_tokens", "requests_per_minute", "tokens_per_minute", "parallel")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """An API key: its tenant, bounds and limits.

    Attributes:
        key_id: The public part.
        tenant: Who is billed.
        name: What people call it.
        secret_hash: SHA-256 of the secret, hexadecimal.
        tags: On every usage record of it; the server adds the tag `key`.
        scopes: Some of `SCOPES`.
        models: Ids of models; empty = any.
        tiers: Tiers; empty = any.
        max_tokens: Longest answer. Unit: tokens.
        requests_per_minute: Requests per minute.
        tokens_per_minute: Prompt and answer together. Unit: tokens per minute.
        parallel: Answers at a time.
        not_before: From when on it opens anything.
        expires_at: From when on it opens nothing any more; None = never.
        rotated_from: The key that it follows.
        revoked: Whether it was taken back.
    """

    key_id: str
    tenant: str
    name: str
    secret_hash: str
    tags: Mapping[str, str] = field(default_factory=dict)
    scopes: tuple[str, ...] = ("infer",)
    models: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    max_tokens: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel: int | None = None
    not_before: datetime
    expires_at: datetime | None = None
    rotated_from: str | None = None
    revoked: bool = False

    def check(self) -> None:
        """Refuse what no request could have.

        Raises:
            AccessError: A name, scope or limit is not valid.
        """
        self._check_names()
        if "key" in self.tags:
            raise AccessError("the tag 'key' is set by the server; choose another name.")
        unknown = sorted(set(self.scopes) - set(SCOPES)) or ([] if self.scopes else [""])
        if unknown:
            raise AccessError(f"scope {unknown[0]!r} is unknown; use {', '.join(SCOPES)}.")
        for listed in (*self.models, *self.tiers):
            if not _NAME.fullmatch(listed):
                raise AccessError(f"{listed[:40]!r} is not a valid name of a model or tier; a name has no blanks.")
        for limit in _LIMITS:
            value = getattr(self, limit)
            if value is not None and not 1 <= value < 2**31:
                raise AccessError(f"{limit}={value} is out of range; use 1 or more, or leave it out.")

    def _check_names(self) -> None:
        for what, name in (("tenant", self.tenant), ("name", self.name), *(("tag", tag) for tag in self.tags)):
            flaw = "is empty or too long" if not 1 <= len(name) <= 200 else flaw_of_name(name)
            if flaw is not None:
                raise AccessError(f"the {what} {name[:40]!r} of the key {flaw}; change it.")
        for tag, value in self.tags.items():
            if (flaw := flaw_of_text(value)) is not None:
                raise AccessError(f"the value of tag {tag!r}, {value[:40]!r}, {flaw}; remove it.")

    def state(self, at: datetime) -> str:
        """`active`, `revoked`, `expired` or `not yet valid`."""
        if self.revoked:
            return "revoked"
        if self.expires_at is not None and at >= self.expires_at:
            return "expired"
        return "active" if at >= self.not_before else "not yet valid"


class ApiKeys:
    """The keys of a ledger. Safe in several threads and processes.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        clock: Returns the time, UTC; None for this machine's.
    """

    def __init__(self, ledger: Ledger | str | None = None, *, clock: Callable[[], datetime] | None = None) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self._now = clock or (lambda: datetime.now(UTC))

    def create(
        self, tenant: str, name: str, *, expires_in: timedelta | None = None, **bounds: Any
    ) -> tuple[ApiKey, str]:
        """Make a key.

        Args:
            tenant: Who is billed.
            name: What people call it.
            expires_in: How long it is good; None = until it is revoked.
            **bounds: Further fields of `ApiKey`.

        Returns:
            The key, and the text that opens it, which nobody can find out again.
        """
        now = self._now()
        key, text = _new(tenant, name, now, None if expires_in is None else now + expires_in, bounds)
        with self.ledger.transaction() as connection:
            _write(connection, key, now)
        return key, text

    def find(self, key_id: str) -> ApiKey | None:
        """The key of an id as it is in force now; revoked and expired ones as well."""
        column = api_key_table.c
        query = select(api_key_table).where(column.key_id == key_id).order_by(column.seq.desc()).limit(1)
        with self.ledger.snapshot() as connection:
            row = connection.execute(query).first()
        return None if row is None else _key(row)

    def all(self, tenant: str | AllTenants) -> list[ApiKey]:
        """The keys of a tenant, or of all of them, in the order in which they were made."""
        with self.ledger.snapshot() as connection:
            return latest_keys(connection, tenant)

    def any_active(self, scope: str | None = None) -> bool:
        """Whether there is a key that opens something now; with a `scope`, one that opens that."""
        now = self._now()
        with self.ledger.snapshot() as connection:
            active = (key for key in latest_keys(connection, ALL_TENANTS) if key.state(now) == "active")
            return any(scope is None or scope in key.scopes for key in active)

    def rotate(self, key_id: str, overlap: timedelta) -> tuple[ApiKey, str]:
        """Make a key that may do the same, and let the old one expire after an overlap.

        Raises:
            AccessError: There is no such key, or it is not active.
        """
        old, now = self._known(key_id), self._now()
        if (state := old.state(now)) != "active":
            raise AccessError(f"key {key_id!r} is {state}; create a new one.")
        until = now + overlap
        bounds = {name: getattr(old, name) for name in ("tags", "scopes", "models", "tiers", *_LIMITS)}
        new, text = _new(old.tenant, old.name, now, old.expires_at, {**bounds, "rotated_from": old.key_id})
        ending = replace(old, expires_at=until if old.expires_at is None else min(until, old.expires_at))
        with self.ledger.transaction() as connection:  # both or none: an old key must not stay good for ever
            _write(connection, new, now)
            _write(connection, ending, now)
        return new, text

    def revoke(self, key_id: str) -> ApiKey:
        """Take a key back, from now on."""
        key = replace(self._known(key_id), revoked=True)
        with self.ledger.transaction() as connection:
            _write(connection, key, self._now())
        return key

    def _known(self, key_id: str) -> ApiKey:
        key = self.find(key_id)
        if key is None:
            raise AccessError(f"there is no key {key_id[:20]!r}; see `polar key list`.")
        return key


def _new(
    tenant: str, name: str, now: datetime, expires_at: datetime | None, bounds: Mapping[str, Any]
) -> tuple[ApiKey, str]:
    """A key with a new id and secret, and the text that opens it."""
    secret = secrets.token_urlsafe(32)
    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(8))
    key = ApiKey(
        key_id=key_id,
        tenant=tenant,
        name=name,
        secret_hash=hashlib.sha256(secret.encode()).hexdigest(),
        **{"not_before": now, "expires_at": expires_at, **bounds},
    )
    key.check()
    return key, f"pk_{key_id}_{secret}"


def _write(connection: Connection, key: ApiKey, now: datetime) -> None:
    """Put a key in force as it is now, as a link of its tenant's chain."""
    chain.lock_heads(connection, {key.tenant})
    values = {**vars(key), "revoked": int(key.revoked), "set_at": now}
    for listed in ("scopes", "models", "tiers"):
        values[listed] = " ".join(values[listed])
    seq = connection.execute(insert(api_key_table).values(values).returning(api_key_table.c.seq)).scalar_one()
    chain.link(connection, api_key_table, seq)


def latest_keys(connection: Connection, tenant: str | AllTenants) -> list[ApiKey]:
    """The keys of a tenant, or of all of them, as they are in force; by tenant and name."""
    column = api_key_table.c
    last = select(func.max(column.seq)).group_by(column.key_id)
    query = select(api_key_table).where(column.seq.in_(last)).order_by(column.tenant, column.name, column.seq)
    if not isinstance(tenant, AllTenants):
        query = query.where(column.tenant == tenant)
    return list(map(_key, connection.execute(query)))


def _key(row: Row[Any]) -> ApiKey:
    values = dict(row._mapping)
    for unused in ("seq", "set_at"):
        values.pop(unused)
    for listed in ("scopes", "models", "tiers"):
        values[listed] = tuple(values[listed].split())
    return ApiKey(**{**values, "revoked": bool(values["revoked"])})
