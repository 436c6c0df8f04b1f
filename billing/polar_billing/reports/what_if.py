"""What the recorded usage would have come to otherwise: other price books, other mixes of tiers, per-token prices.

A mix is applied to each tenant's requests: tokens and requests stay as recorded, the compute of a tier is full depth's
less what the tier was measured to save, and each part is charged by the tier's multiplier. Every assumption is in
`assumptions`, to be shown beside the figures. Rounds each amount once. Knows no output format.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from polar_billing.errors import QueryError
from polar_billing.prices.rating import COMPUTE, Counts, charge_lines
from polar_billing.reports.mix import SHARE_DECIMALS, savings_of
from polar_billing.values.money import (
    EXACT_SCALE,
    divide_half_even,
    exact_sum,
    from_scaled,
    plain,
    round_half_even,
    to_scaled,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.entries import PriceEntry
    from polar_billing.reports.hardware import HardwareReport
    from polar_billing.reports.mix import Mix, Savings
    from polar_billing.reports.report import Report, TenantReport

_PERCENT: Final = 100 * 100
"""A whole in hundredths of a percent."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class TenantOutcome(_Part):
    """What one tenant would have paid."""

    tenant: str
    charge: Decimal | None
    """None where nothing of it has a price."""
    difference: Decimal | None
    """Less what was charged; None where currencies differ."""


class Scenario(_Part):
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
    """At the stated price per device-hour; None where none was stated, or in another currency."""
    margin: Decimal | None
    tenants: tuple[TenantOutcome, ...]


class TokenPricing(_Part):
    """One tenant under compute-based and under per-token prices."""

    tenant: str
    per_compute: Decimal
    """What was charged."""
    per_token: Decimal
    """The same tokens under the book's per-token reference."""
    at_equal_revenue: Decimal
    """The same, scaled so that all tenants together pay what they were charged."""
    difference: Decimal
    """`at_equal_revenue - per_compute`: above 0, the tenant pays less because compute is charged."""

    @property
    def winner(self) -> str:
        """Who gains by compute-based prices at equal revenue."""
        if not self.difference:
            return "the same"
        return "pays less per compute" if self.difference > 0 else "pays more per compute"


class WhatIf(_Part):
    """What would have been, with all that was assumed."""

    scenarios: tuple[Scenario, ...]
    assumptions: tuple[str, ...]


@dataclass
class MixBasis:
    """Collects, for one choice of price books, what mixes are worked out from."""

    book_of: Callable[[StoredUsage], PriceBook | None]
    """By which book a request is rated; None leaves it out."""
    entries: dict[tuple[str, int], tuple[PriceBook, PriceEntry]] = field(default_factory=dict)
    """By tenant and entry."""
    counts: dict[tuple[str, int], Counts] = field(default_factory=dict)
    """Charged usage by tenant and entry; `flops`: at full depth."""
    unrated: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By tenant."""
    models: set[str] = field(default_factory=set)
    """Fingerprints."""
    identity_flops: int = 0
    """Of all requests, free and unrated ones included."""

    def add(self, stored: StoredUsage) -> None:
        """Take in one request."""
        record = stored.record
        book = self.book_of(stored)
        if book is None:
            return
        if record.identity_flops:
            self.models.add(record.model_fingerprint)
        self.identity_flops += record.identity_flops
        entry = book.entry_at(record.started_at, record.tenant)
        if entry is None:
            self.unrated[record.tenant] += 1
        elif record.outcome not in book.free_outcomes:
            key = (record.tenant, id(entry))  # which `entries` keeps alive
            self.entries[key] = (book, entry)
            used = Counts(1, record.identity_flops, record.tokens.input, record.tokens.output)
            self.counts[key] = self.counts.get(key, Counts()) + used


def mixed_scenario(
    basis: MixBasis, mix: Mix, savings: Savings, report: Report, book: PriceBook | None, currency: str, decimals: int
) -> Scenario:
    """The recorded requests, dealt out to tiers.

    Args:
        basis: What was used.
        mix: The shares.
        savings: What each tier saves.
        report: What was charged.
        book: The book that rates it; None for those of the receipts.
        currency: Of the book.
        decimals: Of amounts.

    Raises:
        QueryError: A tier of the mix has no price.
    """
    exact: defaultdict[str, int] = defaultdict(int)
    for key, (priced_by, entry) in basis.entries.items():
        exact[key[0]] += sum(_part(mix, savings, priced_by, entry, basis.counts[key]))
    flops = sum(
        _executed(basis.identity_flops, savings[tier].saved) * to_scaled(share, 2) for tier, share in mix.shares.items()
    )
    amounts = {
        tenant: from_scaled(divide_half_even(amount, _PERCENT * int(10 ** (EXACT_SCALE - decimals))), decimals)
        for tenant, amount in exact.items()
    }
    units = COMPUTE.quantity(divide_half_even(flops, _PERCENT))
    return scenario(report, book, mix.text, currency, decimals, amounts, sum(basis.unrated.values()), units)


def _part(mix: Mix, savings: Savings, book: PriceBook, entry: PriceEntry, counts: Counts) -> Iterator[int]:
    """What each tier's part costs. Unit: 10^-30 of the currency, times hundredths of a percent."""
    for tier, share in mix.shares.items():
        multiplier = entry.multiplier(tier)
        if multiplier is None:
            raise QueryError(
                f"price book {book.id!r} of {entry.effective_from.date().isoformat()} has no price for tier {tier!r}.",
                hint=f"Use its tiers: {', '.join(entry.tiers) or 'none'}.",
            )
        executed = Counts(
            counts.requests, _executed(counts.flops, savings[tier].saved), counts.tokens_input, counts.tokens_output
        )
        yield sum(line.exact for line in charge_lines(executed, entry, multiplier)) * to_scaled(share, 2)


