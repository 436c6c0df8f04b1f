"""Audits in the ledger, and the state of the promises that they test.

An audit is stored once, by its id, and once per request and promise: a link of the chain of the tenant whose request it
was. In the transaction that stores it, the monitor of its promise reads it after all earlier ones; if that changes the
state of the promise, a row of `polar_standing` records it, in the chain of no tenant. So the state follows from the
audits in the order of their numbers, independent of the replicas' clocks, and `wrong_standings` recomputes it. The
monitor itself is stored with them, so that nobody has to read all audits to continue. Knows no prices, and not how an
answer is audited.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, insert, or_, select, update

from polar_billing.errors import ConflictError
from polar_billing.ledger import chain
from polar_billing.ledger.schema import NO_TENANT, audit_table, monitor_table, standing_table
from polar_sdk.promises.audit import PromiseStanding
from polar_sdk.promises.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import Connection, Row

    from polar_billing.ledger.ledger import Ledger
    from polar_sdk.promises.audit import Audit

WEIGHT_SCALE: Final = 12
"""Decimals of a stored weight."""
_COPIED: Final = (
    *("audit_id", "request_id", "tenant", "tier", "promise", "loss", "compared", "kept", "prompt_tokens", "flops"),
    *("audit_request_id", "at"),
)
"""Fields of an audit that are columns as they are."""
_BATCH: Final = 1_000


@dataclass(frozen=True)
class Watched:
    """A promise with its monitor, as far as the audits were read."""

    promise: str
    tier: str
    monitor: Monitor
    last: int = 0
    """Number of the last audit that it has read."""
    since: datetime | None = None
    """When the state began, by the audit that changed it; None before the first."""
    changes: int = 0
    """How often the state was noted, its beginning included."""

    def after(self, seq: int, lost: bool, at: datetime) -> Watched:
        """The same after one more audit."""
        monitor = self.monitor.observe(lost)
        after = replace(self, monitor=monitor, last=seq)
        changed = not self.changes or monitor.state is not self.monitor.state
        return replace(after, since=at, changes=self.changes + 1) if changed else after

    @property
    def reason(self) -> str:
        """Why the state is what it is, in words."""
        counts = f"{self.monitor.losses:,} of {self.monitor.audits:,} audited answers lost"
        return f"{counts}, promised at most {self.monitor.alpha:g} with δ = {self.monitor.delta:g}"

    @property
    def row(self) -> dict[str, Any]:
        """The row of `polar_standing` if the last audit has changed the state."""
        monitor = self.monitor
        counts = {"audits": monitor.audits, "losses": monitor.losses, "audit_seq": self.last}
        return {
            "promise": self.promise,
            "tier": self.tier,
            "state": str(monitor.state),
            **counts,
            "since": self.since,
            "reason": self.reason,
        }


def watch(connection: Connection, known: dict[str, Watched], promises: Iterable[str] | None = None) -> None:
    """Bring the monitors of promises (None for all) up to date with the audits that are stored; `known` is changed."""
    audit = audit_table.c
    for name in _audited(connection) if promises is None else dict.fromkeys(promises):
        watched = known.get(name) or _stored(connection, name)
        last = 0 if watched is None else watched.last
        query = select(audit_table).where(audit.promise == name, audit.seq > last).order_by(audit.seq)
        with connection.execute(query, execution_options={"yield_per": _BATCH}) as rows:
            for row in rows:
                watched = _read_by(watched, row)
        if watched is not None:
            known[name] = watched


def _audited(connection: Connection) -> Iterator[str]:
    """The promises that have audits; asks for one after another, since the index finds each at once."""
    name: str | None = ""
    following = select(func.min(audit_table.c.promise))
    while (name := connection.execute(following.where(audit_table.c.promise > name)).scalar()) is not None:
        yield name


def _stored(connection: Connection, promise: str) -> Watched | None:
    """A promise with its stored monitor; None if there is none, or the chained rows say something else."""
    audit, standing, monitor = audit_table.c, standing_table.c, monitor_table.c
    of_audit = and_(audit.seq == monitor.audit_seq, audit.promise == monitor.promise)
    query = select(monitor.monitor, audit.seq, audit.tier, audit.alpha, audit.delta).join(audit_table, of_audit)
    row = connection.execute(query.where(monitor.promise == promise)).first()
    query = select(standing.state, standing.since).where(standing.promise == promise).order_by(standing.seq)
    changes = connection.execute(query).all()
    if row is None or not changes:
        return None
    try:
        restored = Monitor.restored(float(row.alpha), float(row.delta), row.monitor)
    except ValueError:
        return None
    if str(restored.state) != changes[-1].state:
        return None
    return Watched(promise, row.tier, restored, row.seq, changes[-1].since, len(changes))


def _store_monitor(connection: Connection, watched: Watched) -> None:
    """Store a monitor in place of the one before; the chain of no tenant is locked."""
    values = {"audit_seq": watched.last, "monitor": watched.monitor.text}
    of_promise = update(monitor_table).where(monitor_table.c.promise == watched.promise)
    if not connection.execute(of_promise.values(values)).rowcount:
        connection.execute(insert(monitor_table).values(promise=watched.promise, **values))


def _read_by(watched: Watched | None, row: Row[Any]) -> Watched:
    if watched is None:
        watched = Watched(row.promise, row.tier, Monitor(float(row.alpha), float(row.delta)))
    return watched.after(row.seq, bool(row.lost), row.at)


@dataclass
class _New:
    """The rows that a transaction stores."""

    watched: dict[str, Watched]
    audits: list[int] = field(default_factory=list)
    """Numbers of the rows, to be linked."""
    changes: list[int] = field(default_factory=list)


class Audits:
    """The audits of one ledger, and the standings of its promises. Safe in several threads.

    Args:
        ledger: Where they are stored.
        source: The meter's name; request ids are unique within it.
    """

    def __init__(self, ledger: Ledger, source: str) -> None:
        self._ledger, self._source = ledger, source
        self._start_anew()

    def _start_anew(self) -> None:
        """Start with nothing read: at first, and in a forked child."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._watched: dict[str, Watched] = {}
        self._read = 0
        """The last number up to which all audits were read."""

    def _turn(self) -> threading.Lock:
        if self._process != os.getpid():
            self._start_anew()  # a thread of the parent may have had the lock
        return self._lock

    def store(self, audits: Sequence[Audit]) -> list[ConflictError | None]:
        """Store audits, in order, in one transaction; of a replay nothing.

        Returns:
            For each None, or why it was not stored: its id has another content, or its promise other figures.

        Raises:
            StoreError: The ledger cannot take them; then none was stored.
        """
        with self._turn(), self._ledger.transaction(after_usage=False, patience_s=None) as connection:
            heads = chain.lock_heads(connection, {NO_TENANT, *(audit.tenant for audit in audits)})
            watch(connection, self._watched, [audit.promise for audit in audits])
            new = _New(dict(self._watched))  # forgotten if this transaction is rolled back
            answers = [self._store(connection, audit, new) for audit in audits]
            for name, watched in new.watched.items():
                if watched is not self._watched.get(name):
                    _store_monitor(connection, watched)
            chain.link_many(connection, audit_table, new.audits, heads)
            chain.link_many(connection, standing_table, new.changes, heads)
            return answers

    def _store(self, connection: Connection, audit: Audit, new: _New) -> ConflictError | None:
        values, column = self._values(audit), audit_table.c
        of_request = and_(*(column[name] == values[name] for name in ("tenant", "source", "request_id", "promise")))
        query = select(audit_table).where(or_(column.audit_id == audit.audit_id, of_request)).order_by(column.seq)
        for stored in connection.execute(query).mappings():
            if stored["audit_id"] != audit.audit_id:
                return None  # the answer was audited before, by a process that has ended since
            if any(stored[name] != value for name, value in values.items() if name != "stored_at"):
                return ConflictError(
                    f"audit {audit.audit_id!r} is in the ledger (seq {stored['seq']}) with other content.",
                    hint="Give every audit its own id; the first one stands.",
                )
            return None
        known = new.watched.get(audit.promise) or Watched(audit.promise, audit.tier, Monitor(audit.alpha, audit.delta))
        promised = (known.tier, known.monitor.alpha, known.monitor.delta)
        if promised != (audit.tier, audit.alpha, audit.delta):
            return ConflictError(
                f"audit {audit.audit_id!r} is of tier {audit.tier!r}, α = {audit.alpha:g} and δ = {audit.delta:g}, but "
                f"promise {audit.promise[:12]} of tier {known.tier!r}, α = {promised[1]:g} and δ = {promised[2]:g}.",
                hint="A promise with other figures has another digest.",
            )
        seq: int = connection.execute(insert(audit_table).values(values).returning(column.seq)).scalar_one()
        new.audits.append(seq)
        after = known.after(seq, audit.lost, audit.at)
        if after.changes != known.changes:
            row = insert(standing_table).values(after.row).returning(standing_table.c.seq)
            new.changes.append(connection.execute(row).scalar_one())
        new.watched[audit.promise] = after
        return None

    def _values(self, audit: Audit) -> dict[str, Any]:
        weight = max(1, round(audit.weight * 10**WEIGHT_SCALE))
        shares = {"alpha": repr(audit.alpha), "delta": repr(audit.delta), "weight": weight, "lost": int(audit.lost)}
        copied = {name: getattr(audit, name) for name in _COPIED}
        return {**copied, **shares, "source": self._source, "stored_at": datetime.now(UTC)}

    def standings(self) -> dict[str, PromiseStanding]:
        """Where every audited promise stands now; reads only what is new.

        Raises:
            StoreError: The ledger cannot be read now.
        """
        with self._turn(), self._ledger.as_stored() as connection:
            last = 0 if connection is None else connection.execute(select(func.max(audit_table.c.seq))).scalar() or 0
            if connection is not None and last > self._read:
                watch(connection, self._watched)
                self._read = last
            return {promise: _standing(watched) for promise, watched in self._watched.items()}


