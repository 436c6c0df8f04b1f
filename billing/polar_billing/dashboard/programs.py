"""Counts per layer by model and tier: the number of recent requests that ran, skipped or looped it, and so on.

Counted by the database, program by program, over the requests that `polar report` counts for its depth charts: those of
which at least one layer ran. Knows no HTML.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Text, func, select, type_coerce

from polar_billing.ledger.records import Selection, conditions
from polar_billing.ledger.schema import usage_table
from polar_billing.prices.entries import tier_order
from polar_billing.reports.depth import KINDS, ProgramUse, read_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Connection, Row

    from polar_billing.reports.depth import Kind

_NONE: Final = "[]"
"""Visits of a request that ended before its first layer."""


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
    period = selection.period
    query = (
        select(
            usage.model,
            usage.tier,
            usage.program,
            func.count().label("requests"),
            func.max(func.nullif(prefill, _NONE)).label("prefill"),
            func.max(func.nullif(decode, _NONE)).label("decode"),
        )
        .where(*conditions(selection, usage, usage.started_at, period.since, period.until))
        .where((prefill != _NONE) | (decode != _NONE))
        .group_by(usage.model, usage.tier, usage.program)
    )
    rows = sorted(connection.execute(query), key=lambda row: (row.model, tier_order(row.tier)))
    return [
        _heat(model, tier, list(members)) for (model, tier), members in groupby(rows, lambda row: (row.model, row.tier))
    ]


def _heat(model: str, tier: str | None, rows: Sequence[Row[Any]]) -> Heat:
    layers = max(_length(visits) for row in rows for visits in (row.prefill, row.decode))
    ranked = sorted(rows, key=lambda row: (-row.requests, row.program))
    programs = tuple(
        ProgramUse(program=row.program, requests=row.requests, layers=read_layers(row.program, layers))
        for row in ranked
    )
    return Heat(model, tier, sum(use.requests for use in programs), layers, _by_layer(programs, layers), programs)


def _length(visits: str | None) -> int:
    """Number of entries of a JSON array of integers, which has one per layer."""
    return 0 if visits is None else visits.count(",") + 1


def _by_layer(programs: Iterable[ProgramUse], layers: int) -> dict[Kind, tuple[int, ...]]:
    counts: dict[Kind, Counter[int]] = {kind: Counter() for kind in KINDS}
    for use in programs:
        for state in use.layers:
            counts[state.kind][state.layer] += use.requests
    return {kind: tuple(counts[kind][layer] for layer in range(layers)) for kind in KINDS if counts[kind]}
