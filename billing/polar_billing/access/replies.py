"""Replies to repeated requests: claimed once before they are computed, kept for a while, and given again as they were.

A caller that got no answer sends its request again under the same key. Whoever claims the key first computes; until it
has an answer, everybody else is told to wait, and afterwards gets that answer. One that broke off without an answer
gives its claim up; the claim of a process that is gone expires. Knows no HTTP: an answer is bytes.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from polar_billing.access.keys import ApiKeys
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.schema import reply_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import ColumnElement

KEPT: Final = timedelta(hours=24)
"""How long an answer is kept."""
CLAIMED: Final = timedelta(minutes=15)
"""After this time a claim without an answer is of a process that is gone. Longer than any answer takes."""


class Replies:
    """The replies that a ledger's database keeps. Safe in several threads and processes.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        clock: Returns the time, UTC; None for this machine's.
    """

    def __init__(self, ledger: Ledger | str | None = None, *, clock: Callable[[], datetime] | None = None) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self._now = clock or (lambda: datetime.now(UTC))

    def claim(self, tenant: str, key: str, fingerprint: str) -> tuple[str, bytes | None]:
        """Claim a key for a request, or say what became of the one that has it.

        Args:
            tenant: Whose.
            key: The caller's.
            fingerprint: SHA-256 of the request, hexadecimal.

        Returns:
            `claimed`; `other`: the key belongs to another request; `running`: it is being answered; or `done` and the
            answer.

        Raises:
            StoreError: The ledger cannot be read or written; nothing is claimed.
        """
        now, column = self._now(), reply_table.c
        values = {"tenant": tenant, "key_hash": _hash(key), "fingerprint": fingerprint, "state": "running"}
        values |= {"claimed_at": now, "expires_at": now + CLAIMED}  # type: ignore[dict-item]
        with self.ledger.transaction() as connection:
            connection.execute(delete(reply_table).where(column.expires_at <= now))
            try:
                with connection.begin_nested():
                    connection.execute(insert(reply_table).values(values))
            except IntegrityError:
                row = connection.execute(select(reply_table).where(self._place(tenant, key))).one()
            else:
                return "claimed", None
        if row.fingerprint != fingerprint:
            return "other", None
        return row.state, None if row.answer is None else bytes(row.answer)

    def keep(self, tenant: str, key: str, answer: bytes) -> None:
        """Keep the answer to a claimed request."""
        values = {"state": "done", "answer": answer, "expires_at": self._now() + KEPT}
        with self.ledger.transaction() as connection:
            connection.execute(update(reply_table).where(self._place(tenant, key)).values(values))

    def give_up(self, tenant: str, key: str) -> None:
        """A claimed request has no answer to keep: it may be tried again."""
        with self.ledger.transaction() as connection:
            connection.execute(delete(reply_table).where(self._place(tenant, key), reply_table.c.state == "running"))

    @staticmethod
    def _place(tenant: str, key: str) -> ColumnElement[bool]:
        return (reply_table.c.tenant == tenant) & (reply_table.c.key_hash == _hash(key))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def open_access(url: str | None) -> tuple[ApiKeys, Replies]:
    """The keys and the replies of a ledger, for a server that found this function by its entry point.

    Args:
        url: As for `Ledger`.
    """
    ledger = Ledger(url)
    return ApiKeys(ledger), Replies(ledger)
