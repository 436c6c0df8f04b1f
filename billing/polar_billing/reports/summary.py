"""The figures of a report: usage and charges by tenant and tier, and what full depth and per-token prices would charge.

A tenant's section reads like a statement: lines of quantity × unit price, each rounded once, and one rounding line,
which sum to the tenant's total to the last digit; the total of all is the sum of the tenants'. Knows no output format.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from decimal import Decimal
from itertools import chain, groupby
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from polar_billing.prices.entries import tier_order
from polar_billing.prices.rating import COMPUTE, product
from polar_billing.reports import Part
from polar_billing.reports.depth import DepthPanel, depth_of
from polar_billing.statements.issue import CreditNote, due_after
from polar_billing.statements.statement import Statement
from polar_billing.values.money import EXACT_SCALE, divide_half_even, exact_sum, from_scaled, quotient, round_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from polar_billing.reports.totals import UsageTotals

_SHARE_DECIMALS: Final = 6
_Number = TypeVar("_Number", int, float)


class Figures(Part):
    """Usage and charges of a group of requests, and what others would have charged. Amounts: the report's currency."""

    requests: int
    outcomes: dict[str, int]
    tokens_input: int
    tokens_cached: int
    """Included in `tokens_input`."""
    tokens_output: int
    tokens_drafted: int
    tokens_accepted: int
    """Included in `tokens_drafted`."""
    compute_units: Decimal
    """Compute that the answers needed, the router included. Unit: CU."""
    compute_units_prompt: Decimal
    """The part of the layers over the prompts."""
    compute_units_answer: Decimal
    """The part of decode steps and the head; with prompt and router, the whole."""
    compute_units_router: Decimal
    compute_units_drafts: Decimal
    """Executed for drafted tokens that the answers did not keep; not included in `compute_units`. Unit: CU."""
    compute_units_full_depth: Decimal
    """The same tokens through every layer once, without a router. Unit: CU."""
    compute_units_saved: Decimal
    """Full depth less `compute_units`; negative where loops or the router cost more. Unit: CU."""
    saved_share: Decimal | None
    """Saved compute as a share of full depth, at most 1; None if nothing would have been executed."""
    router_share: Decimal | None
    """The router's part of the executed compute units."""
    charge: Decimal | None
    """The sum of the lines; None if no request has a price."""
    charge_full_depth: Decimal | None
    """The same requests at full depth under the same prices."""
    charge_per_token: Decimal | None
    """The same tokens under the price book's per-token reference; None where some of them have no reference."""
    price_per_1000_requests: Decimal | None
    """Charge per 1,000 rated requests."""
    price_per_million_tokens: Decimal | None
    """Charge per 10^6 input and output tokens of rated requests."""
    latency_ns_p50: int | None
    """Queue, prefill and decode of completed requests, nearest rank. Unit: nanoseconds."""
    latency_ns_p95: int | None
    latency_ns_p99: int | None
    unrated: dict[str, int]
    """Reason → requests without a price; they are in no amount."""


class ReportLine(Part):
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
        return product(self.quantity, self.unit_price)


class TierReport(Part):
    """One tier of one tenant."""

    tier: str | None
    """None for programs named by hand."""
    figures: Figures
    depth: tuple[DepthPanel, ...]


class TenantReport(Part):
    """One tenant: `sum(line.amount) + rounding == total`."""

    tenant: str
    tiers: tuple[TierReport, ...]
    lines: tuple[ReportLine, ...]
    rounding: Decimal
    total: Decimal
    figures: Figures
    statements: tuple[Statement, ...] = ()
    """Issued over the period or parts of it; they include what plans add, so they may differ from the lines above."""
    credit_notes: tuple[CreditNote, ...] = ()
    """Credit notes on them, in the order they were issued."""
    statements_cut: tuple[str, ...] = ()
    """Issued over periods that are only partly within the report's, as of another time zone: id and period of each."""

    def statements_due(self) -> Iterator[tuple[Statement, list[CreditNote], Decimal]]:
        """Each issued statement with its credit notes, and what is left to pay of it."""
        for statement in self.statements:
            notes = [note for note in self.credit_notes if note.statement == statement.id]
            yield statement, notes, due_after(statement, notes)


