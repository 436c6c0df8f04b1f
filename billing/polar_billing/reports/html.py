"""A report as one HTML page: styles and charts inside, nothing fetched, for the screen and for A4.

The template is `report.html.jinja`; the figures come from `report`, the charts from `charts`. Needs the extra
`report` (jinja2, matplotlib).
"""

from __future__ import annotations

from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import MissingExtraError
from polar_billing.reports import text
from polar_billing.values.money import plain
from polar_sdk.show.lines import printable

if TYPE_CHECKING:
    from polar_billing.reports.report import Report


_TEMPLATE: Final = "report.html.jinja"


def report_html(report: Report) -> str:
    """Render a report as one self-contained HTML page.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup

        from polar_billing.reports import charts
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the HTML report needs {error.name!r}.",
            hint="Install the extra report of polar-llm, in a clone: `pip install '.[report]'`.",
        ) from error

    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(_source),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        units=text.compute_units,
        count=text.count,
        money=text.money,
        signed=text.signed_money,
        plain=plain,
        share=text.share,
        time=text.milliseconds,
        tier=text.tier_name,
        outcomes=text.outcomes,
        swatch=charts.tier_color,
    )
    drawn = {name: Markup(svg) for name, svg in _charts(report, charts).items()}
    template = environment.get_template(_TEMPLATE)
    return template.render(report=report, charts=drawn, depth=_depth(report, charts, Markup))


def _source(name: str) -> str:
    return resources.files("polar_billing.reports").joinpath(name).read_text(encoding="utf-8")


def _charts(report: Report, charts: Any) -> dict[str, str]:
    """The charts by name; empty where a chart would show nothing."""
    drawn = {"compute": "", "charges": "", "tenants": ""}
    if report.is_empty:
        return drawn
    drawn["compute"] = charts.compute_by_tier(report)
    if report.currency is not None and report.figures.charge is not None:
        drawn["charges"] = charts.charges_by_tier(report)
        if len(report.tenants) > 1:
            drawn["tenants"] = charts.charges_by_tenant(report)
    return drawn


def _depth(report: Report, charts: Any, markup: Any) -> list[tuple[str, Any]]:
    """One chart per model, with a panel per tier."""
    panels = sorted((panel for tier in report.tiers for panel in tier.depth), key=lambda panel: panel.model)
    return [
        (model, markup(charts.depth(list(members), f"depth-{index}")))
        for index, (model, members) in enumerate(groupby(panels, key=lambda panel: panel.model))
    ]
