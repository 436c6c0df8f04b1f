"""The maximum cost of a request's offers, and which of them its budgets have room for. Pure: no clock, no database.

An offer fits if every budget that covers the request has room for the maximum it can use. The first that fits is
served; a budget that refuses ends the search, and one with `shallower` allows the next, cheaper offer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polar_billing.budgets.budget import COMPUTE_UNIT, Budget, OverBudget, to_count
from polar_billing.errors import CurrencyMixError
from polar_billing.prices.quote import quote_offers
from polar_billing.values.money import STORED_SCALE, plain, to_scaled
from polar_billing.values.periods import load_zone
from polar_sdk.errors import BudgetExceededError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from polar_billing.prices.book import PriceBook
    from polar_billing.values.periods import Period
    from polar_sdk.usage import UsageBound


@dataclass(frozen=True)
class Cost:
    """The maximum that an offer can use. Counts of 10^-12: of the currency, and of a compute unit (FLOPs)."""

    currency: str
    money: int | None
    """None if the price book has no price for it."""
    flops: int
    unrated: str | None = None
    """Why there is no price."""


@dataclass(frozen=True)
class Standing:
    """One budget in one window. Unit of the counts: 10^-decimals of the budget's unit."""

    budget: Budget
    period: Period
    spent: int
    held: int

    @property
    def resets_at(self) -> datetime | None:
        """The end of the window, in the budget's time zone; None if it has none."""
        until = self.period.until
        return None if until is None else until.astimezone(load_zone(self.budget.zone))

    @property
    def left(self) -> int:
        """The amount neither spent nor held; negative if the limit was lowered, or if usage came without a hold."""
        return self.budget.limit_count - self.spent - self.held


@dataclass(frozen=True)
class Refusal:
    """Why a request is not served: the budget without room, and what the request would use."""

    standing: Standing
    cost: Cost

    def error(self, what_happened: str = "") -> BudgetExceededError:
        """The error, which says whose budget it is, what is left, what was needed and when it resets."""
        budget, standing = self.standing.budget, self.standing
        amount = needed(self.cost, budget)
        resets = standing.resets_at
        what = f"{what_happened}the {budget.window}'s budget of {budget.who}"
        if amount is None:
            message = f"{what} cannot be kept, since the request has no price: {self.cost.unrated}."
        else:
            message = (
                f"{what} has {budget.say(standing.left)} left of {budget.say(budget.limit_count)} "
                f"({budget.say(standing.spent)} spent, {budget.say(standing.held)} held); "
                f"the request may use up to {budget.say(amount)}."
            )
        return BudgetExceededError(
            message if resets is None else f"{message} It resets at {resets.isoformat()}.",
            hint="Lower max_tokens, ask for a cheaper tier, or raise the budget with `polar budget set`.",
            level=budget.level,
            name=budget.tenant if budget.name is None else budget.name,
            limit=plain(budget.amount(budget.limit_count)),
            spent=plain(budget.amount(standing.spent)),
            remaining=plain(budget.amount(standing.left)),
            needed=None if amount is None else plain(budget.amount(amount)),
            unit=budget.unit,
            resets_at=resets,
        )


def costs(bound: UsageBound, book: PriceBook) -> list[Cost]:
    """The maximum that each offer of a request can cost under a price book."""
    return [
        Cost(
            quoted.currency,
            None if quoted.amount is None else to_scaled(quoted.amount, STORED_SCALE),
            offer.flops_bound,
            quoted.unrated,
        )
        for offer, quoted in zip(bound.offers, quote_offers(book, bound), strict=True)
    ]


def needed(cost: Cost, budget: Budget) -> int | None:
    """The amount that a cost takes from a budget, in its counts; None if that is not known.

    Raises:
        CurrencyMixError: Budget and price book are in different currencies.
    """
    if budget.unit == COMPUTE_UNIT:
        return to_count(cost.flops, budget.decimals)
    if budget.unit != cost.currency:
        raise CurrencyMixError(
            f"the budget of {budget.who} is in {budget.unit}, the price book in {cost.currency}.",
            hint=f"Set it in {cost.currency} or CU, and close this one with `polar budget close`.",
        )
    return None if cost.money is None else to_count(cost.money, budget.decimals)


def choose(standings: Sequence[Standing], offers: Sequence[Cost]) -> int | Refusal:
    """Index of the first offer, in order of preference, that fits every budget, or why none can be served."""
    refusal: Refusal | None = None
    for index, offer in enumerate(offers):
        amounts = [needed(offer, standing.budget) for standing in standings]
        pairs = zip(standings, amounts, strict=True)
        over = [standing for standing, amount in pairs if amount is None or amount > standing.left]
        if not over:
            return index
        strict = [standing for standing in over if standing.budget.over_budget is OverBudget.REFUSE]
        refusal = Refusal((strict or over)[0], offer)
        if strict:
            break
    assert refusal is not None  # there is at least one offer
    return refusal