def _standing(watched: Watched) -> PromiseStanding:
    monitor = watched.monitor
    assert watched.since is not None, "it has an audit"
    return PromiseStanding(
        promise=watched.promise,
        tier=watched.tier,
        state=monitor.state,
        audits=monitor.audits,
        losses=monitor.losses,
        since=watched.since,
        reason=watched.reason,
        doubtful=monitor.doubtful,
    )


def wrong_standings(connection: Connection) -> Iterator[str]:
    """The first difference of each promise between what is stored of it and what follows from its audits."""
    audit, standing = audit_table.c, standing_table.c
    stored: dict[str, list[dict[str, Any]]] = {}
    for change in connection.execute(select(standing_table).order_by(standing.seq)).mappings():
        values = {str(name): value for name, value in change.items() if name != "seq"}
        stored.setdefault(change["promise"], []).append(values)
    monitors = {row.promise: row for row in connection.execute(select(monitor_table))}
    computed: dict[str, list[dict[str, Any]]] = {}
    watched: dict[str, Watched] = {}
    with connection.execute(select(audit_table).order_by(audit.seq), execution_options={"yield_per": _BATCH}) as rows:
        for row in rows:
            before = watched.get(row.promise)
            after = watched[row.promise] = _read_by(before, row)
            if before is None or after.changes != before.changes:
                computed.setdefault(row.promise, []).append(after.row)
            kept = monitors.get(row.promise)
            if kept is not None and kept.audit_seq == row.seq and kept.monitor == after.monitor.text:
                del monitors[row.promise]
    for promise in sorted(stored.keys() | computed.keys()):
        if stored.get(promise, []) != computed.get(promise, []):
            yield f"the standings of promise {promise[:12]}… are not those that follow from its audits."
    for promise in sorted(map(str, monitors)):
        yield f"the monitor of promise {promise[:12]}… is not the one that follows from its audits."
