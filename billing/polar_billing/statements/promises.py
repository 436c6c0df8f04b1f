"""Promises of tiers: the service credits for those that were missed, and those that cannot be settled.

A promise is about latency, which usage records say, or about agreement with full depth, which audits of the tenant's
own requests say. Agreement is settled where enough of them were made; where not, a statement says so, and nothing is
credited. Knows no database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polar_billing.prices.rating import ITEMS
from polar_billing.statements.bands import pool_weights
from polar_billing.statements.lines import ExactLine
from polar_billing.values.money import divide_half_even, from_scaled, plain, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_billing.prices.plans import Promise, Terms
    from polar_billing.statements.bands import Rated
    from polar_billing.statements.lines import Agreement, PeriodUsage, Phase

_PERCENT: Final = 100 * 10**6
"""The whole, in the units of a percentage with 6 decimals."""


def service_credits(
    phase: Phase, terms: Terms, used: Sequence[ExactLine], rated: Sequence[Rated], usage: PeriodUsage
) -> Iterator[ExactLine]:
    """One line for each tier that missed its promise in a phase, off its usage lines before the discount."""
    for tier, promise in sorted(terms.promises.items()):
        reasons = missed(
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


def missed(promise: Promise, latency_ns: int | None, agreement: Agreement | None) -> list[str]:
    """Reasons that a promise was missed, empty where it was kept; what was not measured was not missed."""
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


def unsettled_promises(phase: Phase, usage: PeriodUsage) -> Iterator[str]:
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
