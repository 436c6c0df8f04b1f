"""API keys with the time that each was last used; never a secret, not even its hash.

A use is a usage record with the key's id as its tag `key`. Looking for the last one of each key reads every record
once: the newest first, some at a time, so that no page waits for it, and later only what is new. Knows no HTML.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import func, select

from polar_billing.access.keys import latest_keys
from polar_billing.budgets.counters import tag_of
from polar_billing.ledger.schema import usage_table

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Connection

    from polar_billing.access.keys import ApiKey
    from polar_billing.ledger.records import AllTenants

_AT_A_TIME: Final = 20_000
"""Older records that one look reads."""
_LATE: Final = 1_000
"""Newer records that are read again: on PostgreSQL another transaction's lower number may be committed later."""


@dataclass(frozen=True)
class KeyUse:
    """A key, and what is known of its use."""

    key: ApiKey
    state: str
    """`active`, or why it opens nothing."""
    last_used: datetime | None
    """When its latest request was served; None where none is known."""
    is_known: bool
    """False while older records have not been read yet, so that None does not mean never."""


class LastUses:
    """When each key was last used, as far as records have been read. For one caller at a time."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], datetime] = {}
        self._read: tuple[int, int] | None = None
        """First and last number that were read."""

    def refresh(self, connection: Connection) -> None:
        """Read what is new, and some of what is older."""
        newest: int = connection.execute(select(func.max(usage_table.c.seq))).scalar() or 0
        first, last = self._read or (newest + 1, newest)
        self._look(connection, last - _LATE, newest)
        older = max(first - _AT_A_TIME, 1)
        self._look(connection, older - 1, first - 1)
        self._read = (min(older, first), newest)

    def _look(self, connection: Connection, after: int, until: int) -> None:
        if after >= until:
            return
        usage, key = usage_table.c, tag_of(connection, "key").label("key_id")
        query = select(usage.tenant, key, func.max(usage.started_at).label("served"))
        query = query.where(usage.seq > after, usage.seq <= until, key.is_not(None)).group_by(usage.tenant, key)
        for tenant, key_id, served in connection.execute(query):
            known = self._known.get((tenant, key_id))
            self._known[tenant, key_id] = served if known is None else max(known, served)

    @property
    def complete(self) -> bool:
        """Whether every record has been read."""
        return self._read is not None and self._read[0] <= 1

    def of(self, key: ApiKey) -> datetime | None:
        """The last use of a key that is known."""
        return self._known.get((key.tenant, key.key_id))


def keys_of(connection: Connection, tenant: str | AllTenants, uses: LastUses, now: datetime) -> list[KeyUse]:
    """The keys of a tenant or of all, those that open something first, then by tenant and name."""
    keys = latest_keys(connection, tenant)
    if not keys:
        return []
    uses.refresh(connection)
    rows = [
        KeyUse(key, key.state(now), served, served is not None or uses.complete)
        for key in keys
        for served in [uses.of(key)]
    ]
    return sorted(rows, key=lambda row: row.state not in {"active", "not yet valid"})  # stable