def figures_of(groups: Iterable[UsageTotals], decimals: int, charge: Decimal | None) -> Figures:
    """Work out the figures of several groups together.

    `charge` is the sum of their lines: those are rounded one by one, so it cannot be worked out here.
    """
    parts = list(groups)

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    flops, identity, rated = total("flops"), total("identity_flops"), total("rated")
    outcomes: Counter[str] = sum((part.outcomes for part in parts), Counter())
    unrated: Counter[str] = sum((part.unrated for part in parts), Counter())
    latencies = sorted(chain.from_iterable(part.latencies_ns for part in parts))
    comparable = rated and not total("without_reference")
    tokens = ("tokens_input", "tokens_cached", "tokens_output", "tokens_drafted", "tokens_accepted")
    return Figures(
        **{name: total(name) for name in ("requests", *tokens)},
        outcomes=dict(sorted(outcomes.items())),
        compute_units=COMPUTE.quantity(flops),
        compute_units_prompt=COMPUTE.quantity(flops - total("flops_answer") - total("flops_router")),
        compute_units_answer=COMPUTE.quantity(total("flops_answer")),
        compute_units_router=COMPUTE.quantity(total("flops_router")),
        compute_units_drafts=COMPUTE.quantity(total("flops_drafts")),
        compute_units_full_depth=COMPUTE.quantity(identity),
        compute_units_saved=COMPUTE.quantity(identity - flops),
        saved_share=_share(identity - flops, identity),
        router_share=_share(total("flops_router"), flops),
        charge=charge if rated else None,
        charge_full_depth=_summed((part.full_depth_exact for part in parts), decimals) if rated else None,
        charge_per_token=_summed((part.per_token_exact for part in parts), decimals) if comparable else None,
        price_per_1000_requests=_money(total("exact") * 1_000, decimals, per=rated),
        price_per_million_tokens=_money(total("exact") * 1_000_000, decimals, per=total("rated_tokens")),
        latency_ns_p50=percentile(latencies, 50),
        latency_ns_p95=percentile(latencies, 95),
        latency_ns_p99=percentile(latencies, 99),
        unrated=dict(sorted(unrated.items())),
    )


def _money(exact: int, decimals: int, *, per: int = 1) -> Decimal | None:
    return quotient(exact, per * int(10 ** (EXACT_SCALE - decimals)), decimals) if per else None


def _summed(exact: Iterable[int], decimals: int) -> Decimal:
    """Each group rounded once, then added, as charges are, so that equal costs are shown as equal."""
    step = int(10 ** (EXACT_SCALE - decimals))
    return from_scaled(sum(divide_half_even(amount, step) for amount in exact), decimals)


def _share(part: int, whole: int) -> Decimal | None:
    return quotient(part * 10**_SHARE_DECIMALS, whole, _SHARE_DECIMALS) if whole else None


def percentile(ordered: Sequence[_Number], percent: int) -> _Number | None:
    """The nearest-rank percentile, which is always one of the values."""
    if not ordered:
        return None
    return ordered[-(-len(ordered) * percent // 100) - 1]


class Summary(NamedTuple):
    """Tenants and tiers of some usage, and all of it together; see the fields of `Report` of the same names."""

    tenants: tuple[TenantReport, ...]
    tiers: tuple[TierReport, ...]
    rounding: Decimal
    total: Decimal
    figures: Figures
    currency: str | None
    """None if nothing was rated."""
    decimals: int
    """Decimals of a line."""


def tenants_of(groups: Mapping[tuple[str, str | None], UsageTotals], decimals: int) -> list[TenantReport]:
    """Sum up each tenant, by name, from sums by tenant and tier; each line is rounded once."""
    ordered = sorted(groups, key=lambda key: (key[0], tier_order(key[1])))
    return [
        _tenant(tenant, {tier: groups[tenant, tier] for _, tier in keys}, decimals)
        for tenant, keys in groupby(ordered, key=lambda key: key[0])
    ]


def summarise(
    tenants: Sequence[TenantReport],
    groups: Mapping[tuple[str, str | None], UsageTotals],
    currency: str | None,
    decimals: int,
) -> Summary:
    """Sum up all tenants together; of the sums those by tier alone are enough."""
    total = exact_sum((tenant.total for tenant in tenants), decimals)
    return Summary(
        tuple(tenants),
        tiers=_over_tenants(tenants, groups, decimals),
        rounding=exact_sum((tenant.rounding for tenant in tenants), decimals),
        total=total,
        figures=figures_of(groups.values(), decimals, total),
        currency=currency,
        decimals=decimals,
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
        tiers=tuple(_tier(tier, [totals], decimals, charges) for tier, totals in tiers.items()),
        lines=report_lines,
        rounding=rounded.residue,
        total=rounded.total,
        figures=figures_of(tiers.values(), decimals, rounded.total),
    )


def _over_tenants(
    tenants: Sequence[TenantReport], groups: Mapping[tuple[str, str | None], UsageTotals], decimals: int
) -> tuple[TierReport, ...]:
    charges = _charges([line for tenant in tenants for line in tenant.lines], decimals)
    members: defaultdict[str | None, list[UsageTotals]] = defaultdict(list)
    for (_, tier), totals in groups.items():
        members[tier].append(totals)
    return tuple(_tier(tier, members[tier], decimals, charges) for tier in sorted(members, key=tier_order))


def _tier(
    tier: str | None, groups: Sequence[UsageTotals], decimals: int, charges: Mapping[str | None, Decimal]
) -> TierReport:
    figures = figures_of(groups, decimals, charges.get(tier))
    return TierReport(tier=tier, figures=figures, depth=depth_of(tier, groups))


def _charges(lines: Iterable[ReportLine], decimals: int) -> dict[str | None, Decimal]:
    """The sum of the lines of each tier."""
    amounts: defaultdict[str | None, list[Decimal]] = defaultdict(list)
    for line in lines:
        amounts[line.tier].append(line.amount)
    return {tier: exact_sum(tier_amounts, decimals) for tier, tier_amounts in amounts.items()}
