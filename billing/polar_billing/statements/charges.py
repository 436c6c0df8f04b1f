"""Charges for a tenant's usage over a period, line by line: summed usage × book → exact lines. Pure.

Per phase of constant terms, in this order:

1. usage at the rates of a request: one line per tier, item and stretch of constant rates;
2. items that the plan prices over the period (see `bands`), instead of 1;
3. the discount, off 1 and 2;
4. a top-up to the minimum, if 1 to 3 sum to less;
5. the flat fee;
6. service credits of tiers whose promise was missed: a share of their part of 1 to 3.

Amounts are integers of 10^-30 of the currency, exact except where a percentage or a part of a period divides
them; such a line is rounded half to even to 10^-30 once, and the parts of a fee sum to the fee.

A promise is about latency, measured by usage records, or about agreement with full depth, measured by audits of the
tenant's own requests. Agreement is settled if there are enough audits; otherwise the statement says so, and nothing is
credited.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Final

from polar_billing.prices.entries import tier_order
from polar_billing.prices.rating import ITEMS, ChargeLine, charge_lines, free_lines, rate_in
from polar_billing.statements.bands import period_lines, pool_weights
from polar_billing.statements.lines import ExactLine, bounds
from polar_billing.values.money import EXACT_SCALE, divide_half_even, from_scaled, plain, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime
    from decimal import Decimal

    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.plans import Promise, Terms
    from polar_billing.statements.bands import Rated
    from polar_billing.statements.lines import Agreement, PeriodUsage, Phase, Stretch, Use
    from polar_billing.values.periods import Period


_PERCENT: Final = 100 * 10**6
"""The whole, in the units of a percentage with 6 decimals."""
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
    unsettled = (text for phase in phases for text in _unsettled_promises(phase, usage))
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
    yield from _service_credits(phase, terms, used, charged, usage)


def _part_of(amount: Decimal | None, phase: Phase, period: Period) -> int:
    """A phase's part of an amount per period, by time; the parts of all phases sum to the amount."""
    since, until = bounds(period)
    exact = to_scaled(amount or 0, EXACT_SCALE)

    def up_to(moment: datetime) -> int:
        return divide_half_even(exact * ((moment - since) // _MICROSECOND), (until - since) // _MICROSECOND)

    return up_to(phase.until) - up_to(phase.since)


def _service_credits(
    phase: Phase, terms: Terms, used: Sequence[ExactLine], rated: Sequence[Rated], usage: PeriodUsage
) -> Iterator[ExactLine]:
    """One line for each tier that missed its promise in a phase, off its usage lines before the discount."""
    for tier, promise in sorted(terms.promises.items()):
        reasons = _missed(
            promise, usage.latency_ns_p95.get((phase.since, tier)), usage.agreement.get((phase.since, tier))
        )
        base = _share_of(tier, terms, used, rated)
        if not reasons or not base:
            continue
        kept = _PERCENT - to_scaled(terms.discount_percent or 0, 6)
        part = divide_half_even(base * kept * to_scaled(promise.credit_percent, 6), _PERCENT**2)
        yield ExactLine(
            kind="service credit",
            item=f"service credit {plain(promise.credit_percent)} %",
            exact=-part,
            since=phase.since,
            until=phase.until,
            tier=tier,
            note="; ".join(reasons),
        )


def _missed(promise: Promise, latency_ns: int | None, agreement: Agreement | None) -> list[str]:
    """Reasons that a promise was missed, empty if it was kept; what was not measured was not missed."""
    reasons = []
    # The reasons become notes of statement lines: their wording is part of issued statements.
    latency_max = promise.latency_ms_p95_max
    if latency_max is not None and latency_ns is not None and latency_ns > latency_max * 10**6:
        reasons.append(f"p95 latency {latency_ns / 10**6:.1f} ms, promised {latency_max} ms")
    if promise.agreement_min is not None and agreement is not None and agreement.compared >= promise.audits_min:
        agreement_min = to_scaled(promise.agreement_min, 6)
        if agreement.weight_agreed * 10**6 < agreement_min * agreement.weight:
            counts = f"{agreement.agreed} of {agreement.compared} audited answers agreed"
            # Rounded down, so that what is shown is below what was promised.
            share = plain(from_scaled(agreement.weight_agreed * 10**4 // agreement.weight, 2))
            weighed = f", {share} % by weight" if agreement.weight != agreement.compared * 10**12 else ""
            reasons.append(f"{counts}{weighed}, promised {plain(from_scaled(agreement_min, 4))} %")
    return reasons


def _unsettled_promises(phase: Phase, usage: PeriodUsage) -> Iterator[str]:
    """One sentence for each promise on agreement of a phase that too few audits were made of, if the tier was used."""
    used = {use.tier for use in usage.uses if use.stretch in phase.stretches}
    for tier, promise in sorted(phase.terms.promises.items()) if phase.terms is not None else ():
        agreement = usage.agreement.get((phase.since, tier))
        if promise.agreement_min is None or agreement is None:
            continue
        if tier in used and agreement.compared < promise.audits_min:
            span = f"from {phase.since.isoformat()} until {phase.until.isoformat()}"
            few = f"{agreement.compared} audits {span} are fewer than the {promise.audits_min} that it takes"
            yield f"{tier}: {few} to say whether {plain(promise.agreement_min)} of its answers agreed"


def _share_of(tier: str, terms: Terms, used: Sequence[ExactLine], rated: Sequence[Rated]) -> int:
    """A tier's part of the usage lines; of pooled lines, in proportion to its weighted quantity."""
    own = sum(line.exact for line in used if line.kind == "usage" and line.tier == tier)
    for item in terms.items:
        if item.pool:
            name = ITEMS[item.per].name
            pooled = sum(line.exact for line in used if line.kind == "pool" and line.item.startswith(f"{name} ("))
            weights = pool_weights(item, rated)
            if weights.total():
                own += divide_half_even(pooled * weights[tier], weights.total())
    return own
