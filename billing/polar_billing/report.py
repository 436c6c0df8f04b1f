"""The tiered pricing report: what each tenant used and owes per tier, and what it would have been otherwise.

A tenant's section is a statement: lines of quantity × unit price, each rounded once, and one rounding line, which sum
to the tenant's total to the last unit; the total of the report is the sum of the tenants'. This module makes the
figures; `render_terminal`, `render_csv` and `render_html` only set them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from polar_billing.money import EXACT_SCALE, divide_half_even, from_scaled, round_half_even, round_lines
from polar_billing.query import tier_order
from polar_billing.rating import COMPUTE
from polar_billing.storage import ALL_TENANTS, AllTenants, LedgerStorage, Selection
from polar_billing.totals import LayerVisits, Rater, UsageTotals, accumulate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polar_billing.price_book import PriceBook

__all__ = ["DepthPanel", "Figures", "PriceBookUsed", "Report", "ReportLine", "TenantReport", "TierReport", "build_report"]

_SHARE_DECIMALS: Final = 4


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Figures(_Part):
    """What a group of requests used, owes, and would have owed otherwise. Amounts: the report's currency."""

    requests: int
    outcomes: dict[str, int]
    tokens_input: int
    tokens_cached: int
    """Included in `tokens_input`."""
    tokens_output: int
    compute_units: Decimal
    """Executed, the router included. Unit: CU."""
    compute_units_full_depth: Decimal
    """The same tokens through every layer once, without a router. Unit: CU."""
    compute_units_saved: Decimal
    """Full depth less executed; negative where loops or the router cost more. Unit: CU."""
    saved_share: Decimal | None
    """Saved of full depth, from 1 down; None where nothing would have been executed."""
    router_share: Decimal | None
    """The router's part of the executed compute units."""
    charge: Decimal | None
    """The sum of the statement lines; None where no request has a price."""
    charge_full_depth: Decimal | None
    """The same requests at full depth under the same prices."""
    charge_per_token: Decimal | None
    """The same tokens under the price book's per-token reference; None where it has none for some of them."""
    price_per_1000_requests: Decimal | None
    """Charge per 1,000 rated requests."""
    price_per_million_tokens: Decimal | None
    """Charge per 10^6 input and output tokens of rated requests."""
    latency_ns_p50: int | None
    """Queue, prefill and decode of completed requests, nearest rank. Unit: nanoseconds."""
    latency_ns_p95: int | None
    unrated: dict[str, int]
    """Reason → requests without a price; they are in no amount."""


class ReportLine(_Part):
    """One line of a tenant's statement."""

    tier: str | None
    item: str
    quantity: Decimal
    unit: str
    unit_price: Decimal
    """The tier's multiplier included."""
    amount: Decimal
    """`quantity × unit_price`, rounded once."""


class DepthPanel(_Part):
    """Where one tier of one model spent its visits. Unit: visits per layer, index = layer."""

    model: str
    tier: str | None
    visits_prefill: tuple[int, ...]
    visits_decode: tuple[int, ...]

    @property
    def visits(self) -> tuple[int, ...]:
        """Prefill and decode together."""
        return tuple(a + b for a, b in zip(self.visits_prefill, self.visits_decode, strict=True))


class TierReport(_Part):
    """One tier of one tenant."""

    tier: str | None
    """None for programs named by hand."""
    figures: Figures
    depth: tuple[DepthPanel, ...]


class TenantReport(_Part):
    """One tenant: `sum(line.amount) + rounding == total`."""

    tenant: str
    tiers: tuple[TierReport, ...]
    lines: tuple[ReportLine, ...]
    rounding: Decimal
    total: Decimal
    figures: Figures


class PriceBookUsed(_Part):
    """A book that rated something in the report."""

    id: str
    content_hash: str


class Report(_Part):
    """The usage and the charges of one period."""

    format: str = "polar-report-1"
    generated_at: datetime
    ledger: str
    period: str
    since: datetime | None
    until: datetime | None
    """Not part of the period."""
    zone: str
    tenant: str | None
    """The one tenant it is about; None for the operator's view over all."""
    rerated: bool
    """True where a price book was named instead of those of the receipts."""
    price_books: tuple[PriceBookUsed, ...]
    currency: str | None
    """None where nothing was rated."""
    decimals: int
    tenants: tuple[TenantReport, ...]
    tiers: tuple[TierReport, ...]
    """Every tenant together, by tier; the rounding lines are in no tier."""
    rounding: Decimal
    total: Decimal
    figures: Figures

    @property
    def is_empty(self) -> bool:
        """True where no request falls into the period."""
        return self.figures.requests == 0


def build_report(
    ledger: LedgerStorage,
    selection: Selection | None = None,
    *,
    prices: PriceBook | None = None,
    currency: str | None = None,
    now: datetime | None = None,
) -> Report:
    """Make the report of a period.

    Args:
        ledger: Where the usage is.
        selection: Which usage; the operator's view over all tenants and all time by default.
        prices: Rate by this book instead of the one each receipt was made by.
        currency: Leave out what is rated in another currency.
        now: When the report says it was made; the clock's time by default.

    Raises:
        CurrencyMixError: The usage is rated in several currencies and none was chosen.
        StoreError: The ledger cannot be read.
    """
    selection = Selection(ALL_TENANTS) if selection is None else selection
    rater = Rater(ledger.price_books(), instead=prices, currency=currency)
    groups = accumulate(
        ledger.read(selection), rater, lambda stored: (stored.record.tenant, stored.record.tier)
    )
    ordered = sorted(groups, key=lambda key: (key[0], tier_order(key[1])))
    tenants = tuple(
        _tenant(tenant, {tier: groups[tenant, tier] for _, tier in keys}, rater.decimals)
        for tenant, keys in groupby(ordered, key=lambda key: key[0])
    )
    total = sum((tenant.total for tenant in tenants), Decimal(0))
    period = selection.period
    return Report(
        generated_at=now or datetime.now(UTC),
        ledger=ledger.location,
        period=period.label,
        since=period.since,
        until=period.until,
        zone=period.zone,
        tenant=None if isinstance(selection.tenant, AllTenants) else selection.tenant,
        rerated=prices is not None,
        price_books=tuple(
            PriceBookUsed(id=book.id, content_hash=digest) for digest, book in sorted(rater.used.items())
        ),
        currency=rater.currency,
        decimals=rater.decimals,
        tenants=tenants,
        tiers=_over_tenants(tenants, groups, rater.decimals),
        rounding=sum((tenant.rounding for tenant in tenants), Decimal(0)),
        total=total,
        figures=_figures(groups.values(), rater.decimals, total),
    )


