"""A report as one HTML page: styles, charts and a small script inside, nothing fetched, for screens and for A4.

The page is whole without its script, which sorts and filters tables. Charts are boxes that the templates draw, with
lengths and heights in percent: they follow the width of the page, its light or dark colours and its paper, and their
text is text. Every figure shown is also in a table of the page. The templates are `report*.html.jinja`; the operations
page renders its own with the same environment. Needs the extra `report` (jinja2).
"""

from __future__ import annotations

from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from polar_billing.errors import MissingExtraError
from polar_billing.reports import text
from polar_billing.reports.depth import WORDS
from polar_billing.reports.text import Amounts
from polar_billing.values.money import plain
from polar_sdk.show.lines import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from decimal import Decimal

    from jinja2 import Environment

    from polar_billing.reports.depth import DepthPanel
    from polar_billing.reports.report import Report
    from polar_billing.reports.text import Unit

_HERE: Final = "polar_billing.reports"
_TIERS: Final = ("economy", "standard", "premium", "exact")
_MAX_TENANTS: Final = 40
_WHOLE: Final = 100.0


class Part(NamedTuple):
    """One coloured part of a bar."""

    kind: str
    """Key of its colour."""
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


def report_html(report: Report) -> str:
    """Render a report as one self-contained HTML page.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    amounts = Amounts.of(report)
    environment = new_environment(_HERE, "the HTML report")
    environment.filters.update(_filters(report, amounts))
    charged = report.currency is not None and report.figures.charge is not None
    panels = sorted((panel for tier in report.tiers for panel in tier.depth), key=lambda panel: panel.model)
    return environment.get_template("report.html.jinja").render(
        report=report,
        amounts=amounts,
        kinds=WORDS,
        compute=_compute_by_tier(report),
        charges=_charges_by_tier(report, amounts.charges) if charged else (),
        tenants=_charges_by_tenant(report, amounts.charges) if charged else (),
        depth=[
            (model, [(panel, _columns(panel), ticks(len(panel.visits))) for panel in members])
            for model, members in groupby(panels, key=lambda panel: panel.model)
        ],
    )


def new_environment(package: str, what: str) -> Environment:
    """Make an environment for the templates of a package and those shared here; every name is escaped and printable.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(what, error, "report") from error

    def load(name: str) -> str:
        return read_template(_HERE if name.startswith("shared_") else package, name)

    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(load),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        units=text.compute_units,
        count=text.count,
        share=text.share,
        tier=text.tier_name,
        tier_kind=tier_kind,
        outcomes=text.outcomes,
        fine_share=text.share_of_float,
    )
    return environment


def read_template(package: str, name: str) -> str:
    """The text of a file of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _filters(report: Report, amounts: Amounts) -> dict[str, Callable[..., Any]]:
    """Figures as text, and names of colours."""

    def of(unit: Unit) -> Callable[[Decimal | None, str], str]:
        """Amounts of another currency are shown as they are, with its code."""

        def show(value: Decimal | None, currency: str) -> str:
            if currency == report.currency:
                return unit.show(value)
            return text.DASH if value is None else f"{text.money(value)} {currency}"

        return show

    return {
        "money": amounts.charges.show,
        "signed": lambda value: amounts.charges.show(value, signed=True),
        "price": amounts.prices.show,
        "money_of": of(amounts.charges),
        "price_of": of(amounts.prices),
        "unit_of": lambda currency: amounts.charges.name if currency == report.currency else currency,
        "plain": plain,
        "exact_amount": text.money,
        "signed_amount": text.signed_money,
        "rate": text.rate,
        "exact": lambda line: plain(line.exact),
        "time": text.milliseconds,
    }


def tier_kind(tier: str | None) -> str:
    """The name of a tier's colour."""
    return tier if tier in _TIERS else "other"


def _charges_by_tier(report: Report, unit: Unit) -> tuple[Group, ...]:
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


def _compute_by_tier(report: Report) -> tuple[Bar, ...]:
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


def _charges_by_tenant(report: Report, unit: Unit) -> tuple[Bar, ...]:
    """Charges by tenant, split by tier, the largest first."""
    ranked = sorted(report.tenants, key=lambda tenant: (-tenant.total, tenant.tenant))[:_MAX_TENANTS]
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


def _columns(panel: DepthPanel) -> tuple[Column, ...]:
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
