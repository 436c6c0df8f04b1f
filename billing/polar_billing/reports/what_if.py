"""Scenarios for the recorded usage: other price books, other mixes of tiers, per-token prices.

Every assumption is in `assumptions`, to be shown beside the figures. Rounds each amount once. Knows no output format.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from polar_billing.prices.rating import COMPUTE
from polar_billing.reports import Part
from polar_billing.reports.mix import check_mixes
from polar_billing.values.money import (
    EXACT_SCALE,
    exact_difference,
    exact_sum,
    from_scaled,
    plain,
    quotient,
    round_half_even,
    to_scaled,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.hardware import HardwareReport
    from polar_billing.reports.mix import Mix, MixBasis, Savings
    from polar_billing.reports.summary import Summary
    from polar_billing.reports.totals import UsageTotals


class TenantOutcome(Part):
    """One tenant's charge in a scenario."""

    tenant: str
    charge: Decimal | None
    """None if nothing of it has a price."""
    difference: Decimal | None
    """Less what was charged; None where currencies differ."""


class Scenario(Part):
    """The recorded usage under one price book and one mix of tiers."""

    price_book: str
    content_hash: str | None
    """None for the books that the receipts were made by."""
    mix: str | None
    """In words; None for the tiers as recorded."""
    currency: str
    compute_units: Decimal
    """That would have been executed. Unit: CU."""
    charge: Decimal | None
    difference: Decimal | None
    """Less what was charged; None where currencies differ."""
    per_1000_requests: Decimal | None
    """Charge per 1,000 requests that have a price."""
    unrated: int
    """Requests that the book has no price for."""
    hardware_cost: Decimal | None
    """At the stated price per device-hour; None if none was stated, or in another currency."""
    margin: Decimal | None
    tenants: tuple[TenantOutcome, ...]


class TokenPricing(Part):
    """One tenant under compute-based and under per-token prices."""

    tenant: str
    per_compute: Decimal
    """The amount that was charged."""
    per_token: Decimal
    """The same tokens under the book's per-token reference."""
    at_equal_revenue: Decimal
    """The same, scaled so that all tenants together pay what they were charged."""
    difference: Decimal
    """`at_equal_revenue - per_compute`: above 0, the tenant pays less because compute is charged."""

    @property
    def winner(self) -> str:
        """Whether the tenant gains by compute-based prices at equal revenue, in words."""
        if not self.difference:
            return "the same"
        return "pays less per compute" if self.difference > 0 else "pays more per compute"


class WhatIf(Part):
    """The scenarios, with all that was assumed."""

    scenarios: tuple[Scenario, ...]
    assumptions: tuple[str, ...]


class UsageByBook(NamedTuple):
    """The usage by another price book, by tenant and tier."""

    book: PriceBook
    groups: Mapping[tuple[str, str | None], UsageTotals]


@dataclass(frozen=True)
class Charged:
    """The charges that scenarios are set beside."""

    summary: Summary
    price_books: str
    """Names of the books that it was charged by."""
    hardware: HardwareReport | None

    def scenario(
        self,
        book: PriceBook | None,
        mix: str | None,
        amounts: Mapping[str, Decimal],
        compute_units: Decimal,
        unrated: int,
    ) -> Scenario:
        """Set other amounts, by tenant, beside what was charged.

        No book stands for those of the receipts, no mix for the tiers as recorded.
        """
        summary = self.summary
        currency = (summary.currency if book is None else book.currency) or ""
        decimals = summary.decimals if book is None else book.statement_decimals
        same_currency = currency == summary.currency
        fine = max(decimals, summary.decimals)

        def difference(other: Decimal | None, charged: Decimal) -> Decimal | None:
            return exact_difference(other, charged, fine) if same_currency and other is not None else None

        charge = exact_sum(amounts.values(), decimals) if amounts else None
        executed = to_scaled(summary.figures.compute_units, COMPUTE.decimals)
        cost = None
        if same_currency and self.hardware is not None and executed:  # in proportion to executed compute
            stated = to_scaled(self.hardware.cost, summary.decimals) * to_scaled(compute_units, COMPUTE.decimals)
            cost = quotient(stated, executed, summary.decimals)
        rated = summary.figures.requests - unrated
        return Scenario(
            price_book=self.price_books if book is None else book.id,
            content_hash=None if book is None else book.content_hash,
            mix=mix,
            currency=currency,
            compute_units=compute_units,
            charge=charge,
            difference=difference(charge, summary.total),
            per_1000_requests=None
            if charge is None or rated < 1
            else quotient(to_scaled(charge, decimals) * 1_000, rated, decimals),
            unrated=unrated,
            hardware_cost=cost,
            margin=None if cost is None or charge is None else exact_difference(charge, cost, fine),
            tenants=tuple(
                TenantOutcome(tenant=each.tenant, charge=amount, difference=difference(amount, each.total))
                for each in summary.tenants
                for amount in [amounts.get(each.tenant)]
            ),
        )


