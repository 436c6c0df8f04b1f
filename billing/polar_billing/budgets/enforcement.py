"""`Budgets`: set them, hold money and compute for a request before it runs, and say what is left.

Every hold covers all budgets of a request in one transaction, which no other of the same tenant overlaps: the tenant's
counts are locked first. Writers of usage lock them as well, but only to settle: reservations continue while they write.
Requests of a tenant that come while their process waits for that lock share the transaction. What cannot be decided is
refused.

A hold lives for half a minute and is renewed while its request lives (`leases`). The database's clock (`ledger.clock`)
decides whether it has expired, so the clocks of hosts need not agree. If it could not be renewed and has expired, it is
re-created with the next renewal; if its budget has no more room by then, the request is ended with that budget's error,
and its record counts what it used. Rates nothing itself (see `prices.quote`).
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from polar_billing.budgets import counters
from polar_billing.budgets.budget import COMPUTE_UNIT, Budget, Level
from polar_billing.budgets.discrepancies import Difference, WrongHold, wrong_counters, wrong_holds
from polar_billing.budgets.group_commit import GroupCommit
from polar_billing.budgets.holds import (
    Answer,
    Ask,
    Granted,
    Hold,
    HoldState,
    hold,
    in_force,
    latest_holds,
    open_holds,
    renew,
    states,
    write_budget,
)
from polar_billing.budgets.leases import Lease, Leases
from polar_billing.budgets.offers import Refusal, Standing, costs
from polar_billing.budgets.settlement import free, with_budgets
from polar_billing.errors import BillingError, BudgetError, CurrencyMixError, StoreError
from polar_billing.ledger import chain, pending_writers
from polar_billing.ledger.clock import database_time
from polar_billing.ledger.connection import lock_counts
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, AllTenants, Identity
from polar_billing.values.cached import CachedValue, Changes
from polar_billing.values.periods import Period, Window
from polar_sdk.errors import PolarError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from sqlalchemy import Connection

    from polar_billing.prices.book import PriceBook
    from polar_sdk.usage import UsageBound


HOLD_LIFETIME: Final = timedelta(seconds=30)
"""After this time a hold that nobody renewed or resolved expires: its process is gone."""
SEEN_WITHIN_S: Final = 5.0
"""How long a process may miss the first budget that another process sets for a tenant. Unit: seconds."""


_changes: Final = Changes()


class _Wanted(NamedTuple):
    """A call for a hold, and if it is not the first one, the lease that it had."""

    ask: Ask
    lease: Lease | None


_Call = _Wanted | Identity
"""A hold to make, or the request whose hold to release."""


class Budgets:
    """The budgets of a ledger. Safe in several threads and processes.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        lifetime: How long until a hold that nobody renewed or resolved expires.
        clock: Returns the time, UTC; None for the database's clock, see `ledger.clock`.
    """

    def __init__(
        self,
        ledger: Ledger | str | None = None,
        *,
        lifetime: timedelta = HOLD_LIFETIME,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.lifetime = lifetime
        self._clock = clock
        self._tenants = CachedValue(self._tenants_with_budgets, _changes)
        self._leases = Leases(lifetime.total_seconds(), self._renew)
        self._groups: dict[str, GroupCommit[_Call, Answer | bool]] = {}
        """By tenant: what makes holds and releases them."""
        self._unanswered: set[Identity] = set()
        """Requests of which this process does not know whether their hold was stored."""

    def set(self, budget: Budget, book: PriceBook | None = None) -> None:
        """Put a budget in force from now on; it supersedes the one of the same tenant, level, name, unit and window.

        What was spent in the window so far counts, even from before there was a budget.

        Args:
            budget: The budget.
            book: The price book in force, to refuse a currency that nothing will be charged in.

        Raises:
            BudgetError: No request can have the name of its tenant, project, user or key.
            CurrencyMixError: The budget is in another currency than the price book.
        """
        budget.check_names()
        if book is not None and budget.unit not in {COMPUTE_UNIT, book.currency}:
            raise CurrencyMixError(
                f"a budget in {budget.unit} cannot be enforced: price book {book.id!r} is in {book.currency}.",
                hint=f"Set it in {book.currency}, or in CU.",
            )
        with self._locked(budget.tenant, chained=True) as (connection, now):
            if budget not in in_force(connection, budget.tenant):
                self._write(connection, budget, now, closed=False)
        _changes.announce()

    def close(
        self, tenant: str, *, level: Level | str, unit: str, window: Window | str, name: str | None = None
    ) -> Budget:
        """Close a budget; its definitions stay in the ledger.

        Returns:
            The budget that was in force.

        Raises:
            BudgetError: There is no such budget.
        """
        key = (tenant, str(level), name or "", unit, str(window))
        with self._locked(tenant, chained=True) as (connection, now):
            budget = next((budget for budget in in_force(connection, tenant) if budget.key == key), None)
            if budget is not None:
                self._write(connection, budget, now, closed=True)
        _changes.announce()
        if budget is None:
            what = f"tenant {tenant!r} has no budget in {unit} per {window} of the level {level}"
            raise BudgetError(
                f"{what}{'' if name is None else f' and the name {name!r}'}.", hint="See `polar budget show`."
            )
        return budget

    def _write(self, connection: Connection, budget: Budget, now: datetime, *, closed: bool) -> None:
        write_budget(connection, budget, closed=closed, now=now)
        counters.drop(connection, budget)

    def in_force(self, tenant: str | AllTenants) -> list[Budget]:
        """The budgets of a tenant, or of all of them, in the order in which they were first set."""
        with self.ledger.snapshot() as connection:
            return in_force(connection, _name_of(tenant))

    def standings(self, tenant: str | AllTenants, at: datetime | None = None) -> list[Standing]:
        """The standing of every budget in the window of `at`: spent, held and left; None for now."""
        with self.ledger.snapshot() as connection:
            return self.standings_in(connection, tenant, at)

    def standings_in(
        self, connection: Connection, tenant: str | AllTenants, at: datetime | None = None
    ) -> list[Standing]:
        """As `standings`, in a transaction that sees one state of the ledger."""
        moment = self._lease_time(connection, writes=False) if at is None else at
        budgets = in_force(connection, _name_of(tenant))
        windows = [(budget, Period.containing(moment, budget.window, budget.zone)) for budget in budgets]
        return counters.read_standings(connection, windows)

    def holds(self, tenant: str | AllTenants) -> list[Hold]:
        """The open holds, the oldest first."""
        with self.ledger.snapshot() as connection:
            return open_holds(connection, _name_of(tenant))

    def reserve(self, bound: UsageBound, book: PriceBook, *, source: str) -> int:
        """Hold the maximum that a request may use, in every budget that covers it or in none.

        The hold lives for `lifetime`; from `watch` to `release` or `forget` it is renewed. The same call again, after
        one whose answer was lost (`StoreError`), returns the same offer and holds nothing more.

        Args:
            bound: The request and its offers.
            book: The prices it will be charged by.
            source: The meter; request ids are unique per (tenant, source).

        Returns:
            Index of the offer to serve.

        Raises:
            BudgetExceededError: No offer fits what is left.
            ConflictError: The request id is in use, or has been used.
            CurrencyMixError: A budget is in another currency than the price book.
            StoreError: The ledger cannot be read or written now.
        """
        if not self._may_have_budgets(bound.tenant):
            return 0
        offers = costs(bound, book)
        granted = self._hold(Ask(bound, dict(enumerate(offers)), source))
        if isinstance(granted, Refusal):
            raise granted.error()
        if granted.seq is not None:
            cost = offers[granted.offer]
            self._leases.add(Lease(granted.seq, source, bound, granted.offer, cost, time.monotonic()))
        return granted.offer

    def _hold(self, ask: Ask, lease: Lease | None = None) -> Granted | Refusal:
        lags = pending_writers.lags(self.ledger.identity)
        answer = self._call(ask.bound.tenant, wanted := _Wanted(ask, lease))
        if lags and isinstance(answer, Refusal):  # what this process has stored since may have freed enough
            pending_writers.drain(self.ledger.identity)
            answer = self._call(ask.bound.tenant, wanted)
        self._unanswered.discard(ask.identity)
        if isinstance(answer, BillingError):
            raise answer
        assert not isinstance(answer, bool)  # that is for releases
        return answer

    def _call(self, tenant: str, call: _Call) -> Answer | bool:
        if tenant not in self._groups:
            self._groups.setdefault(tenant, GroupCommit(partial(self._run, tenant), shared=StoreError))
        return self._groups[tenant](call)

    def _run(self, tenant: str, take: Callable[[], Sequence[_Call]]) -> list[Answer | bool]:
        """Release and hold for all calls that have come by the time when the tenant is locked, in one transaction."""
        with self._locked(tenant, after_usage=False) as (connection, now):
            calls = take()
            released = self._release(connection, {call for call in calls if not isinstance(call, _Wanted)}, now)
            answers = iter(self._hold_all(connection, [call for call in calls if isinstance(call, _Wanted)], now))
            return [next(answers) if isinstance(call, _Wanted) else call in released for call in calls]

    def _hold_all(self, connection: Connection, wanted: Sequence[_Wanted], now: datetime) -> list[Answer]:
        """Hold for requests of one tenant, where they have not ended meanwhile."""
        if not wanted:
            return []
        again = self._unanswered.intersection(ask.identity for ask, _ in wanted)
        self._unanswered.update(ask.identity for ask, _ in wanted)
        self._expire(connection, wanted[0].ask.bound.tenant, now)
        # A request whose hold was lost may have ended meanwhile.
        ended = [lease if lease is not None and lease not in self._leases else None for _, lease in wanted]
        asks = [ask for (ask, _), lease in zip(wanted, ended, strict=True) if lease is None]
        answers = iter(hold(connection, asks, now=now, lifetime=self.lifetime, again=again) if asks else ())
        return [next(answers) if lease is None else Granted(lease.offer, None) for lease in ended]

    def _release(self, connection: Connection, identities: Collection[Identity], now: datetime) -> Collection[Identity]:
        """Release what is held for some requests; returns those for which something was."""
        latest = latest_holds(connection, identities) if identities else {}
        held = {identity: found for identity, found in latest.items() if found.state is HoldState.HELD}
        if held:
            free(connection, list(held.values()), HoldState.RELEASED, now)
        return held.keys()

    def watch(self, identity: Identity, end: Callable[[Exception], None]) -> None:
        """Renew the hold of a request that runs; if it is lost all the same, call `end`, once and from any thread."""
        self._leases.watch(identity, end)

    def forget(self, identity: Identity) -> None:
        """Renew the hold of a request no longer: its record is on its way, and settles it."""
        self._leases.drop(identity)

    def renew(self) -> None:
        """Renew the holds of this process now; a thread does so as long as there are any.

        Raises:
            StoreError: The ledger cannot be written; they are tried again.
        """
        self._renew(self._leases.all())

    def _renew(self, leases: Sequence[Lease]) -> None:
        if not leases:
            return
        begun, seqs = time.monotonic(), {lease.seq for lease in leases}
        with self.ledger.transaction(after_usage=False) as connection:
            renewed = renew(connection, sorted(seqs), self._lease_time(connection) + self.lifetime)
            others = states(connection, sorted(seqs - renewed)) if seqs - renewed else {}
        for lease in leases:
            if lease.seq in renewed:
                lease.renewed_at = begun
            elif others.get(lease.seq) is HoldState.SETTLED:
                self._leases.discard(lease)
            elif others.get(lease.seq) is not HoldState.HELD:  # that one is only being changed right now
                self._hold_again(lease)

    def _hold_again(self, lease: Lease) -> None:
        """Hold once more what a request that runs may use, if its budgets have room for it."""
        try:
            granted = self._hold(Ask(lease.bound, {lease.offer: lease.cost}, lease.source), lease)
        except StoreError:
            raise
        except PolarError as error:
            self._leases.lose(lease, error)
            return
        if isinstance(granted, Refusal):
            self._leases.lose(lease, granted.error("its hold expired, and its reservation was given to others: "))
        elif granted.seq is None:
            self._leases.discard(lease)
        else:
            lease.seq, lease.renewed_at = granted.seq, time.monotonic()

    def release(self, tenant: str, request_id: str, *, source: str) -> bool:
        """Free what is held for a request that never began; True if something was."""
        identity = (tenant, source, request_id)
        self._leases.drop(identity)
        if not self._may_have_budgets(tenant):
            return False
        released = self._call(tenant, identity) is True
        if released:
            self._unanswered.discard(identity)
        return released

    def expire(self, tenant: str | AllTenants = ALL_TENANTS) -> int:
        """Expire the holds that are due and return their number; `reserve` does so for its own tenant."""
        with self.ledger.snapshot() as connection:
            due = open_holds(connection, _name_of(tenant), due=self._lease_time(connection, writes=False))
        expired = 0
        for name in sorted({open_hold.scope.tenant for open_hold in due}):
            with self._locked(name) as (connection, now):
                expired += self._expire(connection, name, now)
        return expired

    def _expire(self, connection: Connection, tenant: str, now: datetime) -> int:
        due = open_holds(connection, tenant, due=now)
        return free(connection, due, HoldState.EXPIRED, now, due=now) if due else 0

    def recheck(self, tenant: str | AllTenants, *, repair: bool = False) -> list[Difference]:
        """Compute every counter again from holds and usage, and return those that differ.

        Args:
            tenant: Whose.
            repair: Delete those that differ, so that they are computed when next needed.
        """
        with self.ledger.snapshot() as connection:
            names = {budget.tenant for budget in in_force(connection, _name_of(tenant))}
        differences = []
        for name in sorted(names):
            with self._locked(name) as (connection, _):
                differences += (wrong := list(wrong_counters(connection, name)))
                for difference in wrong if repair else ():
                    counters.drop(connection, difference.counted.budget)
        return differences

    def recheck_holds(self, tenant: str | AllTenants) -> list[WrongHold]:
        """The settled holds that differ from the stored usage and receipt of their request."""
        with self.ledger.snapshot() as connection:
            return list(wrong_holds(connection, _name_of(tenant)))

    @contextmanager
    def _locked(
        self, tenant: str, *, chained: bool = False, after_usage: bool = True
    ) -> Iterator[tuple[Connection, datetime]]:
        """A write transaction that has the tenant's counts to itself, and the time by the database's clock.

        Where `chained`, it has the tenant's chain as well, so that no usage is on its way that was stored without
        regard to the tenant's budgets.
        """
        with self.ledger.transaction(after_usage=after_usage) as connection:
            if chained:
                chain.lock_heads(connection, {tenant})
            lock_counts(connection, {tenant})
            yield connection, self._lease_time(connection)

    def _lease_time(self, connection: Connection, *, writes: bool = True) -> datetime:
        return database_time(connection, writes=writes) if self._clock is None else self._clock()

    def stop(self) -> None:
        """Let the thread that renews holds end, if there are none; a later hold starts another."""
        self._leases.close()

    def _may_have_budgets(self, tenant: str) -> bool:
        """False if the tenant had no budget a moment ago, so that its requests cost no transaction.

        Raises:
            StoreError: The ledger cannot be read, and the tenant had a budget or the budgets were never read.
        """
        try:
            self._tenants.refresh(SEEN_WITHIN_S)
        except StoreError:
            if self._tenants.value is None or tenant in self._tenants.value:
                self._tenants.forget()
                raise
        return tenant in self._tenants.known()

    def _tenants_with_budgets(self) -> Collection[str]:
        with self.ledger.snapshot() as connection:
            return with_budgets(connection)


def _name_of(tenant: str | AllTenants) -> str | None:
    return None if isinstance(tenant, AllTenants) else tenant
