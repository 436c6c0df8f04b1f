"""Audits in the ledger, and where the promises that they test stand.

An audit is stored once, by its id, and once per request and promise: a link of the chain of the tenant whose request
it was. In the transaction that stores it, the monitor of its promise reads it after all that were stored before; where
that changes the state of the promise, a row of `polar_standing` says so, in the chain of no tenant. So the state
follows from the audits in the order of their numbers, whatever the clocks of replicas said, and
`wrong_standings` computes it again. Knows no prices, and not how an answer is audited.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, insert, or_, select

from polar_billing.errors import ConflictError
from polar_billing.ledger import chain
from polar_billing.ledger.schema import NO_TENANT, audit_table, standing_table
from polar_sdk.promises.audit import PromiseStanding
from polar_sdk.promises.monitor import Monitor, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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

    def after(self, seq: int, lost: bool, weight: float, at: datetime) -> Watched:
        """The same after one more audit."""
        monitor = self.monitor.observe(lost, weight)
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


def watch(connection: Connection, known: dict[str, Watched], promises: Sequence[str] | None = None) -> None:
    """Bring the monitors of promises (None for all) up to date with the audits that are stored; `known` is changed."""
    audit = audit_table.c
    wanted = [] if promises is None else [audit.promise.in_(promises)]
    for name in connection.execute(select(audit.promise).where(*wanted).distinct()).scalars().all():
        last = known[name].last if name in known else 0
        query = select(audit_table).where(audit.promise == name, audit.seq > last).order_by(audit.seq)
        with connection.execute(query, execution_options={"yield_per": _BATCH}) as rows:
            for row in rows:
                known[name] = _read_by(known.get(name), row)


def _read_by(watched: Watched | None, row: Row[Any]) -> Watched:
    if watched is None:
        watched = Watched(row.promise, row.tier, Monitor(float(row.alpha), float(row.delta)))
    return watched.after(row.seq, bool(row.lost), weight_of(row.weight), row.at)


def weight_of(units: int) -> float:
    """A stored weight as monitors take it."""
    return units / 10**WEIGHT_SCALE


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
        self._counts: dict[str, tuple[str, int, int]] = {}
        """Promise → tier, audits and losses, up to the number that was read."""
        self._changes: dict[str, Row[Any]] = {}
        """Promise → its last row of `polar_standing`."""
        self._read = (0, 0)
        """The last numbers of both that were read."""

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
        after = known.after(seq, audit.lost, weight_of(values["weight"]), audit.at)
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
            if connection is not None:
                self._refresh(connection)
            return {promise: self._standing(promise) for promise in self._changes}

    def _refresh(self, connection: Connection) -> None:
        audit, standing = audit_table.c, standing_table.c
        until, changed = self._read
        query = select(audit.promise, func.max(audit.tier), func.count(), func.sum(audit.lost), func.max(audit.seq))
        for promise, tier, audits, losses, last in connection.execute(
            query.where(audit.seq > self._read[0]).group_by(audit.promise)
        ):
            _, before, lost = self._counts.get(promise, (tier, 0, 0))
            self._counts[promise] = (tier, before + audits, lost + int(losses))
            until = max(until, last)
        for row in connection.execute(select(standing_table).where(standing.seq > changed).order_by(standing.seq)):
            self._changes[row.promise] = row
            changed = row.seq
        self._read = (until, changed)

    def _standing(self, promise: str) -> PromiseStanding:
        row, (tier, audits, losses) = self._changes[promise], self._counts[promise]
        return PromiseStanding(
            promise=promise,
            tier=tier,
            state=State(row.state),
            audits=audits,
            losses=losses,
            since=row.since,
            reason=row.reason,
        )


def wrong_standings(connection: Connection) -> Iterator[str]:
    """The first difference of each promise between its stored standings and those that follow from its audits."""
    audit, standing = audit_table.c, standing_table.c
    stored: dict[str, list[dict[str, Any]]] = {}
    for change in connection.execute(select(standing_table).order_by(standing.seq)).mappings():
        values = {str(name): value for name, value in change.items() if name != "seq"}
        stored.setdefault(change["promise"], []).append(values)
    computed: dict[str, list[dict[str, Any]]] = {}
    watched: dict[str, Watched] = {}
    with connection.execute(select(audit_table).order_by(audit.seq), execution_options={"yield_per": _BATCH}) as rows:
        for row in rows:
            before = watched.get(row.promise)
            after = watched[row.promise] = _read_by(before, row)
            if before is None or after.changes != before.changes:
                computed.setdefault(row.promise, []).append(after.row)
    for promise in sorted(stored.keys() | computed.keys()):
        if stored.get(promise, []) != computed.get(promise, []):
            yield f"the standings of promise {promise[:12]}… are not those that follow from its audits."
