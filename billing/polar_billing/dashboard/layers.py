"""Counts per layer by model and tier: the number of recent requests that ran, skipped or looped it; as pictures, too.

Counted by the database, program by program, over the requests that `polar report` counts for its depth charts: those of
which at least one layer ran. A strip of layers is a few paths. Knows no HTML and no colours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import Text, func, select, type_coerce

from polar_billing.ledger.rollups import usage_of
from polar_billing.ledger.schema import usage_table
from polar_billing.prices.entries import tier_order
from polar_billing.reports.depth import KINDS, LayerState, ProgramUse, read_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Row

    from polar_billing.ledger.records import Selection
    from polar_billing.reports.depth import Kind

_NONE: Final = "[]"
"""Visits of a request that ended before its first layer."""
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


@dataclass(frozen=True)
class Heat:
    """The requests of one model and tier."""

    model: str
    tier: str | None
    requests: int
    """Requests of which at least one layer ran."""
    layers: int
    """Depth of the model."""
    kinds: dict[Kind, tuple[int, ...]]
    """Kind → requests per layer, index = layer; only kinds that occur. A layer's numbers add up to `readable`."""
    programs: tuple[ProgramUse, ...]
    """The most used first."""

    @property
    def readable(self) -> int:
        """Requests whose program could be read."""
        return sum(use.requests for use in self.programs if use.layers)

    def share(self, kind: Kind, layer: int) -> float:
        """The share of the requests that made this of a layer."""
        return self.kinds[kind][layer] / self.readable


def heat_of(connection: Connection, selection: Selection) -> list[Heat]:
    """The programs that some usage ran, by model and tier; the selection's tags are ignored."""
    usage = usage_table.c
    prefill, decode = (type_coerce(column, Text) for column in (usage.visits_prefill, usage.visits_decode))
    query = (
        select(
            usage.model,
            usage.tier,
            usage.program,
            func.count().label("requests"),
            func.max(func.nullif(prefill, _NONE)).label("prefill"),
            func.max(func.nullif(decode, _NONE)).label("decode"),
        )
        .where(*usage_of(selection))
        .where((prefill != _NONE) | (decode != _NONE))
        .group_by(usage.model, usage.tier, usage.program)
    )
    rows = sorted(connection.execute(query), key=lambda row: (row.model, tier_order(row.tier)))
    return [
        _heat(model, tier, list(members)) for (model, tier), members in groupby(rows, lambda row: (row.model, row.tier))
    ]


def _heat(model: str, tier: str | None, rows: Sequence[Row[Any]]) -> Heat:
    # A JSON array of integers, one per layer.
    layers = max(visits.count(",") + 1 for row in rows for visits in (row.prefill, row.decode) if visits is not None)
    programs = tuple(
        ProgramUse(program=row.program, requests=row.requests, layers=read_layers(row.program, layers))
        for row in sorted(rows, key=lambda row: (-row.requests, row.program))
    )
    counts: dict[Kind, Counter[int]] = {kind: Counter() for kind in KINDS}
    for use in programs:
        for state in use.layers:
            counts[state.kind][state.layer] += use.requests
    kinds = {kind: tuple(counts[kind][layer] for layer in range(layers)) for kind in KINDS if counts[kind]}
    return Heat(model, tier, sum(use.requests for use in programs), layers, kinds, programs)


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