def what_if(
    charged: Charged,
    repriced: Sequence[UsageByBook],
    mixes: Sequence[Mix],
    bases: Sequence[MixBasis],
    find: Callable[[str], Savings | None],
) -> WhatIf:
    """Work out what would have been: the same usage by other books, and by other mixes of tiers on each basis.

    `find` leads from a model's fingerprint to what its tiers were measured to save; None if nothing was.
    """
    savings = check_mixes(mixes, set().union(*(basis.models for basis in bases)), find) if mixes else {}
    assumptions = _assumptions(charged.summary, mixes, savings, [other.book for other in repriced])
    if charged.hardware is not None:
        assumptions += _hardware_assumptions(charged.hardware, charged.summary.currency)
    scenarios = [_by_book(charged, other) for other in repriced]
    for mix, basis in product(mixes, bases):
        decimals = charged.summary.decimals if basis.book is None else basis.book.statement_decimals
        amounts, units = basis.charges(mix, savings, decimals), basis.compute_units(mix, savings)
        scenarios.append(charged.scenario(basis.book, mix.text, amounts, units, basis.unrated))
    rated = charged.summary.currency is not None
    return WhatIf(scenarios=tuple(scenarios) if rated else (), assumptions=tuple(assumptions))


def _by_book(charged: Charged, repriced: UsageByBook) -> Scenario:
    """The usage as it was, under another book."""
    decimals = repriced.book.statement_decimals
    exact: Counter[str] = Counter()
    for (tenant, _), totals in repriced.groups.items():
        if totals.rated:
            exact[tenant] += totals.exact
    amounts = {
        tenant: from_scaled(round_half_even(amount, EXACT_SCALE, decimals), decimals)
        for tenant, amount in exact.items()
    }
    unrated = sum(totals.unrated.total() for totals in repriced.groups.values())
    return charged.scenario(repriced.book, None, amounts, charged.summary.figures.compute_units, unrated)


def token_pricing(summary: Summary) -> tuple[TokenPricing, ...]:
    """Compute-based beside per-token prices, for tenants that have both."""
    decimals = summary.decimals
    both = [
        (tenant.tenant, figures.charge, figures.charge_per_token)
        for tenant in summary.tenants
        if (figures := tenant.figures).charge is not None and figures.charge_per_token is not None
    ]
    charged = sum(to_scaled(compute, decimals) for _, compute, _ in both)
    by_token = sum(to_scaled(token, decimals) for _, _, token in both)

    def row(tenant: str, compute: Decimal, token: Decimal) -> TokenPricing:
        equal = quotient(to_scaled(token, decimals) * charged, by_token or 1, decimals)
        return TokenPricing(
            tenant=tenant,
            per_compute=compute,
            per_token=token,
            at_equal_revenue=equal,
            difference=exact_difference(equal, compute, decimals),
        )

    return tuple(row(*each) for each in both)


def _assumptions(summary: Summary, mixes: Sequence[Mix], savings: Savings, books: Iterable[PriceBook]) -> list[str]:
    """All that the figures rest on, one sentence each."""
    said = ["Tokens, requests and their times are as recorded; nobody would have used more or less at another price."]
    said += [
        f"Price book {book.id} ({book.content_hash[:12]}) rates each request by its time of use, without fees, "
        "minimums, bands and credits of plans."
        for book in books
    ]
    if mixes:
        said.append(
            "A mix is dealt out to each tenant's requests evenly: a tier's part has the same prompts and answers as "
            "the whole, and costs full depth's compute less what the tier was measured to save."
        )
    recorded = {tier.tier: tier.figures for tier in summary.tiers}
    for tier in dict.fromkeys(tier for mix in mixes for tier in mix.shares):
        saving = savings[tier]
        line = f"{tier} saves {_percent(saving.saved)} of full depth: {saving.source}."
        own = recorded.get(tier)
        if own is not None and own.saved_share is not None:
            line += f" On this usage it saved {_percent(own.saved_share)} over {own.requests:,} requests."
        said.append(line)
    if any(tenant.figures.charge_per_token is not None for tenant in summary.tenants):
        said.append(
            "Per-token prices are the reference of the price book. At equal revenue they are multiplied by one factor, "
            "so that all tenants together pay what they were charged."
        )
    return said


def _hardware_assumptions(hardware: HardwareReport, currency: str | None) -> list[str]:
    """The same for the cost of the hardware."""
    price = f"{plain(hardware.per_device_hour)} {currency or ''}".strip()
    rate = f"{plain(hardware.tokens_per_second)} tokens/s"
    if hardware.measured == "stated":
        source = f"A device costs {price} per hour and serves {rate}, prompt and answer together, as stated."
    else:
        source = (
            f"A device costs {price} per hour, as stated. {rate} is measured: all tokens, over the "
            f"{plain(hardware.device_seconds)} s in which {', '.join(hardware.devices)} had at least one request."
        )
    return [
        source,
        "Idle hours are not in the cost. Device time is shared out by executed FLOPs, and requests that are free or "
        "unrated cost like others.",
    ]


def _percent(share: Decimal) -> str:
    percent = round(share * 100, 2)
    return f"{plain(percent or abs(percent))} %"
