"""The order in which rows with different programs share the layers of one pass. Pure: indices in, indices out."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polar_sdk.program import Program, Step

__all__ = ["Turn", "schedule"]


class Turn(NamedTuple):
    """One step, run once for some of the rows."""

    step: Step
    members: tuple[tuple[int, int], ...]
    """(row, place): the row's index, and the position of the step in that row's program."""


@lru_cache(maxsize=64)
def schedule(programs: tuple[Program, ...]) -> tuple[Turn, ...]:
    """Merge programs so that a layer's weights are read once for all rows that want it next.

    Always the lowest step that any row wants next: rows that loop wait for none, and rows with the same program stay
    together throughout. Every row runs its own program in its own order. Kept, since rows decode together for long.
    """
    return tuple(_turns(programs))


def _turns(programs: Sequence[Program]) -> Iterator[Turn]:
    if all(program == programs[0] for program in programs):
        rows = range(len(programs))
        yield from (Turn(step, tuple((row, at) for row in rows)) for at, step in enumerate(programs[0].steps))
        return
    at = [0] * len(programs)
    while wanted := {row: program.steps[at[row]] for row, program in enumerate(programs) if at[row] < len(program)}:
        step = min(wanted.values())
        members = tuple((row, at[row]) for row, next_step in wanted.items() if next_step == step)
        for row, _ in members:
            at[row] += 1
        yield Turn(step, members)
