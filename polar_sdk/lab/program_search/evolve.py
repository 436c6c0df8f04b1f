"""Evolution under a budget: programs of about one cost, changed one edit at a time, judged by successive halving.

All new programs are tried on a quarter of the prompts, the better half of them on half of the prompts, and the better
half of those on all. So weak ones cost little. Knows cuts and fitness, not how fitness is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final

from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    import random

    from polar_sdk.lab.program_search.cuts import Cut, Space


Judge = Callable[[Sequence[Program], float], dict[Program, float]]
"""Fitness of programs, on that share of the prompts."""
_RUNGS: Final = (0.25, 0.5, 1.0)


def evolve(
    space: Space, budget: float, judge: Judge, *, population: int, generations: int, dice: random.Random
) -> dict[Program, float]:
    """Fitness on all prompts of every program that came so far; empty where no program fits the budget.

    Args:
        space: Where to look.
        budget: Most FLOPs of a program, as a share of identity's.
        judge: Measures programs.
        population: Programs that stay from one generation to the next, and that are tried anew in each.
        generations: Rounds after the first.
        dice: Source of chance.
    """
    seen: dict[Program, Cut] = {}
    best: dict[Program, float] = {}
    for _ in range(generations + 1):
        leading = sorted(best, key=lambda program: (-best[program], program.steps))[:population]
        new = _brood(space, budget, [seen[program] for program in leading], seen, population, dice)
        seen |= new
        best |= _halve(list(new), judge)
    return best


def _brood(
    space: Space, budget: float, parents: Sequence[Cut], seen: Collection[Program], count: int, dice: random.Random
) -> dict[Program, Cut]:
    """Programs not seen before: neighbours of the parents, or random ones where there are none."""
    found: dict[Program, Cut] = {}
    for _ in range(6 * count):
        if len(found) == count:
            break
        cut = space.neighbour(dice.choice(parents), budget, dice) if parents else space.random_cut(budget, dice)
        if cut and (program := space.program(cut)) not in seen:
            found[program] = cut
    return found


def _halve(programs: list[Program], judge: Judge) -> dict[Program, float]:
    """Fitness on all prompts of those that reach the last rung."""
    fitness: dict[Program, float] = {}
    for number, share in enumerate(_RUNGS):
        if not programs:
            return {}
        fitness = judge(programs, share)
        if number < len(_RUNGS) - 1:
            ranked = sorted(programs, key=lambda program: (-fitness[program], program.steps))
            programs = ranked[: max(1, (len(ranked) + 1) // 2)]
    return fitness
