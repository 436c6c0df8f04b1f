"""The order in which rows with different programs share the layers of one pass. Pure: indices in, indices out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_sdk.program import Program

__all__ = ["Turn", "turns"]


class Turn(NamedTuple):
    """One layer, run once for some of the rows."""

    layer: int
    members: tuple[tuple[int, int], ...]
    """(row, visit): the row's index, and the position in that row's program."""


def turns(programs: Sequence[Program]) -> Iterator[Turn]:
    """Merge programs so that a layer's weights are read once for all rows that want it next.

    Always the lowest layer that any row wants next: rows that loop wait for none, and rows with the same program stay
    together throughout. Every row runs its own program in its own order.
    """
    at = [0] * len(programs)
    while True:
        wanted = {row: programs[row].layers[visit] for row, visit in enumerate(at) if visit < len(programs[row])}
        if not wanted:
            return
        layer = min(wanted.values())
        members = tuple((row, at[row]) for row, next_layer in wanted.items() if next_layer == layer)
        for row, _ in members:
            at[row] += 1
        yield Turn(layer, members)
