"""`Budgets`: set them, hold money and compute for a request before it runs, and say what is left.

Every hold covers all budgets of a request in one transaction, which no other of the same tenant overlaps: the head of
the tenant's chain is locked first, as it is by whoever stores usage. What cannot be decided is refused. On PostgreSQL
the clock is the database server's, so that the clocks of hosts need not agree. Rates nothing itself (see
`prices.quote`).
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import func, select

from polar_billing.budgets import counters
from polar_billing.budgets.audit import Difference, WrongHold, wrong_counters, wrong_holds
from polar_billing.budgets.budget import COMPUTE_UNIT, Budget, Level
from polar_billing.budgets.holds import Hold, HoldState, costs, hold, in_force, latest_holds, open_holds, write_budget
from polar_billing.budgets.offers import Refusal, Standing
from polar_billing.budgets.settlement import free, with_budgets
from polar_billing.errors import BudgetError, CurrencyMixError, StoreError
from polar_billing.ledger import chain
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, AllTenants
from polar_billing.values.memo import Changes, Remembered
from polar_billing.values.periods import Period, Window

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from sqlalchemy import Connection

    from polar_billing.prices.book import PriceBook
    from polar_sdk.usage import UsageBound


HOLD_LIFETIME: Final = timedelta(minutes=15)
"""After this time a hold that nobody resolved expires: its process is gone. Longer than any answer takes."""
SEEN_WITHIN_S: Final = 5.0
"""How long a process may miss the first budget that another process sets for a tenant. Unit: seconds."""


_changes: Final = Changes()


class Budgets:
    """The budgets of a ledger. Safe in several threads and processes.

    Args:
        ledger: A ledger, a URL or the path of a SQLite file; None for `POLAR_LEDGER` or the default file.
        lifetime: How long until a hold that nobody resolved expires.
        clock: Returns the time, UTC; None for the database server's clock, or this machine's with SQLite.
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
        self._tenants = Remembered(self._tenants_with_budgets, _changes)

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
        with self._locked(budget.tenant) as (connection, now):
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
        with self._locked(tenant) as (connection, now):
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
        """What is spent, held and left of every budget in the window of `at`; None for now."""
        with self.ledger.snapshot() as connection:
            moment = self._now(connection) if at is None else at
            budgets = in_force(connection, _name_of(tenant))
            windows = ((budget, Period.containing(moment, budget.window, budget.zone)) for budget in budgets)
            return [counters.read_standing(connection, budget, period) for budget, period in windows]

    def holds(self, tenant: str | AllTenants) -> list[Hold]:
        """The open holds, the oldest first."""
        with self.ledger.snapshot() as connection:
            return open_holds(connection, _name_of(tenant))

    def reserve(self, bound: UsageBound, book: PriceBook, *, source: str) -> int:
        """Hold the maximum that a request may use, in every budget that covers it or in none.

        The same call again, for example after a lost answer, returns the same offer and holds nothing more.

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
        with self._locked(bound.tenant) as (connection, now):
            self._expire(connection, bound.tenant, now)
            chosen = hold(connection, bound, offers, source=source, now=now, lifetime=self.lifetime)
        if isinstance(chosen, Refusal):
            raise chosen.error()
        return chosen

    def release(self, tenant: str, request_id: str, *, source: str) -> bool:
        """Free what is held for a request that never began; True if something was."""
        if not self._may_have_budgets(tenant):
            return False
        identity = (tenant, source, request_id)
        with self._locked(tenant) as (connection, now):
            latest = latest_holds(connection, [identity]).get(identity)
            if latest is None or latest.state is not HoldState.HELD:
                return False
            free(connection, [latest], HoldState.RELEASED, now)
        return True

    def expire(self, tenant: str | AllTenants = ALL_TENANTS) -> int:
        """Expire the holds that are due and return their number; `reserve` does so for its own tenant."""
        with self.ledger.snapshot() as connection:
            due = open_holds(connection, _name_of(tenant), due=self._now(connection))
        expired = 0
        for name in sorted({open_hold.scope.tenant for open_hold in due}):
            with self._locked(name) as (connection, now):
                expired += self._expire(connection, name, now)
        return expired

    def _expire(self, connection: Connection, tenant: str, now: datetime) -> int:
        due = open_holds(connection, tenant, due=now)
        if due:
            free(connection, due, HoldState.EXPIRED, now)
        return len(due)

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
    def _locked(self, tenant: str) -> Iterator[tuple[Connection, datetime]]:
        """A write transaction that has the tenant to itself, and the current time."""
        with self.ledger.transaction() as connection:
            chain.lock_heads(connection, {tenant})
            yield connection, self._now(connection)

    def _now(self, connection: Connection) -> datetime:
        if self._clock is not None:
            return self._clock()
        if connection.dialect.name == "postgresql":
            moment: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
            return moment.astimezone(UTC)
        return datetime.now(UTC)

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
