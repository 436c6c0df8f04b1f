"""Counts per layer by model and tier: the number of recent requests that ran, skipped or looped it.

Counted by the database, program by program, over the requests that `polar report` counts for its depth charts: those of
which at least one layer ran. Knows no HTML and no colours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Text, func, select, type_coerce

from polar_billing.ledger.rollups import usage_of
from polar_billing.ledger.schema import usage_table
from polar_billing.prices.entries import tier_order
from polar_billing.reports.depth import KINDS, ProgramUse, read_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Row

    from polar_billing.ledger.records import Selection
    from polar_billing.reports.depth import Kind

_NONE: Final = "[]"
"""Visits of a request that ended before its first layer."""
_PALEST: Final = 0.15
"""Layers that few requests ran must still be seen. Unit: opacity."""
SHAPES: Final[dict[Kind, tuple[int, int]]] = {
    "run": (0, 10),
    "skipped": (9, 1),
    "looped": (0, 10),
    "bridged": (4, 2),
    "filled": (5, 5),
}
"""Top and height of the cell of a layer, of 10: its kind shows without its colour."""


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

    def strengths(self, kind: Kind) -> dict[str, list[int]]:
        """Opacity → layers: the more requests made this of a layer, the stronger it is."""
        cells: defaultdict[str, list[int]] = defaultdict(list)
        for layer, count in enumerate(self.kinds[kind]):
            if count:
                cells[f"{_PALEST + (1 - _PALEST) * count / self.readable:.2f}"].append(layer)
        return cells

    def words(self, kind: Kind) -> str:
        """Counts per layer, layers with the same count together: `0–19: 12, 20–29: 3 of 12 requests`."""
        said, first, of = [], 0, self.readable
        for count, members in groupby(self.kinds[kind]):
            last = first + len(list(members)) - 1
            said += [f"{first if first == last else f'{first}–{last}'}: {count:,}"] if count else []
            first = last + 1
        return f"{', '.join(said)} of {of:,} request{'' if of == 1 else 's'}"


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
