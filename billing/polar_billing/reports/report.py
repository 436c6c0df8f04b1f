"""The tiered pricing report: what each tenant used and owes per tier, and what it would have been otherwise.

A tenant's section reads like a statement: lines of quantity × unit price, each rounded once, and one rounding line,
which sum to the tenant's total to the last digit; the total of the report is the sum of the tenants'. This
module works the figures out; `usage_tables`, `csv` and `html` only render them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from pydantic import BaseModel, ConfigDict

from polar_billing.ledger.records import ALL_TENANTS, AllTenants, Selection
from polar_billing.prices.entries import tier_order
from polar_billing.prices.rating import UNIT_PRICE_SCALE
from polar_billing.reports.bulk import totals_by_tier
from polar_billing.reports.comparison import OtherCharge, charges_under, sum_charges
from polar_billing.reports.energy import EnergyReport, energy_report
from polar_billing.reports.figures import Figures, figures_of
from polar_billing.reports.hardware import HardwareReport
from polar_billing.reports.layers import ProgramUse, read_layers
from polar_billing.reports.promises import PromiseReport
from polar_billing.reports.questions import Questions, answer
from polar_billing.reports.totals import LayerVisits, Rater, UsageTotals
from polar_billing.reports.what_if import TokenPricing, WhatIf, token_pricing
from polar_billing.statements.issue import issued_statements
from polar_billing.statements.statement import Statement
from polar_billing.values.money import exact_sum, from_scaled, round_lines, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.values.periods import Period


_MAX_PROGRAMS: Final = 6


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


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

    @property
    def exact(self) -> Decimal:
        """`quantity × unit_price`, before rounding."""
        wide = UNIT_PRICE_SCALE
        return from_scaled(to_scaled(self.quantity, wide) * to_scaled(self.unit_price, wide), 2 * wide)


class DepthPanel(_Part):
    """The visits of one tier of one model. Unit: visits per layer, index = layer."""

    model: str
    tier: str | None
    visits_prefill: tuple[int, ...]
    visits_prefill_filled: tuple[int, ...]
    """Pieces of prompts whose tokens, or most of them, a map filled; a piece may count in `visits_prefill` as well."""
    visits_decode: tuple[int, ...]
    programs: tuple[ProgramUse, ...] = ()
    """Those that most requests ran, the most used first."""
    programs_more: int = 0
    """Requests that ran others."""

    @property
    def visits_prompt(self) -> tuple[int, ...]:
        """Pieces of prompts that the layer ran or was filled for, at least."""
        return tuple(map(max, self.visits_prefill, self.visits_prefill_filled))

    @property
    def visits(self) -> tuple[int, ...]:
        """Prompts and answers together."""
        return tuple(a + b for a, b in zip(self.visits_prompt, self.visits_decode, strict=True))


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
    others: tuple[OtherCharge, ...] = ()
    """The same usage under the price books of `--compare`."""
    statements: tuple[Statement, ...] = ()
    """Issued over the period or parts of it; they include what plans add, so they may differ from the lines above."""


class PriceBookUsed(_Part):
    """A book that rated something in the report."""

    id: str
    content_hash: str


class Report(_Part):
    """The usage and charges of one period."""

    format: str = "polar-report-1"
    generated_at: datetime
    ledger: str
    period: str
    since: datetime | None
    until: datetime | None
    """Not part of the period."""
    zone: str
    tenant: str | None
    """The one tenant it is about; None for the operator's view of all."""
    rerated: bool
    """True where everything was rated by one named price book instead of those of the receipts."""
    price_books: tuple[PriceBookUsed, ...]
    currency: str | None
    """None where nothing was rated."""
    decimals: int
    tenants: tuple[TenantReport, ...]
    tiers: tuple[TierReport, ...]
    """All tenants together, by tier; the rounding lines are not in any tier."""
    rounding: Decimal
    total: Decimal
    figures: Figures
    others: tuple[OtherCharge, ...] = ()
    """The usage of all tenants together under the price books of `--compare`."""
    token_pricing: tuple[TokenPricing, ...] = ()
    """Compute-based beside per-token prices, for tenants with a per-token reference for all of their requests."""
    promises: tuple[PromiseReport, ...] = ()
    """Of latency, by tenant and tier, where the price book or the caller gives one."""
    hardware: HardwareReport | None = None
    """At a stated price per device-hour."""
    energy: EnergyReport | None = None
    """Measured, or modelled at a stated efficiency."""
    what_if: WhatIf | None = None
    """Other price books and mixes of tiers, and what every figure rests on."""

    @property
    def is_empty(self) -> bool:
        """True if no request falls into the period."""
        return self.figures.requests == 0


