"""The charts of the HTML report, as SVG inside the page.

Text stays text (selectable, in the page's own fonts), nothing is fetched, and the same report gives the same bytes.
Every figure shown is also in a table of the page. Knows no HTML but the `<svg>` element.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from polar_billing.reports import text
from polar_sdk.show.lines import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from decimal import Decimal

    from matplotlib.axes import Axes

    from polar_billing.reports.report import DepthPanel, Report


INK: Final = "#1c2733"
MUTED: Final = "#5d6975"
GRID: Final = "#dfe4e8"
PALE: Final = "#c9d2d9"
# They differ in lightness as well as in hue, for grey print and for colour-blind readers.
TIER_COLORS: Final = {
    "economy": "#4fa3a5",
    "standard": "#2f6f9f",
    "premium": "#1f3f66",
    "exact": "#c08a2e",
}
_OTHER_TIER: Final = "#8a8f98"
_CHARGED, _FULL_DEPTH, _PER_TOKEN = "#1f4e79", "#7fa8c9", "#d5b97a"

_WIDTH: Final = 7.4  # inches; the page is as wide
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is no formula
    "svg.hashsalt": "polar",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so text is measured alike everywhere
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
_MAX_TENANTS: Final = 40
_PANELS_PER_ROW: Final = 2


def tier_color(tier: str | None) -> str:
    """The colour of a tier in every chart and table."""
    return TIER_COLORS.get(tier or "", _OTHER_TIER)


def charges_by_tier(report: Report) -> str:
    """Charges by tier, next to the same usage at full depth and per token."""
    tiers = [tier for tier in report.tiers if tier.figures.charge is not None]
    series: list[tuple[str, str, list[Decimal | None]]] = [
        ("charged", _CHARGED, [tier.figures.charge for tier in tiers]),
        ("at full depth, same prices", _FULL_DEPTH, [tier.figures.charge_full_depth for tier in tiers]),
        ("per-token pricing", _PER_TOKEN, [tier.figures.charge_per_token for tier in tiers]),
    ]
    series = [(name, color, values) for name, color, values in series if any(v is not None for v in values)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        height = 0.8 / len(series)
        for index, (name, color, values) in enumerate(series):
            places = [place - 0.4 + (index + 0.5) * height for place in range(len(tiers))]
            lengths = [float(value or 0) for value in values]
            axes.barh(places, lengths, height * 0.88, color=color, label=name)
            for place, length, value in zip(places, lengths, values, strict=True):
                axes.annotate(
                    text.money(value),
                    (length, place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                )
        _categories(axes, [text.tier_name(tier.tier) for tier in tiers])
        _amounts(axes, report)
        axes.margins(x=0.14)
        axes.set_xlim(left=0)  # if every charge rounds to 0, the axis would otherwise show negative ones
        _legend(figure, axes)

    return _svg(
        "charges-by-tier",
        0.9 + 0.62 * len(tiers),
        draw,
        "Charges by tier, next to full depth and per-token pricing",
    )


def compute_by_tier(report: Report) -> str:
    """Compute units executed by tier, next to those at full depth."""
    tiers = report.tiers

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        full = [float(tier.figures.compute_units_full_depth) for tier in tiers]
        executed = [float(tier.figures.compute_units) for tier in tiers]
        axes.barh(range(len(tiers)), full, 0.62, color=GRID, label="full depth")
        axes.barh(
            range(len(tiers)),
            executed,
            0.36,
            color=[tier_color(tier.tier) for tier in tiers],
            label="executed",
        )
        for place, tier in enumerate(tiers):
            saved = text.share(tier.figures.saved_share, signed=True)
            label = f"{text.compute_units(tier.figures.compute_units)} CU, {saved} saved"
            end = max(full[place], executed[place])
            axes.annotate(label, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=7.5)
        _categories(axes, [text.tier_name(tier.tier) for tier in tiers])
        axes.set_xlabel("compute units (10¹² FLOPs); the wide pale bar is the same usage at full depth")
        axes.grid(axis="x")
        axes.margins(x=0.27)

    return _svg("compute-by-tier", 0.75 + 0.42 * len(tiers), draw, "Compute units executed by tier, next to full depth")


def charges_by_tenant(report: Report) -> str:
    """Charges by tenant, split by tier, the largest first."""
    ranked = sorted(report.tenants, key=lambda tenant: (-tenant.total, tenant.tenant))[:_MAX_TENANTS]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ends = [0.0] * len(ranked)
        for tier in [tier.tier for tier in report.tiers]:
            charges = [
                float(next((part.figures.charge or 0 for part in tenant.tiers if part.tier == tier), 0))
                for tenant in ranked
            ]
            axes.barh(
                range(len(ranked)),
                charges,
                0.66,
                left=ends,
                color=tier_color(tier),
                label=printable(text.tier_name(tier)),
            )
            ends = [end + charge for end, charge in zip(ends, charges, strict=True)]
        for place, tenant in enumerate(ranked):
            axes.annotate(
                text.money(tenant.total),
                (ends[place], place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        _categories(axes, [tenant.tenant for tenant in ranked])
        _amounts(axes, report)
        axes.margins(x=0.14)
        axes.set_xlim(left=0)  # if every charge rounds to 0, the axis would otherwise show negative ones
        _legend(figure, axes)

    return _svg("charges-by-tenant", 0.95 + 0.26 * len(ranked), draw, "Charges by tenant, split by tier")


def depth(panels: list[DepthPanel], name: str) -> str:
    """Visits per layer, one panel per tier on its own scale: gaps are skipped layers, peaks looped ones.

    Prompts are pale, hatched where layers were filled, and answers stand on top of them in the tier's colour.
    """
    rows = -(-len(panels) // _PANELS_PER_ROW)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, _PANELS_PER_ROW, squeeze=False, sharex=True)
        flat = [axes for row in grid for axes in row]
        for axes, panel in zip(flat, panels, strict=False):
            _depth_panel(axes, panel)
        for axes in flat[len(panels) :]:
            axes.set_visible(False)
        for axes in flat[max(0, len(panels) - _PANELS_PER_ROW) : len(panels)]:
            axes.set_xlabel("layer")
            axes.tick_params(labelbottom=True)

    return _svg(name, 0.35 + 1.55 * rows, draw, "Visits per layer, one panel per tier")


def _depth_panel(axes: Axes, panel: DepthPanel) -> None:
    layers = range(len(panel.visits))
    axes.bar(layers, panel.visits_prompt, 0.8, color=PALE)
    axes.bar(layers, panel.visits_prefill_filled, 0.8, color="none", edgecolor=MUTED, hatch="///", linewidth=0)
    axes.bar(layers, panel.visits_decode, 0.8, bottom=panel.visits_prompt, color=tier_color(panel.tier))
    for layer, visits in enumerate(panel.visits):
        if visits == 0:
            axes.annotate("×", (layer, 0), (0, 3), textcoords="offset points", ha="center", fontsize=7.5, color=MUTED)
    axes.set_title(printable(text.tier_name(panel.tier)), loc="left", fontsize=9, fontweight="bold", color=INK)
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(-0.7, len(panel.visits) - 0.3)
    axes.grid(axis="y")


def _categories(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.spines["left"].set_visible(False)


def _shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 24 else f"{name[:23]}…"


def _amounts(axes: Axes, report: Report) -> None:
    axes.set_xlabel(report.currency or "")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12f}".rstrip("0").rstrip(".")))
    axes.grid(axis="x")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=5,
        handlelength=1.0,
        handleheight=0.9,
        columnspacing=1.6,
    )


def _svg(name: str, height: float, draw: Callable[[Figure], None], label: str) -> str:
    """Draw a figure as SVG, without what a page does not need, and with ids that are unique to the chart."""
    out = io.StringIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # The page's fonts show the text; matplotlib's own only measures it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)  # the page has it
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
