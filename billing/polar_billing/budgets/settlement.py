"""Settle holds: what was held for a request becomes what it used, in the transaction that stores its record.

Writers of records pass `settle` to the ledger, which calls it once per transaction with the new entries, after their
rows are written; the heads of the tenants' chains are locked by then, and their counters from here on. A record without
a hold (because it expired, or because the record came from elsewhere) still counts in existing counters. Nothing is
refused here for lack of budget: what was used is used. Knows no prices.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from sqlalchemy import bindparam, select, update

from polar_billing.budgets.budget import COMPUTE_UNIT, to_count
from polar_billing.budgets.counters import Change, Scope, change, touched
from polar_billing.budgets.holds import Hold, HoldState, latest_holds, resolve
from polar_billing.ledger.connection import KeyedQuery, lock_counts
from polar_billing.ledger.records import INTERRUPTED_TAG
from polar_billing.ledger.schema import budget_table, hold_table
from polar_billing.values.money import STORED_SCALE, to_scaled

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from sqlalchemy import Connection, Row

    from polar_billing.ledger.records import Entry


_NOTHING: Final = Decimal(0)
_WITH_BUDGETS: Final = select(budget_table.c.tenant).distinct()
_WITH_BUDGETS_OF: Final = KeyedQuery(_WITH_BUDGETS, budget_table.c.tenant)

Amounts = tuple[Scope, Decimal, int]
"""A scope, and the money and FLOPs that count in it."""


def settle(connection: Connection, entries: Sequence[Entry]) -> None:
    """Settle the holds of requests whose records this transaction has stored as new, and count what they used."""
    tenants = with_budgets(connection, {entry.record.tenant for entry in entries})
    budgeted = [entry for entry in entries if entry.record.tenant in tenants]
    if not budgeted:
        return
    lock_counts(connection, tenants)
    holds = latest_holds(connection, [entry.identity for entry in budgeted])
    spent: list[Amounts] = []
    settled: list[tuple[Hold, Amounts]] = []
    for entry in budgeted:
        hold = holds.get(entry.identity)
        used = _used(entry, hold)
        spent.append(used)
        if hold is not None and hold.state is HoldState.HELD:
            settled.append((hold, used))
    _resolve(connection, settled)
    released = _release_interrupted(connection, budgeted)
    _count(connection, spent, [*(hold for hold, _ in settled), *released])


def _release_interrupted(connection: Connection, entries: Iterable[Entry]) -> list[Hold]:
    """Release what is held for requests whose process was killed: what they used is stored under other ids."""
    begun = {
        (record.tenant, entry.source, name): record.started_at
        for entry in entries
        if (name := (record := entry.record).tags.get(INTERRUPTED_TAG)) is not None
    }
    if not begun:
        return []
    holds = [
        hold
        for identity, hold in latest_holds(connection, begun).items()
        if hold.state is HoldState.HELD and hold.scope.at == begun[identity]  # else it is of another attempt
    ]
    resolved = resolve(connection, [hold.seq for hold in holds], HoldState.RELEASED, datetime.now(UTC))
    return [hold for hold in holds if hold.seq in resolved]


def with_budgets(connection: Connection, tenants: Collection[str] | None = None) -> set[str]:
    """The tenants, out of these or of all, that ever had a budget."""
    rows = connection.execute(_WITH_BUDGETS) if tenants is None else _WITH_BUDGETS_OF.run(connection, tenants)
    return set(rows.scalars())


def free(
    connection: Connection, holds: Sequence[Hold], state: HoldState, now: datetime, *, due: datetime | None = None
) -> int:
    """Resolve open holds without use, as released or expired; see `holds.resolve`. Returns their number."""
    resolved = resolve(connection, [hold.seq for hold in holds], state, now, due=due)
    _count(connection, [], [hold for hold in holds if hold.seq in resolved])
    return len(resolved)


def _used(entry: Entry, hold: Hold | None) -> Amounts:
    """A record's share of the counters, by its own tags and time, and at the cost on its receipt."""
    record = entry.record
    scope = Scope.of(record.tenant, record.tags, record.started_at, entry.book.currency)
    cost = entry.cost
    if cost is None:
        # An unrated record counts what was held for it: it is not known to have cost less.
        cost = hold.cost_bound if hold is not None and hold.state is HoldState.HELD else _NOTHING
    return scope, cost, record.flops.total


def _resolve(connection: Connection, settled: Sequence[tuple[Hold, Amounts]]) -> None:
    if not settled:
        return
    changes = {"state": str(HoldState.SETTLED), "resolved_at": datetime.now(UTC)}
    changes |= {"currency": bindparam("in_currency"), "cost": bindparam("used_cost"), "flops": bindparam("used_flops")}
    # A request that a killed process had begun is served later, under the hold of the first attempt.
    changes |= {"at": bindparam("used_at")}
    statement = update(hold_table).where(hold_table.c.seq == bindparam("of_seq")).values(changes)
    rows = [
        {
            "of_seq": hold.seq,
            "in_currency": scope.currency,
            "used_at": scope.at,
            "used_cost": cost,
            "used_flops": flops,
        }
        for hold, (scope, cost, flops) in settled
    ]
    connection.execute(statement, rows)


def _count(connection: Connection, spent: Iterable[Amounts], freed: Iterable[Hold]) -> None:
    """Update every counter that exists."""
    used = list(spent)
    held: list[Amounts] = [(hold.scope, hold.cost_bound, hold.flops_bound) for hold in freed]

    def total(counter: Row[tuple[int, ...]], counted: Iterable[Amounts]) -> int:
        return sum(
            to_count(flops if counter.unit == COMPUTE_UNIT else to_scaled(money, STORED_SCALE), counter.decimals)
            for scope, money, flops in counted
            if scope.counts_in(counter)
        )

    counters = touched(connection, [scope for scope, _, _ in [*used, *held]])
    change(connection, ((each.seq, Change(spent=total(each, used), freed=total(each, held))) for each in counters))