def _executed(identity: int, saved: Decimal) -> int:
    whole = 10**SHARE_DECIMALS
    return divide_half_even(identity * (whole - to_scaled(saved, SHARE_DECIMALS)), whole)


def scenario(
    report: Report,
    book: PriceBook | None,
    mix: str | None,
    currency: str,
    decimals: int,
    amounts: Mapping[str, Decimal],
    unrated: int,
    compute_units: Decimal,
) -> Scenario:
    """Set amounts by tenant beside what was charged."""
    same_currency = currency == report.currency
    fine = max(decimals, report.decimals)

    def difference(other: Decimal | None, charged: Decimal | None) -> Decimal | None:
        if not same_currency or other is None:
            return None
        return exact_sum((other, (charged or Decimal(0)).copy_negate()), fine)

    charge = exact_sum(amounts.values(), decimals) if amounts else None
    cost = _hardware_cost(report.hardware, compute_units, report) if same_currency else None
    margin = None if cost is None or charge is None else exact_sum((charge, cost.copy_negate()), fine)
    return Scenario(
        price_book=", ".join(used.id for used in report.price_books) if book is None else book.id,
        content_hash=None if book is None else book.content_hash,
        mix=mix,
        currency=currency,
        compute_units=compute_units,
        charge=charge,
        difference=difference(charge, report.total),
        per_1000_requests=_per_1000(charge, report.figures.requests - unrated, decimals),
        unrated=unrated,
        hardware_cost=cost,
        margin=margin,
        tenants=tuple(
            TenantOutcome(
                tenant=tenant.tenant,
                charge=amounts.get(tenant.tenant),
                difference=difference(amounts.get(tenant.tenant), tenant.total),
            )
            for tenant in report.tenants
        ),
    )


def _per_1000(charge: Decimal | None, requests: int, decimals: int) -> Decimal | None:
    if charge is None or requests < 1:
        return None
    return from_scaled(divide_half_even(to_scaled(charge, decimals) * 1_000, requests), decimals)


def _hardware_cost(hardware: HardwareReport | None, units: Decimal, report: Report) -> Decimal | None:
    """The stated cost, in proportion to executed compute."""
    executed = to_scaled(report.figures.compute_units, COMPUTE.decimals)
    if hardware is None or not executed:
        return None
    cost = to_scaled(hardware.cost, report.decimals) * to_scaled(units, COMPUTE.decimals)
    return from_scaled(divide_half_even(cost, executed), report.decimals)


def token_pricing(tenants: Sequence[TenantReport], decimals: int) -> tuple[TokenPricing, ...]:
    """Compute-based beside per-token prices, for tenants that have both."""
    both = [
        (tenant.tenant, figures.charge, figures.charge_per_token)
        for tenant in tenants
        if (figures := tenant.figures).charge is not None and figures.charge_per_token is not None
    ]
    charged = sum(to_scaled(compute, decimals) for _, compute, _ in both)
    by_token = sum(to_scaled(token, decimals) for _, _, token in both)

    def row(tenant: str, compute: Decimal, token: Decimal) -> TokenPricing:
        units = divide_half_even(to_scaled(token, decimals) * charged, by_token) if by_token else 0
        equal = from_scaled(units, decimals)
        return TokenPricing(
            tenant=tenant,
            per_compute=compute,
            per_token=token,
            at_equal_revenue=equal,
            difference=exact_sum((equal, compute.copy_negate()), decimals),
        )

    return tuple(row(*each) for each in both)


def book_scenario(report: Report, book: PriceBook, exact: Mapping[str, tuple[int, int]], unrated: int) -> Scenario:
    """The usage as it was, under another book.

    Args:
        report: What was charged.
        book: The other book.
        exact: Tenant → amount in units of 10^-30 and number of rated requests.
        unrated: Requests that the book has no price for.
    """
    decimals = book.statement_decimals
    amounts = {
        tenant: from_scaled(round_half_even(amount, EXACT_SCALE, decimals), decimals)
        for tenant, (amount, rated) in exact.items()
        if rated
    }
    return scenario(report, book, None, book.currency, decimals, amounts, unrated, report.figures.compute_units)


def assumptions_of(report: Report, mixes: Sequence[Mix], savings: Savings, books: Iterable[PriceBook]) -> list[str]:
    """Everything that the figures rest on, one sentence each."""
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
    recorded = {tier.tier: tier.figures for tier in report.tiers}
    for tier in dict.fromkeys(tier for mix in mixes for tier in mix.shares):
        saving = savings[tier]
        line = f"{tier} saves {_percent(saving.saved)} of full depth: {saving.source}."
        own = recorded.get(tier)
        if own is not None and own.saved_share is not None:
            line += f" On this usage it saved {_percent(own.saved_share)} over {own.requests:,} requests."
        said.append(line)
    if any(tenant.figures.charge_per_token is not None for tenant in report.tenants):
        said.append(
            "Per-token prices are the reference of the price book. At equal revenue they are multiplied by one factor, "
            "so that all tenants together pay what they were charged."
        )
    return said


def hardware_assumptions(hardware: HardwareReport, currency: str | None) -> list[str]:
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


def check_mixes(mixes: Sequence[Mix], models: set[str], find: Callable[[str], Savings | None]) -> Savings:
    """What the tiers of the mixes save on the one model of the usage.

    Raises:
        QueryError: The usage is of several models with different measurements, or a tier was not measured.
    """
    found = {model: savings_of(mixes, model, find) for model in sorted(models) or [""]}
    first, *others = found.values()
    if any(other != first for other in others):
        raise QueryError(
            f"this usage is of {len(found)} models, whose tiers save different shares.",
            hint="Name one measurement for all with --mix-from FILE.",
        )
    return first
