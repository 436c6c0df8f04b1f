"""Hold what a request may use, in every budget that covers it, inside one transaction.

Takes an open transaction that has locked the head of the tenant's chain, and in which due holds have expired. Opens
nothing and asks no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_billing.budgets import counters
from polar_billing.budgets.choose import Cost, Refusal, Standing, choose, needed
from polar_billing.budgets.records import Hold, HoldState, fingerprint, in_force, insert_hold, latest_holds
from polar_billing.errors import ConflictError, StoreError
from polar_billing.money import STORED_SCALE, from_scaled, to_scaled
from polar_billing.periods import Period
from polar_billing.pricing.bound import quote

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from sqlalchemy import Connection

    from polar_billing.price_book import PriceBook
    from polar_sdk.usage import Offer, UsageBound

__all__ = ["costs", "hold"]


def costs(bound: UsageBound, book: PriceBook) -> list[Cost]:
    """The most that each offer of a request can cost under a price book."""
    return [_cost(bound, offer, book) for offer in bound.offers]


def _cost(bound: UsageBound, offer: Offer, book: PriceBook) -> Cost:
    most = quote(
        book, bound.tenant, offer.tier, offer.flops_bound, bound.tokens_input, bound.tokens_output_max, bound.at
    )
    money = None if most.amount is None else to_scaled(most.amount, STORED_SCALE)
    return Cost(most.currency, money, offer.flops_bound, most.unrated)


def hold(
    connection: Connection,
    bound: UsageBound,
    offers: Sequence[Cost],
    *,
    source: str,
    now: datetime,
    lifetime: timedelta,
) -> int | Refusal:
    """Hold the first offer that fits every budget.

    Returns:
        Its index, or why there is none, in which case nothing is held.

    Raises:
        ConflictError: The request id is in use, or has been used.
        CurrencyMixError: A budget is in another currency than the price book.
    """
    identity = (bound.tenant, source, bound.request_id)
    last = latest_holds(connection, [identity]).get(identity)
    if last is not None and last.state in {HoldState.HELD, HoldState.SETTLED}:
        return _repeated(last, bound)
    scope = counters.Scope.of(bound.tenant, bound.tags, bound.at, offers[0].currency)
    found = _standings(connection, scope, offers[0])
    chosen = choose([standing for _, standing in found], offers)
    if isinstance(chosen, Refusal) or not found:
        return chosen
    cost = offers[chosen]
    _take(connection, found, cost)
    values: dict[str, Any] = {"source": source, "request_id": bound.request_id, "fingerprint": fingerprint(bound)}
    values |= {"attempt": 1 if last is None else last.attempt + 1, "offer": chosen, "state": str(HoldState.HELD)}
    values |= {"cost_bound": from_scaled(cost.money or 0, STORED_SCALE), "flops_bound": cost.flops}
    insert_hold(connection, scope, {**values, "held_at": now, "expires_at": now + lifetime})
    return chosen


def _standings(connection: Connection, scope: counters.Scope, first: Cost) -> list[tuple[int, Standing]]:
    budgets = in_force(connection, scope.tenant, scope.names)
    for budget in budgets:
        needed(first, budget)  # before any counter: one of another currency cannot be kept
    windows = [(budget, Period.containing(scope.at, budget.window, budget.zone)) for budget in budgets]
    return counters.standings(connection, windows, scope)


def _repeated(last: Hold, bound: UsageBound) -> int:
    """The answer of the first time, if it is the same call."""
    if last.state is HoldState.HELD and last.fingerprint == fingerprint(bound):
        return last.offer
    how = "was served before" if last.state is HoldState.SETTLED else "is being served, with other content"
    raise ConflictError(
        f"request {bound.request_id!r} of tenant {bound.tenant!r} {how}.", hint="Give every request an id of its own."
    )


def _take(connection: Connection, found: list[tuple[int, Standing]], cost: Cost) -> None:
    amounts = {seq: (needed(cost, one.budget) or 0, one.budget.limit_count) for seq, one in found}
    if not counters.raise_held(connection, amounts):
        # Never reached while every writer locks the tenant first; should one not, nothing is held.
        raise StoreError(f"a budget of tenant {found[0][1].budget.tenant!r} changed meanwhile.", hint="Try again.")
