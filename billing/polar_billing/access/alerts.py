"""Alerts: a webhook is notified of each change of a promise's state, until it accepts the alert.

A change is a row of `polar_standing`; a new promise, which is in force, is not a change. Servers of the ledger look for
undelivered changes in a separate thread: one replica at a time tries each of them, by a row of `polar_alert`, so that a
killed replica leaves it to the others. Anything but a 2xx answer is tried again after 2, 4, 8 … seconds, for about half
a day. A call to the webhook times out after some seconds, redirects are not followed, and the content of an answer is
not read.

If one process serves full depth because it finds its prompts unlike those of the calibration, no promise changes and
nothing is in the ledger: that process sends the alert itself, with the same retries, as long as it lives.

A call is a POST of one JSON object, with `Polar-Signature: t=SECONDS,v1=HEX`, where HEX is the HMAC-SHA256, by the
shared secret, over the seconds since 1970, a full stop and the body. The same alert may be sent twice, with the same
`id`. Knows no prices, and not how a state follows from audits.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import logging
import secrets
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

from sqlalchemy import exists, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from polar_billing.errors import AccessError, BillingError
from polar_billing.ledger.clock import database_time
from polar_billing.ledger.schema import alert_table, standing_table
from polar_billing.values.canonical import canonical_json
from polar_sdk.promises.monitor import State
from polar_sdk.reading import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Connection, Row

    from polar_billing.ledger.ledger import Ledger

SECRET_BYTES_MIN: Final = 16
SIGNATURE: Final = "Polar-Signature"
_log: Final = logging.getLogger("polar_billing")
_EVERY_S: Final = 1.0
"""How often changes are looked for. Unit: seconds."""
_PATIENCE_S: Final = 10.0
"""How long a call may take. Unit: seconds."""
_CLOSE_S: Final = 2.0
_LEASE: Final = timedelta(seconds=3 * _PATIENCE_S)
"""After this, an attempt whose end was not noted has lost its process."""
_ATTEMPTS: Final = 22
_LONGEST_WAIT_S: Final = 3_600
_NOTICES: Final = 100
"""Maximum number of a process's own notices that wait; the oldest one goes first."""
_UNUSUAL: Final = {
    True: "prompts of late are unlike those of the calibration: this process serves full depth in place of all tiers",
    False: "prompts are like those of the calibration again: this process serves tiers again",
}


