"""A report as one HTML page: styles, charts and a small script inside, nothing fetched, for screens and for A4.

The page is whole without its script, which sorts and filters tables. The templates are `report*.html.jinja`; the
figures come from `report`, the lengths of bars from `charts`. Needs the extra `report` (jinja2).
"""

from __future__ import annotations

from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import MissingExtraError
from polar_billing.reports import charts, text
from polar_billing.reports.depth import WORDS
from polar_billing.reports.text import Amounts
from polar_billing.values.money import plain
from polar_sdk.show.lines import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from decimal import Decimal

    from jinja2 import Environment

    from polar_billing.reports.depth import DepthPanel
    from polar_billing.reports.report import Report


_TEMPLATE: Final = "report.html.jinja"


def report_html(report: Report) -> str:
    """Render a report as one self-contained HTML page.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    environment = new_environment("polar_billing.reports", "the HTML report")
    amounts = Amounts.of(report)
    environment.filters.update(_filters(report, amounts))
    template = environment.get_template(_TEMPLATE)
    return template.render(report=report, amounts=amounts, kinds=WORDS, **_charts(report, amounts))


def new_environment(package: str, what: str) -> Environment:
    """What renders the templates of a package; every name is escaped, and shows nothing but itself.

    Args:
        package: Where the templates are.
        what: What needs them, in words.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{what} needs {error.name!r}.",
            hint="Install the extra report of polar-llm, in a clone: `pip install '.[report]'`.",
        ) from error
    return jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(lambda name: read_template(package, name)),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def read_template(package: str, name: str) -> str:
    """The text of a file of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _filters(report: Report, amounts: Amounts) -> dict[str, Callable[..., Any]]:
    """Figures as text, and names of colours."""

    def of(unit: Any) -> Callable[[Decimal | None, str], str]:
        """Amounts of another currency are shown as they are, with its code."""

        def show(value: Decimal | None, currency: str) -> str:
            if currency == report.currency:
                return str(unit.show(value))
            return text.DASH if value is None else f"{text.money(value)} {currency}"

        return show

    return {
        "units": text.compute_units,
        "count": text.count,
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
        "share": text.share,
        "time": text.milliseconds,
        "tier": text.tier_name,
        "tier_kind": charts.tier_kind,
        "outcomes": text.outcomes,
    }


def _charts(report: Report, amounts: Amounts) -> dict[str, Any]:
    """What the charts are drawn from, by name; empty where a chart would show nothing."""
    charged = report.currency is not None and report.figures.charge is not None
    return {
        "compute": charts.compute_by_tier(report),
        "charges": charts.charges_by_tier(report, amounts.charges) if charged else (),
        "tenants": charts.charges_by_tenant(report, amounts.charges) if charged else (),
        "depth": _depth(report),
    }


def _depth(report: Report) -> list[tuple[str, list[tuple[DepthPanel, Any, Any]]]]:
    """By model, a panel per tier."""
    panels = sorted((panel for tier in report.tiers for panel in tier.depth), key=lambda panel: panel.model)
    return [
        (model, [(panel, charts.columns(panel), charts.ticks(len(panel.visits))) for panel in members])
        for model, members in groupby(panels, key=lambda panel: panel.model)
    ]
