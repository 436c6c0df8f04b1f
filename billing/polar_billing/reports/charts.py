"""The geometry of the charts of the HTML report: lengths and heights in percent, which the templates draw as boxes.

Boxes follow the width of the page, its light or dark colours and its paper, and their text is text. Every figure shown
is also in a table of the page. Knows no HTML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from polar_billing.reports import text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from decimal import Decimal

    from polar_billing.reports.depth import DepthPanel
    from polar_billing.reports.report import Report
    from polar_billing.reports.text import Unit

TIERS: Final = ("economy", "standard", "premium", "exact")
MAX_TENANTS: Final = 40
_WHOLE: Final = 100.0


class Part(NamedTuple):
    """One coloured part of a bar."""

    kind: str
    """What its colour stands for."""
    width: str
    """Unit: percent of the longest bar."""
    words: str


class Bar(NamedTuple):
    """One bar, with the figure that it shows."""

    label: str
    parts: tuple[Part, ...]
    figure: str
    behind: str = "0"
    """Width of a pale bar behind it. Unit: percent."""


class Group(NamedTuple):
    """Bars that belong together."""

    label: str
    kind: str
    bars: tuple[Bar, ...]


class Column(NamedTuple):
    """One layer of a depth chart."""

    layer: int
    prompt: str
    """Height. Unit: percent of the layer that prompts visit most."""
    answer: str
    """Height. Unit: percent of the layer that answers visit most."""
    filled: bool
    """Whether most pieces of prompts were filled."""
    words: str


def tier_kind(tier: str | None) -> str:
    """The name of a tier's colour."""
    return tier if tier in TIERS else "other"


def charges_by_tier(report: Report, unit: Unit) -> tuple[Group, ...]:
    """For each tier what was charged, beside full depth and per-token prices."""
    tiers = [tier for tier in report.tiers if tier.figures.charge is not None]
    rows = [
        (tier, {"charged": f.charge, "full depth": f.charge_full_depth, "per token": f.charge_per_token})
        for tier in tiers
        if (f := tier.figures)
    ]
    longest = _longest(amount for _, amounts in rows for amount in amounts.values())
    return tuple(
        Group(
            text.tier_name(tier.tier),
            tier_kind(tier.tier),
            tuple(
                Bar(kind, (Part(kind.split()[-1], _percent(amount, longest), ""),), unit.show(amount))
                for kind, amount in amounts.items()
                if amount is not None
            ),
        )
        for tier, amounts in rows
    )


def compute_by_tier(report: Report) -> tuple[Bar, ...]:
    """Executed compute of each tier, prompt, answer and router apart, before its full depth."""
    tiers = [tier for tier in report.tiers if tier.figures.compute_units or tier.figures.compute_units_full_depth]
    longest = _longest(
        amount for tier in tiers for amount in (tier.figures.compute_units, tier.figures.compute_units_full_depth)
    )
    return tuple(
        Bar(
            text.tier_name(tier.tier),
            tuple(
                Part(kind, _percent(units, longest), f"{kind} {text.compute_units(units)} CU")
                for kind, units in (
                    ("prompt", tier.figures.compute_units_prompt),
                    ("answer", tier.figures.compute_units_answer),
                    ("router", tier.figures.compute_units_router),
                )
                if units
            ),
            f"{text.compute_units(tier.figures.compute_units)} CU, "
            f"{text.share(tier.figures.saved_share, signed=True)} saved",
            _percent(tier.figures.compute_units_full_depth, longest),
        )
        for tier in tiers
    )


def charges_by_tenant(report: Report, unit: Unit) -> tuple[Bar, ...]:
    """Charges by tenant, split by tier, the largest first."""
    ranked = sorted(report.tenants, key=lambda tenant: (-tenant.total, tenant.tenant))[:MAX_TENANTS]
    longest = _longest(tenant.total for tenant in ranked)
    return tuple(
        Bar(
            tenant.tenant,
            tuple(
                Part(
                    tier_kind(tier.tier),
                    _percent(tier.figures.charge, longest),
                    f"{text.tier_name(tier.tier)} {unit.show(tier.figures.charge)}",
                )
                for tier in tenant.tiers
                if tier.figures.charge
            ),
            unit.show(tenant.total),
        )
        for tenant in ranked
    )


def columns(panel: DepthPanel) -> tuple[Column, ...]:
    """The layers of a depth chart; prompts and answers each on a scale of their own."""
    prompts, answers = panel.visits_prompt, panel.visits_decode
    most_by_prompts, most_by_answers = max(prompts, default=0), max(answers, default=0)
    return tuple(
        Column(
            layer,
            _share(prompts[layer], most_by_prompts),
            _share(answers[layer], most_by_answers),
            2 * panel.visits_prefill_filled[layer] > prompts[layer] > 0,
            f"layer {layer}: {prompts[layer]:,} visits by prompts, {answers[layer]:,} by answers",
        )
        for layer in range(len(prompts))
    )


def ticks(layers: int) -> Sequence[tuple[int, str]]:
    """Numbers under a strip of layers, and where they stand. Unit: percent of its width."""
    step = next((step for step in (1, 2, 5, 10, 20, 50) if layers <= 8 * step), 100)
    return [(layer, _share(2 * layer + 1, 2 * layers)) for layer in range(0, layers, step)]


def _longest(amounts: Iterable[Decimal | None]) -> Decimal | int:
    return max((amount for amount in amounts if amount is not None), default=0)


def _percent(amount: Decimal | None, longest: Decimal | int) -> str:
    return "0" if not longest or amount is None or amount < 0 else f"{float(amount / longest) * _WHOLE:.2f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole * _WHOLE:.2f}" if whole else "0"