def _tenant(tenant: str, tiers: dict[str | None, UsageTotals], decimals: int) -> TenantReport:
    lines = [(tier, line) for tier, totals in tiers.items() for line in totals.lines]
    rounded = round_lines([line.exact for _, line in lines], decimals)
    charges: defaultdict[str | None, Decimal] = defaultdict(Decimal)
    printed = []
    for (tier, line), amount in zip(lines, rounded.amounts, strict=True):
        charges[tier] += amount
        printed.append(
            ReportLine(
                tier=tier,
                item=line.item.name,
                quantity=line.quantity,
                unit=line.item.unit,
                unit_price=line.unit_price,
                amount=amount,
            )
        )
    return TenantReport(
        tenant=tenant,
        tiers=tuple(
            TierReport(tier=tier, figures=_figures([totals], decimals, charges[tier]), depth=_depth(tier, [totals]))
            for tier, totals in tiers.items()
        ),
        lines=tuple(printed),
        rounding=rounded.residue,
        total=rounded.total,
        figures=_figures(tiers.values(), decimals, rounded.total),
    )


def _over_tenants(
    tenants: tuple[TenantReport, ...], groups: dict[tuple[str, str | None], UsageTotals], decimals: int
) -> tuple[TierReport, ...]:
    charges: defaultdict[str | None, Decimal] = defaultdict(Decimal)
    for tenant in tenants:
        for line in tenant.lines:
            charges[line.tier] += line.amount
    tiers = sorted({tier for _, tier in groups}, key=tier_order)
    members = {tier: [totals for (_, other), totals in groups.items() if other == tier] for tier in tiers}
    return tuple(
        TierReport(tier=tier, figures=_figures(members[tier], decimals, charges[tier]), depth=_depth(tier, members[tier]))
        for tier in tiers
    )


def _figures(groups: Iterable[UsageTotals], decimals: int, charge: Decimal) -> Figures:
    parts = list(groups)

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    flops, identity, rated = total("flops"), total("identity_flops"), total("rated")
    outcomes: Counter[str] = sum((part.outcomes for part in parts), Counter())
    unrated: Counter[str] = sum((part.unrated for part in parts), Counter())
    latencies = sorted(latency for part in parts for latency in part.latencies_ns)
    comparable = rated and not total("without_reference")
    return Figures(
        requests=total("requests"),
        outcomes=dict(sorted(outcomes.items())),
        tokens_input=total("tokens_input"),
        tokens_cached=total("tokens_cached"),
        tokens_output=total("tokens_output"),
        compute_units=COMPUTE.quantity(flops),
        compute_units_full_depth=COMPUTE.quantity(identity),
        compute_units_saved=COMPUTE.quantity(identity - flops),
        saved_share=_share(identity - flops, identity),
        router_share=_share(total("flops_router"), flops),
        charge=charge if rated else None,
        charge_full_depth=_money(total("full_depth_exact"), decimals) if rated else None,
        charge_per_token=_money(total("per_token_exact"), decimals) if comparable else None,
        price_per_1000_requests=_money(total("exact") * 1_000, decimals, per=rated),
        price_per_million_tokens=_money(total("exact") * 1_000_000, decimals, per=total("rated_tokens")),
        latency_ns_p50=_percentile(latencies, 50),
        latency_ns_p95=_percentile(latencies, 95),
        unrated=dict(sorted(unrated.items())),
    )


def _money(exact: int, decimals: int, *, per: int = 1) -> Decimal | None:
    if per == 0:
        return None
    return from_scaled(divide_half_even(exact, per * int(10 ** (EXACT_SCALE - decimals))), decimals)


def _share(part: int, whole: int) -> Decimal | None:
    if whole == 0:
        return None
    return from_scaled(divide_half_even(part * int(10**_SHARE_DECIMALS), whole), _SHARE_DECIMALS)


def _percentile(ordered: list[int], percent: int) -> int | None:
    """The smallest value that at least so many percent do not exceed (nearest rank): always one that occurred."""
    if not ordered:
        return None
    return ordered[-(-len(ordered) * percent // 100) - 1]


def _depth(tier: str | None, groups: list[UsageTotals]) -> tuple[DepthPanel, ...]:
    models: defaultdict[str, LayerVisits] = defaultdict(LayerVisits)
    for totals in groups:
        for model, visits in totals.visits.items():
            models[model].add(visits.prefill, visits.decode)
    return tuple(
        DepthPanel(model=model, tier=tier, visits_prefill=tuple(prefill), visits_decode=tuple(decode))
        for model, visits in sorted(models.items())
        for prefill, decode in [_padded(visits)]
    )


def _padded(visits: LayerVisits) -> tuple[list[int], list[int]]:
    layers = max(len(visits.prefill), len(visits.decode))
    return (
        visits.prefill + [0] * (layers - len(visits.prefill)),
        visits.decode + [0] * (layers - len(visits.decode)),
    )