class Webhook(NamedTuple):
    """Where alerts go."""

    scheme: str
    host: str
    port: int | None
    path: str
    secret: bytes

    @classmethod
    def of(cls, url: str, secret_file: Path) -> Webhook:
        """The webhook of a URL, and the secret that a file holds.

        Raises:
            AccessError: The URL is neither https nor of this machine, or the secret cannot be read or is too short.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise AccessError(f"webhook {shown(url)} is not a URL ({error}).", hint="Use https://HOST/PATH.") from error
        named = (
            host and not (parts.username or parts.password or parts.fragment) and url.isascii() and url.isprintable()
        )
        if not (named and (parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host)))):
            raise AccessError(
                f"webhook {shown(url)} is neither https nor http on this machine.",
                hint="Use https://HOST/PATH without user, password and fragment; http is allowed only to 127.0.0.1.",
            )
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            secret = secret_file.read_bytes().strip()
        except OSError as error:
            raise AccessError(
                f"the webhook's secret {str(secret_file)!r} cannot be read ({error.strerror}).",
                hint="Write one with `openssl rand -hex 32`.",
            ) from error
        if len(secret) < SECRET_BYTES_MIN:
            raise AccessError(
                f"the webhook's secret in {str(secret_file)!r} has {len(secret)} bytes, fewer than {SECRET_BYTES_MIN}.",
                hint="Write one with `openssl rand -hex 32`.",
            )
        return cls(parts.scheme, host, port, path, secret)

    def call(self, body: bytes) -> str | None:
        """POST a body, within `_PATIENCE_S`; None if it was taken, or why not, in words."""
        answers: list[str | None] = []
        thread = threading.Thread(target=lambda: answers.append(self._call(body)), name="polar-webhook", daemon=True)
        thread.start()
        thread.join(_PATIENCE_S)  # whatever hangs: names, handshake, an answer that comes byte by byte
        return answers[0] if answers else f"no answer within {_PATIENCE_S:g} s"

    def _call(self, body: bytes) -> str | None:
        made = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = made(self.host, self.port, timeout=_PATIENCE_S)
        headers = {"Content-Type": "application/json", SIGNATURE: signature(self.secret, int(time.time()), body)}
        try:
            connection.request("POST", self.path, body, headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"{type(error).__name__}: {error}"[:200]
        finally:
            connection.close()
        return None if 200 <= status < 300 else f"it answered {status}"


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def signature(secret: bytes, seconds: int, body: bytes) -> str:
    """The header that proves that a call comes from who has the secret, and when it was made."""
    digest = hmac.new(secret, f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={seconds},v1={digest}"


@dataclass
class _Notice:
    """What this process tells of itself."""

    body: bytes
    attempts: int = 0
    due_s: float = 0.0
    """When it is tried next, by the monotonic clock."""


class Alerts:
    """Delivers the alerts of a ledger to a webhook. `start` and `close` are for one thread.

    Args:
        ledger: Whose promises.
        webhook: Where they go.
        every_s: How often changes are looked for. Unit: seconds.
    """

    def __init__(self, ledger: Ledger, webhook: Webhook, *, every_s: float = _EVERY_S) -> None:
        self._ledger, self._webhook, self._every_s = ledger, webhook, every_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_unusual: Callable[[], bool] = bool
        self._told_unusual = False
        self._notices: deque[_Notice] = deque(maxlen=_NOTICES)

    def start(self, is_unusual: Callable[[], bool] = bool) -> None:
        """Begin to deliver, in a thread of its own.

        Args:
            is_unusual: Whether this process finds its prompts unlike those of the calibration; never, by default.
        """
        self._is_unusual = is_unusual
        self._thread = threading.Thread(target=self._run, name="polar-alerts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Deliver nothing more; a call that is on its way is waited for a moment, and then ends by itself."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.notify()
                self.deliver()
            except BillingError as error:
                _log.warning("alerts cannot be read now (%s)", error)
            except Exception:  # whatever happened, the others must be delivered
                _log.exception("delivering alerts failed")

    def deliver(self) -> int:
        """Try what is due, once; returns how many were taken.

        Raises:
            StoreError: The ledger cannot be read or written now.
        """
        with self._ledger.as_stored() as connection:
            due = [] if connection is None else _due(connection)
        taken = 0
        for row in due:
            if not self._stop.is_set() and self._claim(row.seq):
                problem = self._webhook.call(canonical_json(_body(row)))
                taken += problem is None
                self._note(row.seq, problem)
        return taken

    def notify(self) -> int:
        """Tell whether this process finds its prompts unusual, where that has changed; returns how many were taken."""
        if (unusual := self._is_unusual()) != self._told_unusual:
            self._told_unusual = unusual
            facts = {"kind": "prompts.state_changed", "state": "unusual" if unusual else "usual"}
            at = {"id": secrets.token_hex(16), "since": datetime.now(UTC).isoformat(), "reason": _UNUSUAL[unusual]}
            self._notices.append(_Notice(canonical_json(facts | at)))
        taken = 0
        for notice in list(self._notices):
            if time.monotonic() >= notice.due_s and not self._stop.is_set():
                problem = self._webhook.call(notice.body)
                taken += problem is None
                notice.attempts += 1
                notice.due_s = time.monotonic() + min(2**notice.attempts, _LONGEST_WAIT_S)
                if problem is not None:
                    _log.warning("the webhook did not accept a notice about prompts: %s", problem)
                if problem is None or notice.attempts >= _ATTEMPTS:
                    self._notices.remove(notice)
        return taken

    def _claim(self, seq: int) -> bool:
        """Take the next attempt at a change; False where another replica has it."""
        alert = alert_table.c
        with suppress(IntegrityError), self._ledger.transaction(after_usage=False) as connection:
            now = database_time(connection, writes=True)
            row = connection.execute(select(alert_table).where(alert.standing_seq == seq).with_for_update()).first()
            if row is None:
                values = {"standing_seq": seq, "sent": 0, "attempts": 1, "due_at": now + _LEASE}
                connection.execute(insert(alert_table).values(values))
                return True
            if row.sent or row.due_at > now or row.attempts >= _ATTEMPTS:
                return False
            values = {"attempts": row.attempts + 1, "due_at": now + _LEASE}
            connection.execute(update(alert_table).where(alert.standing_seq == seq).values(values))
            return True
        return False

    def _note(self, seq: int, problem: str | None) -> None:
        if problem is not None:
            _log.warning("the webhook did not accept alert %d: %s", seq, problem)
        alert = alert_table.c
        with self._ledger.transaction(after_usage=False) as connection:
            of_change = alert.standing_seq == seq
            attempts: int = connection.execute(select(alert.attempts).where(of_change)).scalar_one()
            wait = timedelta(seconds=min(2**attempts, _LONGEST_WAIT_S))
            due_at = database_time(connection, writes=True) + wait
            noted = update(alert_table).where(of_change)
            connection.execute(noted.values(sent=int(problem is None), answer=problem, due_at=due_at))


def _due(connection: Connection) -> list[Row[Any]]:
    """Changes that no webhook has taken, and that may be tried now."""
    standing, alert, earlier = standing_table.c, alert_table.c, standing_table.alias()
    begun = exists().where(earlier.c.promise == standing.promise, earlier.c.seq < standing.seq)
    query = (
        select(standing_table)
        .outerjoin(alert_table, alert.standing_seq == standing.seq)
        .where(or_(standing.state != str(State.IN_FORCE), begun), func.coalesce(alert.sent, 0) == 0)
        .where(func.coalesce(alert.attempts, 0) < _ATTEMPTS)
        .order_by(standing.seq)
    )
    rows = connection.execute(query.add_columns(alert.due_at)).all()
    if not rows:
        return []
    now = database_time(connection, writes=False)
    return [row for row in rows if row.due_at is None or row.due_at <= now]


def _body(row: Row[Any]) -> dict[str, Any]:
    facts = {name: getattr(row, name) for name in ("promise", "tier", "state", "audits", "losses", "reason")}
    identity = {"id": f"{row.promise[:16]}-{row.audit_seq}", "kind": "promise.state_changed"}
    return {**identity, **facts, "since": row.since.isoformat()}
