"""Use of the limits of API keys, over all replicas: requests and tokens a minute, and answers at a time.

A limit per minute is a bucket that holds a minute's worth and fills evenly. It is stored as the time at which it is
full again, so nobody has to fill it: taking an amount moves that time. Concurrent answers are counted per replica, in a
row that the replica renews; that of a killed replica expires within half a minute, by the database's clock.

Everything is decided in one transaction that locks the rows of its keys, for all calls of a process that came while the
last one ran. So no limit is exceeded and nobody is refused while a limit has room, on any replica. Two things are late:
tokens are taken when an answer ends, so running answers may exceed a limit, and later ones wait until that is made up;
and if the database was unavailable for longer than half a minute, answers that are still running count again from the
next renewal. Knows no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from sqlalchemy import and_, delete, func, insert, or_, select

from polar_billing.ledger.clock import database_time
from polar_billing.ledger.connection import upsert_rows
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.schema import rate_table, running_table
from polar_billing.values.canonical import to_microseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Connection

    from polar_billing.access.keys import ApiKey

LIFETIME: Final = timedelta(seconds=30)
"""After this time, answers that nobody renewed are of a process that is gone."""
_MINUTE_NS: Final = 60 * 10**9
_RETRY_S: Final = 1.0
"""When to ask again where too many answers run. Unit: seconds."""
_MOVE: Final = ("requests_full_at = excluded.requests_full_at", "tokens_full_at = excluded.tokens_full_at")


@dataclass(frozen=True)
class Verdict:
    """The answer to a call.

    Attributes:
        refused: The limit that is reached: `requests`, `tokens` or `parallel`; None = it is let in.
        wait_s: When to ask again. Unit: seconds.
        left: What is left afterwards by `requests` and `tokens`, and in how many seconds it is full.
    """

    refused: str | None
    wait_s: float
    left: Mapping[str, tuple[float, float]]


@dataclass
class _Bucket:
    """The bucket of one limit per minute."""

    limit: int
    full_at: int
    """Unit: nanoseconds since 1970, as `now`."""

    def take(self, amount: int, now: int) -> None:
        self.full_at = max(self.full_at, now) + amount * _MINUTE_NS // self.limit

    def left(self, now: int) -> float:
        return self.limit - self.seconds_to_full(now) * self.limit / 60

    def seconds_to_full(self, now: int) -> float:
        return max(self.full_at - now, 0) / 1e9

    def wait(self, amount: int, now: int) -> float:
        """Seconds until so much is there; 0 if it is."""
        return max(max(self.full_at, now) + amount * _MINUTE_NS // self.limit - now - _MINUTE_NS, 0) / 1e9


@dataclass
class _Account:
    """One key, while its rows are locked."""

    key_id: str
    requests_full_at: int
    tokens_full_at: int
    running: int = 0
    """Answers of other replicas."""
    own: int = 0
    """Answers of this one."""
    buckets: dict[str, _Bucket] = field(default_factory=dict)

    def use(self, key: ApiKey) -> None:
        """Apply the limits of a key, which may have changed since the last call."""
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        for what, limit in limits.items():
            if limit is not None:
                self.buckets.setdefault(what, _Bucket(limit, getattr(self, f"{what}_full_at"))).limit = limit

    def verdict(self, key: ApiKey, now: int) -> Verdict:
        """Let a call in, or not."""
        self.use(key)
        refused, wait = None, 0.0
        for what, bucket in self.buckets.items():
            if refused is None and (wait := bucket.wait(1, now)) > 0:
                refused = what
        if key.parallel is not None and self.running + self.own >= key.parallel:
            refused, wait = "parallel", _RETRY_S
        if refused is None:
            self.own += 1
            if "requests" in self.buckets:
                self.buckets["requests"].take(1, now)
        left = {what: (bucket.left(now), bucket.seconds_to_full(now)) for what, bucket in self.buckets.items()}
        return Verdict(refused, wait, left)

    def row(self) -> tuple[str, int, int]:
        """As it is stored."""
        former = {"requests": self.requests_full_at, "tokens": self.tokens_full_at}
        full_at = former | {what: bucket.full_at for what, bucket in self.buckets.items()}
        return (self.key_id, full_at["requests"], full_at["tokens"])


class Rates:
    """The use of the limits of a ledger's keys by one replica. Call it from one thread at a time.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        clock: Returns the time, UTC; None for the database's clock, see `ledger.clock`.
    """

    def __init__(
        self,
        ledger: Ledger | str | None = None,
        *,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self._clock = clock
        self._replica = uuid4().hex

    def update(
        self,
        asking: Sequence[ApiKey],
        used: Sequence[tuple[ApiKey, int]] = (),
        running: Mapping[str, int] | None = None,
    ) -> list[Verdict]:
        """Let calls in, in their order, and note what answers used and how many run.

        Args:
            asking: The key of each call that wants in.
            used: Tokens of answers that have ended.
            running: Answers of this replica by the ids of their keys, those of this call not yet included; its former
                count of each key named is superseded. Whoever has any calls at least every quarter of `LIFETIME`.

        Returns:
            One verdict per call.

        Raises:
            StoreError: The ledger cannot be read or written. None is let in; call again with the same `used`.
        """
        running = running or {}
        parallel = {*running, *(key.key_id for key in asking if key.parallel is not None)}
        ids = {*parallel, *(key.key_id for key in asking), *(key.key_id for key, _ in used)}
        if not ids:
            return []
        with self.ledger.transaction(after_usage=False, patience_s=None) as connection:
            if connection.dialect.name == "postgresql":
                # A crash of the database then forgets what the last second used; a flush costs more than all else.
                connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            accounts = _locked(connection, ids)
            moment = database_time(connection, writes=True) if self._clock is None else self._clock()
            now = to_microseconds(moment) * 1_000
            for key_id, others in self._running(connection, parallel, moment).items():
                accounts[key_id].running = others
            for key_id, own in running.items():
                accounts[key_id].own = own
            for account in accounts.values():  # more than that only if the clock was set back
                account.requests_full_at = min(account.requests_full_at, now + _MINUTE_NS)
            for key, tokens in used:
                accounts[key.key_id].use(key)
                if "tokens" in accounts[key.key_id].buckets:
                    accounts[key.key_id].buckets["tokens"].take(tokens, now)
            verdicts = [accounts[key.key_id].verdict(key, now) for key in asking]
            upsert_rows(connection, rate_table, sorted(one.row() for one in accounts.values() if one.buckets), _MOVE)
            self._write_running(connection, [accounts[key_id] for key_id in sorted(parallel)], moment)
        return verdicts

    def _running(self, connection: Connection, key_ids: Iterable[str], now: datetime) -> Mapping[str, int]:
        """Answers that run on other replicas, by key."""
        listed, column = sorted(key_ids), running_table.c
        if not listed:
            return {}
        query = select(column.key_id, func.sum(column.answers)).group_by(column.key_id)
        alive = and_(column.replica != self._replica, column.expires_at > now)
        rows = connection.execute(query.where(column.key_id.in_(listed), alive))
        return {key_id: int(answers) for key_id, answers in rows}

    def _write_running(self, connection: Connection, accounts: Sequence[_Account], now: datetime) -> None:
        """Supersede the rows of this replica, and delete those of replicas that are gone."""
        if not accounts:
            return
        column = running_table.c
        old = or_(column.replica == self._replica, column.expires_at <= now)
        listed = [account.key_id for account in accounts]
        connection.execute(delete(running_table).where(column.key_id.in_(listed), old))
        rows = [
            {"key_id": one.key_id, "replica": self._replica, "answers": one.own, "expires_at": now + LIFETIME}
            for one in accounts
            if one.own
        ]
        if rows:
            connection.execute(insert(running_table), rows)


def _locked(connection: Connection, key_ids: Iterable[str]) -> dict[str, _Account]:
    """The accounts of keys, which no other transaction changes until this one ends; in one order for all."""
    listed = sorted(key_ids)
    query = select(rate_table).where(rate_table.c.key_id.in_(listed)).order_by(rate_table.c.key_id).with_for_update()
    rows = connection.execute(query).all()
    if len(rows) < len(listed):
        upsert_rows(connection, rate_table, [(key_id, 0, 0) for key_id in listed], ())
        rows = connection.execute(query).all()
    return {row.key_id: _Account(*row) for row in rows}