def build_report(
    ledger: Ledger,
    selection: Selection | None = None,
    *,
    prices: PriceBook | None = None,
    currency: str | None = None,
    compare: Sequence[PriceBook] = (),
    questions: Questions | None = None,
    now: datetime | None = None,
) -> Report:
    """Build the report of a period.

    Args:
        ledger: Where the usage is.
        selection: Which usage; by default the operator's view of all tenants and all time.
        prices: Rate by this book instead of the one each receipt was made by.
        currency: Leave out what is rated in another currency.
        compare: Books to rate the same usage by as well.
        questions: What to work out besides what was charged.
        now: When the report says it was made; by default the current time.

    Raises:
        CurrencyMixError: The usage is rated in several currencies and none was chosen.
        QueryError: A question has no answer: a tier was not measured, or no throughput is known.
        StoreError: The ledger cannot be read.
    """
    selection = Selection(ALL_TENANTS) if selection is None else selection
    rater = Rater(ledger.price_books, instead=prices, currency=currency)
    groups = totals_by_tier(ledger, selection, rater)
    summary = summarise(tenants_of(groups, rater.decimals), groups, rater.decimals)
    tenants = summary.tenants
    others = charges_under(ledger, selection, compare)
    # A report on one tier, or by another book, is not about what was owed.
    names = [] if prices or selection.tier else [tenant.tenant for tenant in tenants]
    issued = _issued_within(ledger, names, selection.period)
    tenants = tuple(
        tenant.model_copy(update={"others": others.get(tenant.tenant, ()), "statements": issued.get(tenant.tenant, ())})
        for tenant in tenants
    )
    period = selection.period
    report = Report(
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
        tiers=summary.tiers,
        rounding=summary.rounding,
        total=summary.total,
        figures=summary.figures,
        others=sum_charges(others.values()),
        token_pricing=token_pricing(tenants, rater.decimals),
    )
    questions = Questions() if questions is None else questions
    report = answer(ledger, selection, report, rater, questions)
    if questions.energy is None or report.is_empty:
        return report
    return report.model_copy(update={"energy": energy_report(questions.energy, report)})


class Summary(NamedTuple):
    """Tenants and tiers of some usage, and all of it together; see the fields of `Report` of the same names."""

    tenants: tuple[TenantReport, ...]
    tiers: tuple[TierReport, ...]
    rounding: Decimal
    total: Decimal
    figures: Figures


def tenants_of(groups: Mapping[tuple[str, str | None], UsageTotals], decimals: int) -> list[TenantReport]:
    """What each tenant comes to, by name; each line is rounded once.

    Args:
        groups: The sums, by tenant and tier.
        decimals: Of a line.
    """
    ordered = sorted(groups, key=lambda key: (key[0], tier_order(key[1])))
    return [
        _tenant(tenant, {tier: groups[tenant, tier] for _, tier in keys}, decimals)
        for tenant, keys in groupby(ordered, key=lambda key: key[0])
    ]


def summarise(
    tenants: Sequence[TenantReport], groups: Mapping[tuple[str, str | None], UsageTotals], decimals: int
) -> Summary:
    """Add up what tenants come to.

    Args:
        tenants: What `tenants_of` made of the sums.
        groups: The sums, by tenant and tier; by tier alone is enough.
        decimals: Of a line.
    """
    total = exact_sum((tenant.total for tenant in tenants), decimals)
    return Summary(
        tuple(tenants),
        tiers=_over_tenants(tenants, groups, decimals),
        rounding=exact_sum((tenant.rounding for tenant in tenants), decimals),
        total=total,
        figures=figures_of(groups.values(), decimals, total),
    )


