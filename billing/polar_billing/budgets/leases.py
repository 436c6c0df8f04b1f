"""Leases: the holds of this process, renewed by a thread while their requests run.

A hold lives for half a minute; a request that waits, runs or is paused by its reader may live for hours. So a hold is a
lease: its process renews it from the start of the request, all of them in one statement, and after the process is
killed nobody does. Waits by the monotonic clock. Knows no database: the function that renews is passed in.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from polar_billing.errors import BillingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polar_billing.budgets.offers import Cost
    from polar_billing.ledger.records import Identity
    from polar_sdk.usage import UsageBound


RENEWALS: Final = 10
"""How often a hold is renewed in its lifetime, so that it outlives eight renewals that fail."""
_SWEEP_FROM: Final = 1_000
_log: Final = logging.getLogger("polar_billing")


@dataclass(eq=False)
class Lease:
    """A hold of this process, and what it takes to make it again."""

    seq: int
    source: str
    bound: UsageBound
    offer: int
    cost: Cost
    """The maximum cost of that offer."""
    renewed_at: float
    """When it was last made or renewed. Unit: seconds of `time.monotonic`."""
    end: Callable[[Exception], None] | None = None
    """Ends the request, if the hold is lost; None while it has not begun: then nobody says that it lives."""
    loss: Exception | None = None
    """Why it was lost, until somebody can be notified."""

    @property
    def identity(self) -> Identity:
        """Identifies the request."""
        return (self.bound.tenant, self.source, self.bound.request_id)


class Leases:
    """The leases of one `Budgets`. Safe in several threads and after a fork."""

    def __init__(self, lifetime_s: float, renew: Callable[[Sequence[Lease]], None]) -> None:
        self._lifetime_s = lifetime_s
        self._interval_s = lifetime_s / RENEWALS
        self._renew = renew
        self._start_anew()

    def _start_anew(self) -> None:
        """Start with none: at first, and in a forked child, whose parent renews its own."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        """Taken by `with`, which is one step: Ctrl-C in `Condition.__enter__` would leave it locked for ever."""
        self._closes = threading.Condition(self._lock)
        self._leases: dict[Identity, Lease] = {}
        self._thread: threading.Thread | None = None
        self._closing = False
        self._sweep_at = _SWEEP_FROM
        """How many leases there may be before those that never began are looked for."""

    def _restart_after_fork(self) -> None:
        if self._process != os.getpid():
            self._start_anew()

    def __contains__(self, lease: Lease) -> bool:
        return self._leases.get(lease.identity) is lease

    def all(self) -> list[Lease]:
        """Those of requests that run, and that are not lost."""
        self._restart_after_fork()
        with self._lock:
            return self._renewing()

    def add(self, lease: Lease) -> None:
        """Note a hold that was made."""
        self._restart_after_fork()
        with self._lock:
            if len(self._leases) >= self._sweep_at:
                since = lease.renewed_at - self._lifetime_s
                living = {
                    key: one for key, one in self._leases.items() if one.end is not None or one.renewed_at > since
                }
                self._leases, self._sweep_at = living, 2 * len(living) + _SWEEP_FROM
            self._leases[lease.identity] = lease

    def drop(self, identity: Identity) -> None:
        """Renew a hold no longer: its request has its record, or never began."""
        if identity in self._leases:  # for most requests there is none
            self._restart_after_fork()
            with self._lock:
                self._leases.pop(identity, None)

    def discard(self, lease: Lease) -> None:
        """Renew this hold no longer; one that was made later for the same request stays."""
        with self._lock:
            if lease in self:
                del self._leases[lease.identity]

    def watch(self, identity: Identity, end: Callable[[Exception], None]) -> None:
        """Renew a hold from now on, and call `end` if it is lost."""
        if identity not in self._leases:
            return
        self._restart_after_fork()
        with self._lock:
            lease = self._leases.get(identity)
            if lease is None:
                return
            lease.end = end
            self._closing = False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="polar-lease", daemon=True)
            if self._thread.ident is None:  # a signal may have cut off the call that made it
                self._thread.start()

    def lose(self, lease: Lease, loss: Exception) -> None:
        """Note that the hold is given away, and end its request."""
        lease.loss = loss
        if lease.end is not None:
            lease.end(loss)

    def close(self) -> None:
        """Let the thread end, if there is nothing to renew."""
        if self._process == os.getpid():
            with self._lock:
                self._closing = True
                self._closes.notify_all()

    def _run(self) -> None:
        failing = False
        while True:
            with self._lock:
                self._closes.wait_for(lambda: self._closing and not self._renewing(), self._interval_s)
                leases = self._renewing()
                if not leases:
                    self._thread = None
                    return
            since = time.monotonic() - self._interval_s / 2
            due = [lease for lease in leases if lease.renewed_at <= since]  # most requests end before they ever are
            if not due:
                continue
            try:
                self._renew(due)
                failing = False
            except Exception as error:  # whatever happened, the others must be renewed
                if not failing:  # said once, however long the database is away
                    unexpected = not isinstance(error, BillingError)
                    _log.warning("%d holds could not be renewed now (%s)", len(due), error, exc_info=unexpected)
                failing = True

    def _renewing(self) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.end is not None and lease.loss is None]
