"""Charges for a tenant's usage over a period, line by line: summed usage × book → exact lines. Pure.

Per phase of constant terms, in this order:

1. usage at the rates of a request: one line per tier, item and stretch of constant rates;
2. items that the plan prices over the period (see `bands`), instead of 1;
3. the discount, off 1 and 2;
4. a top-up to the minimum, where 1 to 3 come to less;
5. the flat fee;
6. service credits of tiers whose promise was missed: a share of their part of 1 to 3.

Amounts are integers of 10^-30 of the currency, exact except where a percentage or a part of a period divides
them; such a line is rounded half to even to 10^-30 once, and the parts of a fee sum to the fee.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Final

from polar_billing.prices.entries import tier_order
from polar_billing.prices.rating import ITEMS, ChargeLine, charge_lines, free_lines, rate_in
from polar_billing.statements.bands import period_lines
from polar_billing.statements.lines import ExactLine, bounds
from polar_billing.statements.promises import service_credits, unsettled_promises
from polar_billing.values.money import EXACT_SCALE, divide_half_even, plain, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime
    from decimal import Decimal

    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.plans import Terms
    from polar_billing.statements.bands import Rated
    from polar_billing.statements.lines import PeriodUsage, Phase, Stretch, Use
    from polar_billing.values.periods import Period


_PERCENT: Final = 100 * 10**6
_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True)
class Charges:
    """Exact lines, and the usage that is on none of them."""

    lines: tuple[ExactLine, ...]
    unrated: dict[str, int]
    """Reason → requests; they are in no amount."""
    unsettled: tuple[str, ...] = ()
    """Promises that the audits do not settle, in words."""


def charges_of(book: PriceBook, period: Period, phases: Sequence[Phase], usage: PeriodUsage) -> Charges:
    """Rate a tenant's usage over a period; each phase is charged its part of a fee, by time."""
    unrated: Counter[str] = Counter()
    lines: list[ExactLine] = []
    for phase in phases:
        uses = [use for use in usage.uses if use.stretch in phase.stretches]
        uses.sort(key=lambda use: (use.stretch.since, tier_order(use.tier), use.outcome, use.beyond or ""))
        rated = _rated(uses, book, unrated)
        charged = [(use, rate) for use, rate in rated if use.outcome not in book.free_outcomes]
        used = list(_usage(charged, phase.terms))
        for item in () if phase.terms is None else phase.terms.items:
            used += period_lines(item, phase, charged)
        for use, rate in (pair for pair in rated if pair[0].outcome in book.free_outcomes):
            free = free_lines(use.counts, rate.entry, use.outcome)
            used += (_line(line, use.stretch, use.tier, use.outcome) for line in free)
        lines += used
        if phase.terms is not None:
            lines += _terms(phase, phase.terms, period, used, charged, usage)
    unsettled = (text for phase in phases for text in unsettled_promises(phase, usage))
    return Charges(tuple(lines), dict(sorted(unrated.items())), tuple(unsettled))


def _rated(uses: Iterable[Use], book: PriceBook, unrated: Counter[str]) -> list[Rated]:
    rated: list[Rated] = []
    for use in uses:
        entry = use.stretch.entry
        if entry is None:
            span = f"{use.stretch.since.isoformat()} until {use.stretch.until.isoformat()}"
            unrated[f"price book {book.id!r} has no price from {span}"] += use.counts.requests
            continue
        rate = use.beyond or rate_in(entry, use.tier, book)
        if isinstance(rate, str):
            unrated[rate] += use.counts.requests
        else:
            rated.append((use, rate))
    return rated


def _usage(charged: list[Rated], terms: Terms | None) -> Iterator[ExactLine]:
    """Lines at the rates of a request, of the items that the plan does not price over the period."""
    replaced = {ITEMS[item.per].name for item in terms.items} if terms is not None else set()
    for _, members in groupby(charged, key=lambda pair: (pair[0].stretch.since, pair[0].tier)):  # already in order
        (use, rate), *others = members
        counts = sum((other.counts for other, _ in others), use.counts)
        for line in charge_lines(counts, rate.entry, rate.multiplier):
            if line.item.name not in replaced:
                yield _line(line, use.stretch, use.tier)


def _line(line: ChargeLine, stretch: Stretch, tier: str | None, outcome: str | None = None) -> ExactLine:
    return ExactLine(
        kind="usage",
        item=line.item.name,
        exact=line.exact,
        since=stretch.since,
        until=stretch.until,
        tier=tier,
        quantity=line.quantity,
        unit=line.item.unit,
        unit_price=line.unit_price,
        outcome=outcome,
    )


def _terms(
    phase: Phase, terms: Terms, period: Period, used: list[ExactLine], charged: list[Rated], usage: PeriodUsage
) -> Iterator[ExactLine]:
    subtotal = sum(line.exact for line in used)
    discount = -divide_half_even(subtotal * to_scaled(terms.discount_percent or 0, 6), _PERCENT)
    if terms.discount_percent and subtotal:
        item = f"discount {plain(terms.discount_percent)} % off {phase.plan}"
        yield ExactLine("discount", item, discount, phase.since, phase.until)
    short = _part_of(terms.minimum, phase, period) - subtotal - discount
    if terms.minimum is not None and short > 0:
        yield ExactLine("minimum", f"minimum of {phase.plan}", short, phase.since, phase.until)
    if terms.flat_fee is not None:
        fee = _part_of(terms.flat_fee, phase, period)
        yield ExactLine("fee", f"flat fee of {phase.plan}", fee, phase.since, phase.until)
    yield from service_credits(phase, terms, used, charged, usage)


def _part_of(amount: Decimal | None, phase: Phase, period: Period) -> int:
    """A phase's part of an amount per period, by time; the parts of all phases sum to the amount."""
    since, until = bounds(period)
    exact = to_scaled(amount or 0, EXACT_SCALE)

    def up_to(moment: datetime) -> int:
        return divide_half_even(exact * ((moment - since) // _MICROSECOND), (until - since) // _MICROSECOND)

    return up_to(phase.until) - up_to(phase.since)