def _tenant(tenant: str, tiers: dict[str | None, UsageTotals], decimals: int) -> TenantReport:
    lines = [(tier, line) for tier, totals in tiers.items() for line in totals.lines]
    rounded = round_lines([line.exact for _, line in lines], decimals)
    report_lines = tuple(
        ReportLine(
            tier=tier,
            item=line.item.name,
            quantity=line.quantity,
            unit=line.item.unit,
            unit_price=line.unit_price,
            amount=amount,
        )
        for (tier, line), amount in zip(lines, rounded.amounts, strict=True)
    )
    charges = _charges(report_lines, decimals)
    return TenantReport(
        tenant=tenant,
        tiers=tuple(
            TierReport(
                tier=tier,
                figures=figures_of([totals], decimals, charges.get(tier)),
                depth=_depth(tier, [totals]),
            )
            for tier, totals in tiers.items()
        ),
        lines=report_lines,
        rounding=rounded.residue,
        total=rounded.total,
        figures=figures_of(tiers.values(), decimals, rounded.total),
    )


def _over_tenants(
    tenants: Sequence[TenantReport], groups: Mapping[tuple[str, str | None], UsageTotals], decimals: int
) -> tuple[TierReport, ...]:
    charges = _charges([line for tenant in tenants for line in tenant.lines], decimals)
    tiers = sorted({tier for _, tier in groups}, key=tier_order)
    members: dict[str | None, list[UsageTotals]] = {tier: [] for tier in tiers}
    for (_, tier), totals in groups.items():
        members[tier].append(totals)
    return tuple(
        TierReport(
            tier=tier,
            figures=figures_of(members[tier], decimals, charges.get(tier)),
            depth=_depth(tier, members[tier]),
        )
        for tier in tiers
    )


def _charges(lines: Iterable[ReportLine], decimals: int) -> dict[str | None, Decimal]:
    """The sum of the lines of each tier."""
    amounts: defaultdict[str | None, list[Decimal]] = defaultdict(list)
    for line in lines:
        amounts[line.tier].append(line.amount)
    return {tier: exact_sum(tier_amounts, decimals) for tier, tier_amounts in amounts.items()}


def _depth(tier: str | None, groups: list[UsageTotals]) -> tuple[DepthPanel, ...]:
    models: defaultdict[str, LayerVisits] = defaultdict(LayerVisits)
    programs: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for totals in groups:
        for model, visits in totals.layer_visits.items():
            models[model].add(visits.prefill, visits.filled, visits.decode)
        for (model, program), requests in totals.programs.items():
            programs[model][program] += requests
    return tuple(_panel(model, tier, visits, programs[model]) for model, visits in sorted(models.items()))


def _panel(model: str, tier: str | None, visits: LayerVisits, programs: Counter[str]) -> DepthPanel:
    parts = (visits.prefill, visits.filled, visits.decode)
    layers = max(map(len, parts))
    prefill, filled, decode = ((*part, *[0] * (layers - len(part))) for part in parts)
    ranked = sorted(programs.items(), key=lambda item: (-item[1], item[0]))
    most = ranked[:_MAX_PROGRAMS]
    return DepthPanel(
        model=model,
        tier=tier,
        visits_prefill=prefill,
        visits_prefill_filled=filled,
        visits_decode=decode,
        programs=tuple(
            ProgramUse(program=program, requests=requests, layers=read_layers(program, layers))
            for program, requests in most
        ),
        programs_more=programs.total() - sum(requests for _, requests in most),
    )


def _issued_within(ledger: Ledger, tenants: Iterable[str], period: Period) -> dict[str, tuple[Statement, ...]]:
    """The statements of tenants whose periods are within a period, in the order they were issued."""
    return {
        tenant: tuple(
            issued.statement
            for issued in issued_statements(ledger, tenant)
            if issued.statement.period.is_within(period)
        )
        for tenant in tenants
    }
