"""The geometry of the page's pictures: bars in percent, and strips of layers as paths. Knows no HTML and no colours."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

from polar_billing.reports import text
from polar_billing.reports.depth import KINDS, LayerState
from polar_billing.reports.html import tier_kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from decimal import Decimal

    from polar_billing.budgets.offers import Standing
    from polar_billing.dashboard.programs import Heat
    from polar_billing.reports.depth import Kind
    from polar_billing.reports.summary import TierReport
    from polar_billing.reports.text import Unit

CELL: Final = 10
"""Width and height of a layer in a strip, its gap included. Unit: user units of the picture."""
_GAP: Final = 1
_PALEST: Final = 0.15
"""Layers that few requests ran must still be seen. Unit: opacity."""
_SHAPES: Final[dict[Kind, tuple[int, int]]] = {
    "run": (0, CELL),
    "looped": (0, CELL),
    "filled": (5, 5),
    "bridged": (4, 2),
    "skipped": (9, 1),
}
"""Top and height of the cell of a layer: its kind shows without its colour."""


class Segment(NamedTuple):
    """One coloured part of a bar."""

    kind: str
    """Key of its colour."""
    start: str
    """Unit: percent of the bar."""
    width: str
    """Unit: percent of the bar."""


class Bar(NamedTuple):
    """A bar, and its figures in words."""

    label: str
    segments: tuple[Segment, ...]
    words: str


class Path(NamedTuple):
    """Cells of a strip that look the same."""

    kind: str
    opacity: str
    d: str


class Strip(NamedTuple):
    """One kind's counts per layer, as a picture."""

    kind: Kind
    paths: tuple[Path, ...]
    words: str


def charge_bars(tiers: Sequence[TierReport], unit: Unit) -> tuple[Bar, ...]:
    """Draw each tier's charge on the charge at full depth."""
    known = [
        (tier, charge, full)
        for tier in tiers
        if (charge := tier.figures.charge) is not None and (full := tier.figures.charge_full_depth) is not None
    ]
    longest = max((max(charge, full) for _, charge, full in known), default=None)
    return tuple(
        Bar(
            text.tier_name(tier.tier),
            (
                Segment("depth", "0", _percent(full, longest)),
                Segment(tier_kind(tier.tier), "0", _percent(charge, longest)),
            ),
            f"{unit.show(charge)} of {unit.show(full)} {unit.name}, "
            f"{text.share(tier.figures.saved_share, signed=True)} compute saved",
        )
        for tier, charge, full in known
    )


def budget_bar(standing: Standing) -> tuple[Segment, ...]:
    """Draw what is spent and held of a limit; longer than the limit where that was lowered."""
    whole = max(standing.budget.limit_count, standing.spent + standing.held, 1)
    spent, held = _share(standing.spent, whole), _share(standing.held, whole)
    return Segment("spent", "0", spent), Segment("held", spent, held)


def meter(part: int, whole: int) -> tuple[Segment, ...]:
    """A part of a whole."""
    return (Segment("used", "0", _share(min(part, whole), whole)),) if whole else ()


def heat_strips(heat: Heat) -> tuple[Strip, ...]:
    """One strip for each kind that occurs; the more requests, the stronger its cells."""
    strips = []
    for kind, counts in heat.kinds.items():
        cells: defaultdict[str, list[int]] = defaultdict(list)
        for layer, count in enumerate(counts):
            if count:
                cells[f"{_PALEST + (1 - _PALEST) * heat.share(kind, layer):.2f}"].append(layer)
        paths = tuple(Path(kind, opacity, _cells(layers)) for opacity, layers in cells.items())
        strips.append(Strip(kind, paths, _in_words(counts, heat.readable)))
    return tuple(strips)


def program_strip(layers: Sequence[LayerState]) -> tuple[Path, ...]:
    """Draw what one program makes of the layers."""
    cells: defaultdict[Kind, list[int]] = defaultdict(list)
    for state in layers:
        cells[state.kind].append(state.layer)
    return tuple(Path(kind, "1", _cells(places, *_SHAPES[kind])) for kind, places in cells.items())


def legend() -> tuple[tuple[Kind, tuple[Path, ...]], ...]:
    """One layer of each kind, alone."""
    return tuple((kind, program_strip([LayerState(layer=0, kind=kind, visits=1)])) for kind in KINDS)


def _cells(layers: Sequence[int], top: int = 0, height: int = CELL) -> str:
    """The outline of the cells of some layers."""
    wide = CELL - _GAP
    return "".join(f"M{layer * CELL} {top}h{wide}v{height}h-{wide}z" for layer in layers)


def _in_words(counts: Sequence[int], of: int) -> str:
    """Counts per layer, layers with the same count together: `0–19: 12, 20–29: 3 of 12 requests`."""
    runs: list[tuple[int, int, int]] = []
    for layer, count in enumerate(counts):
        if runs and runs[-1][2] == count:
            runs[-1] = (runs[-1][0], layer, count)
        else:
            runs.append((layer, layer, count))
    said = ", ".join(
        f"{first if first == last else f'{first}–{last}'}: {count:,}" for first, last, count in runs if count
    )
    return f"{said} of {of:,} request{'' if of == 1 else 's'}"


def _percent(amount: Decimal, longest: Decimal | None) -> str:
    return f"{float(amount / longest) * 100:.2f}" if longest and amount > 0 else "0"


def _share(part: int, whole: int) -> str:
    return f"{part / whole * 100:.2f}"
