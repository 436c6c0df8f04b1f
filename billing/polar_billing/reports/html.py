"""A report as one HTML page: styles, charts and a small script inside, nothing fetched, for screens and for A4.

The page is complete without its script, which sorts and filters tables. Charts are boxes that the templates draw, with
lengths and heights in percent: they adapt to the page's width, its light or dark colours and the paper, and their text
is real text. Every figure shown is also in a table of the page. The templates are `report*.html.jinja`; the operations
page renders its own with the same environment. Needs the extra `report` (jinja2).
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any, Final

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

    from polar_billing.reports.report import Report
    from polar_billing.reports.summary import TenantReport, TierReport
    from polar_billing.reports.text import Unit

_HERE: Final = "polar_billing.reports"
_TIERS: Final = ("economy", "standard", "premium", "exact")
_MAX_TENANTS: Final = 40


def report_html(report: Report) -> str:
    """Render a report as one self-contained HTML page.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    amounts = Amounts.of(report)
    environment = new_environment(_HERE, "the HTML report")
    environment.filters.update(_filters(report, amounts))
    panels = (panel for tier in report.tiers for panel in tier.depth)
    return environment.get_template("report.html.jinja").render(
        report=report,
        amounts=amounts,
        kinds=WORDS,
        panels=sorted(panels, key=lambda panel: panel.model),
        max_tenants=_MAX_TENANTS,
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
        percent=_percent,
        longest=_longest,
        largest=_largest,
        ticks=_ticks,
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


def _ticks(layers: int) -> Sequence[tuple[int, str]]:
    """Numbers under a strip of layers, and where they stand. Unit: percent of its width."""
    step = next((step for step in (1, 2, 5, 10, 20, 50) if layers <= 8 * step), 100)
    return [(layer, _percent(2 * layer + 1, 2 * layers)) for layer in range(0, layers, step)]


def _longest(tiers: Iterable[TierReport], *names: str) -> Decimal | int:
    """The largest of some figures of tiers."""
    figures = (getattr(tier.figures, name) for tier in tiers for name in names)
    return max((figure for figure in figures if figure is not None), default=0)


def _largest(tenants: Iterable[TenantReport], most: int) -> list[TenantReport]:
    """The tenants with the largest charge."""
    return sorted(tenants, key=lambda tenant: (-tenant.total, tenant.tenant))[:most]


def _percent(part: Decimal | int | None, whole: Decimal | int) -> str:
    """A length in a chart. Unit: percent of the whole."""
    return "0" if not whole or part is None or part < 0 else f"{float(part / whole) * 100:.2f}"
