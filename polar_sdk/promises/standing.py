"""The state of promises by the audits of one process, for sinks without a ledger. Knows no store."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from polar_sdk.promises.audit import PromiseStanding
from polar_sdk.promises.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_sdk.promises.audit import Audit


class Standings:
    """Monitors of promises in memory, fed by audits in the order in which they come. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._monitors: dict[str, Monitor] = {}
        self._known: set[str] = set()
        """Ids of the audits that were counted."""
        self._standings: dict[str, PromiseStanding] = {}

    def audited(self, audit: Audit) -> None:
        """Count an audit; one that was counted before changes nothing."""
        with self._lock:
            if audit.audit_id in self._known:
                return
            monitor = self._monitors.get(audit.promise) or Monitor(audit.alpha, audit.delta)
            self._monitors[audit.promise] = monitor.observe(audit.lost)
            self._standings[audit.promise] = after(
                self._standings.get(audit.promise), self._monitors[audit.promise], audit
            )
            self._known.add(audit.audit_id)

    def current(self) -> Mapping[str, PromiseStanding]:
        """By digest of the promise."""
        with self._lock:
            return dict(self._standings)


def after(before: PromiseStanding | None, monitor: Monitor, audit: Audit) -> PromiseStanding:
    """Where a promise stands after one more audit, which its monitor has seen; None = it was the first."""
    changed = before is None or before.state != monitor.state
    low, high = monitor.interval
    return PromiseStanding(
        promise=audit.promise,
        tier=audit.tier,
        state=monitor.state,
        audits=monitor.audits,
        losses=monitor.losses,
        since=audit.at if before is None or changed else before.since,
        reason=f"{monitor.losses} of {monitor.audits} audited answers were lost: {low:.1%} to {high:.1%} of all, where "
        f"at most {monitor.alpha:.1%} are promised",
        doubtful=monitor.doubtful,
    )
