"""Replies to repeated requests: claimed once before they are computed, kept for a while, and sent again unchanged.

A caller that got no answer sends its request again under the same key. The first call to claim the key computes; until
it has an answer, all others must wait, and afterwards they get that answer. A call that ended without an answer
releases its claim.

A claim is a lease, as a hold is (`budgets.leases`): it lives for a minute by the database's clock, and its process
renews it while it computes. So a long answer keeps its claim, and that of a killed process is free after a minute.
While the database does not answer, the process continues, and claims again or keeps the answer once it does. Only if
the database was unavailable for longer than a claim lives, and another process claimed first, are both computed; the
one with the claim keeps its answer. Knows no HTTP: an answer is bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from polar_billing.access.accounts import Accounts
from polar_billing.access.alerts import Alerts, Webhook
from polar_billing.access.keys import ApiKeys
from polar_billing.access.rates import Rates
from polar_billing.errors import BillingError
from polar_billing.ledger.clock import database_time
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import source_named
from polar_billing.ledger.schema import reply_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy import Connection

KEPT: Final = timedelta(hours=24)
"""How long an answer is kept."""
CLAIM_LIFETIME: Final = timedelta(minutes=1)
"""After this time a claim that nobody renewed is of a process that is gone."""
_RENEWALS: Final = 6
"""How often a claim is renewed in its lifetime, so that it outlives four renewals that fail."""
_PATIENCE_S: Final = 900.0
"""How long an answer waits for a database that does not take it. Unit: seconds."""
_log: Final = logging.getLogger("polar_billing")


@dataclass(eq=False)
class _Claim:
    """A claim of this process."""

    seq: int
    """Number of its row: another claim of the same key has another one."""
    tenant: str
    key_hash: str
    fingerprint: str
    answer: bytes | None = None
    """The answer to keep; None while it is computed."""
    answered_at: float = 0.0
    """When the answer was there. Unit: seconds of `time.monotonic`."""

    @property
    def place(self) -> tuple[str, str]:
        """The key that is claimed."""
        return self.tenant, self.key_hash


class Replies:
    """The replies that a ledger's database keeps. Safe in several threads and processes.

    A caller that gets `claimed` calls `keep` or `give_up`; until then its claim is renewed.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        source: The service that answers; its replicas share keys, and other services do not. None for the name in
            `POLAR_SOURCE`, or else `polar`.
        lifetime: How long until a claim that nobody renewed expires.
        clock: Returns the time, UTC; None for the database's clock, see `ledger.clock`.
    """

    def __init__(
        self,
        ledger: Ledger | str | None = None,
        *,
        source: str | None = None,
        lifetime: timedelta = CLAIM_LIFETIME,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.source = source_named(source)
        self.lifetime = lifetime
        self._clock = clock
        self._start_anew()

    def _start_anew(self) -> None:
        """Start with no claims: at first, and in a forked child, whose parent renews its own."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        """Guards the two below; held for moments only."""
        self._claims: dict[tuple[str, str], _Claim] = {}
        self._renewing: tuple[threading.Thread, threading.Event] | None = None
        """The thread that renews, and what ends it; None = there is none."""
        self._writing = threading.Lock()
        """Held while claims of this process are renewed, kept or given up in the database: in one order for all."""

    def claim(self, tenant: str, key: str, fingerprint: str) -> tuple[str, bytes | None]:
        """Claim a key for a request of this fingerprint, or say what became of the one that has it.

        Returns:
            `claimed`; `other`: the key belongs to another request; `running`: it is being answered; or `done` and the
            answer.

        Raises:
            StoreError: The ledger cannot be read or written; nothing is claimed.
        """
        if self._process != os.getpid():
            self._start_anew()
        claim = _Claim(0, tenant, self._hash(key), fingerprint)
        with self._lock:
            mine = self._claims.get(claim.place)
        if mine is not None:  # whatever the database says: this process knows that it lives
            return _state(mine.fingerprint == fingerprint, mine.answer)
        with self.ledger.transaction() as connection:
            now = self._time(connection)
            connection.execute(delete(reply_table).where(reply_table.c.expires_at <= now))
            if not self._insert(connection, claim, now):
                column = reply_table.c
                query = select(reply_table).where(column.tenant == tenant, column.key_hash == claim.key_hash)
                row = connection.execute(query).one_or_none()
                # None: another process has just given it up, and may be asked again
                return ("running", None) if row is None else _state(row.fingerprint == fingerprint, row.answer)
        self._renew_from_now_on(claim)
        return "claimed", None

    def keep(self, tenant: str, key: str, answer: bytes) -> bool:
        """Keep the answer to a claimed request; if the database does not take it now, it is kept when it does.

        Returns:
            False while it waits for that; call again to hear of it.
        """
        with self._lock:
            claim = self._claims.get((tenant, self._hash(key)))
        if claim is None:  # it is kept by now; or it was lost: another process has claimed, and answers
            return True
        claim.answer, claim.answered_at = answer, time.monotonic()
        try:
            self._store([claim])
        except BillingError as error:
            _log.warning("an answer to a repeated request could not be kept now (%s)", error)
            return False
        return True

    def give_up(self, tenant: str, key: str) -> None:
        """A claimed request has no answer to keep: it may be tried again, at the latest when its claim expires."""
        with self._lock:
            claim = self._claims.pop((tenant, self._hash(key)), None)
        if claim is None:
            return
        try:
            with self._writing, self.ledger.transaction() as connection:
                connection.execute(delete(reply_table).where(*_of(claim)))
        except BillingError as error:
            _log.warning("a claim could not be released now (%s); it expires within %s", error, self.lifetime)

    def renew(self) -> None:
        """Renew the claims of this process now, and keep the answers that wait; a thread does so as long as needed."""
        with self._lock:
            claims = list(self._claims.values())
        if claims:
            self._store(claims)

    def _store(self, claims: list[_Claim]) -> None:
        """Renew claims, or keep their answers; claim again what expired meanwhile, if nobody else has."""
        with self._writing:
            claims = sorted((claim for claim in claims if self._has(claim)), key=lambda claim: claim.place)
            with self.ledger.transaction() as connection:
                ended = self._write(connection, claims)
            with self._lock:
                for claim in ended:
                    if self._has(claim):
                        del self._claims[claim.place]

    def _has(self, claim: _Claim) -> bool:
        return self._claims.get(claim.place) is claim

    def _write(self, connection: Connection, claims: list[_Claim]) -> list[_Claim]:
        """Write claims or their answers; returns those that need no more writing."""
        now, ended = self._time(connection), []
        renewed = self._extend(connection, {claim.seq for claim in claims if claim.answer is None}, now)
        for claim in claims:
            if (answer := claim.answer) is None:
                written = claim.seq in renewed
            else:
                kept = {"state": "done", "answer": answer, "expires_at": now + KEPT}
                written = connection.execute(update(reply_table).where(*_of(claim)).values(kept)).rowcount > 0
            lost = not written and not self._insert(connection, claim, now)
            if lost:
                _log.warning("a claim of tenant %r expired, and another process has it: both answer", claim.tenant)
            if lost or answer is not None:
                ended.append(claim)
        return ended

    def _extend(self, connection: Connection, seqs: set[int], now: datetime) -> set[int]:
        """Renew the rows that are there; returns their numbers."""
        if not seqs:
            return set()
        rows = (reply_table.c.seq.in_(sorted(seqs)), reply_table.c.state == "running")
        changed = update(reply_table).where(*rows).values(expires_at=now + self.lifetime)
        return set(connection.execute(changed.returning(reply_table.c.seq)).scalars())

    def _insert(self, connection: Connection, claim: _Claim, now: datetime) -> bool:
        """Write the row of a claim; False if another one is there."""
        values: dict[str, Any] = {"tenant": claim.tenant, "key_hash": claim.key_hash, "fingerprint": claim.fingerprint}
        if claim.answer is None:
            values |= {"state": "running", "claimed_at": now, "expires_at": now + self.lifetime}
        else:
            values |= {"state": "done", "answer": claim.answer, "claimed_at": now, "expires_at": now + KEPT}
        added = insert(reply_table).values(values).returning(reply_table.c.seq)
        try:
            with connection.begin_nested():
                claim.seq = connection.execute(added).scalar_one()
        except IntegrityError:
            return False
        return True

    def _hash(self, key: str) -> str:
        return hashlib.sha256(f"{self.source}\0{key}".encode("utf-8", "surrogatepass")).hexdigest()

    def _time(self, connection: Connection) -> datetime:
        return database_time(connection, writes=True) if self._clock is None else self._clock()

    def _renew_from_now_on(self, claim: _Claim) -> None:
        with self._lock:
            self._claims[claim.place] = claim
            if self._renewing is None:
                stop = threading.Event()
                self._renewing = threading.Thread(target=self._run, args=[stop], name="polar-claim", daemon=True), stop
                self._renewing[0].start()

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self.lifetime.total_seconds() / _RENEWALS):
            with self._lock:
                since = time.monotonic() - _PATIENCE_S
                for place, claim in list(self._claims.items()):
                    if claim.answer is not None and claim.answered_at < since:
                        del self._claims[place]
                if not self._claims:
                    if not stop.is_set():  # else another one may have taken over
                        self._renewing = None
                    return
            try:
                self.renew()
            except BillingError as error:
                _log.warning("claims could not be renewed now (%s)", error)
            except Exception:  # whatever happened, the others must be renewed
                _log.exception("renewing claims failed")

    def close(self) -> None:
        """Renew nothing more, try once more to keep the answers that wait, and release the ledger's connections."""
        if self._process != os.getpid():
            return
        with self._lock:
            renewing, self._renewing = self._renewing, None
            waiting = [claim for claim in self._claims.values() if claim.answer is not None]
        if renewing is not None:
            renewing[1].set()
            renewing[0].join()
        if waiting:
            try:
                self._store(waiting)
            except BillingError as error:
                _log.warning("%d answers to repeated requests are not kept (%s)", len(waiting), error)
        self.ledger.close()


def _state(same: bool, answer: bytes | None) -> tuple[str, bytes | None]:
    if not same:
        return "other", None
    return ("running", None) if answer is None else ("done", bytes(answer))


def _of(claim: _Claim) -> tuple[Any, Any]:
    """The row of this very claim, while it has no answer."""
    return reply_table.c.seq == claim.seq, reply_table.c.state == "running"


def open_access(url: str | None) -> tuple[ApiKeys, Replies, Accounts, Rates, Callable[[str, Path], Alerts]]:
    """Open the stores of a ledger for a server, which finds this function by its entry point."""
    ledger = Ledger(url)

    def alerts(webhook: str, secret_file: Path) -> Alerts:
        return Alerts(ledger, Webhook.of(webhook, secret_file))

    return ApiKeys(ledger), Replies(ledger), Accounts(ledger), Rates(ledger), alerts
