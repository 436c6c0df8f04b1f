"""Cuts: how programs depart from full depth, as a few edits of segments, and their evolution under a budget.

An edit skips a segment, crosses it by its bridge, fills it for the prompt, or visits a layer twice; the edits of one
cut do not overlap.
Programs of about one cost are changed one edit at a time and judged by successive halving: all new programs are tried
on a quarter of the prompts, the better half of them on half of the prompts, and the better half of those on all, so
that weak ones cost little. Knows what programs cost and which a policy allows, but not how their fitness is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from polar_sdk.errors import ProgramError
from polar_sdk.programs.cost import NOMINAL_PROMPT
from polar_sdk.programs.program import TAIL, Program, Step

if TYPE_CHECKING:
    import random

    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.policy import Policy


_MAX_SKIP: Final = 4
"""Maximum layers that a new skip leaves out."""
_TRIES: Final = 60
"""Edits that are tried to bring a cut to its budget."""
_RUNGS: Final = (0.25, 0.5, 1.0)
"""Shares of the prompts that programs are tried on, one after another."""


class Edit(NamedTuple):
    """One departure from full depth."""

    first: int
    last: int
    kind: Literal["skip", "bridge", "fill", "loop"]


Cut = frozenset[Edit]


@dataclass(frozen=True)
class Space:
    """The programs that may be searched on one model.

    Attributes:
        cost: Of the model, its bridges and fills included.
        policy: Bounds the programs.
        loops: Whether layers may be visited twice.
    """

    cost: CostModel
    policy: Policy
    loops: bool = True

    @cached_property
    def slack(self) -> float:
        """How far below its budget a program's cost may be, as a share of identity's: a little more than one layer."""
        most_expensive = max(self.cost.layers, key=lambda layer: layer.flops(NOMINAL_PROMPT, NOMINAL_PROMPT))
        layer = self.cost.layers.index(most_expensive)
        return max(0.03, 1.1 * (1 - self.ratio(frozenset({Edit(layer, layer, "skip")}))))

    def program(self, cut: Cut) -> Program:
        """The program of a cut."""
        steps: list[Step] = []
        starts = {edit.first: edit for edit in cut}
        layer = 0
        while layer < self.cost.depth:
            edit = starts.get(layer, Edit(layer, layer, "loop"))
            if edit.kind == "bridge":
                steps.append(Step(edit.first, edit.last, bridge=True))
            elif edit.kind == "fill":
                steps += [Step(filled, filled, fill=TAIL) for filled in range(edit.first, edit.last + 1)]
            elif edit.kind == "loop":
                steps += [Step(layer, layer)] * (2 if layer in starts else 1)
            layer = edit.last + 1
        return Program(steps)

    def ratio(self, cut: Cut) -> float:
        """FLOPs over identity's, at 128 prompt and 64 output tokens."""
        return self.cost.ratio(self.program(cut))

    def allowed(self, cut: Cut) -> bool:
        """Whether no edits overlap, the model has the maps that the program needs, and the policy allows it."""
        edits = sorted(cut)
        if any(after.first <= before.last for before, after in pairwise(edits)):
            return False
        return self.runs(self.program(cut))

    def runs(self, program: Program) -> bool:
        """Whether the model has the maps that a program needs, and the policy allows it."""
        try:
            self.policy.check(program, self.cost)  # fills side by side are one segment, which the model may lack
        except ProgramError:
            return False
        return True

    def random_cut(self, budget: float, dice: random.Random) -> Cut | None:
        """A cut built from scratch; None if none fits."""
        return self.fit(frozenset(), budget, dice)

    def neighbour(self, cut: Cut, budget: float, dice: random.Random) -> Cut | None:
        """A cut with one edit moved, resized or exchanged, at about the same cost; None if none fits."""
        if not cut:
            return self.random_cut(budget, dice)
        edit = dice.choice(sorted(cut))
        others = cut - {edit}
        changed = dice.choice([self._moved, self._resized, self._exchanged])(edit, dice)
        start = others if changed is None else others | {changed}
        return self.fit(start if self.allowed(start) else others, budget, dice)

    def fit(self, cut: Cut, budget: float, dice: random.Random) -> Cut | None:
        """Add edits, or take some back, until the cost is at most `budget` and at most `slack` below it."""
        for _ in range(_TRIES):
            ratio = self.ratio(cut)
            if budget - self.slack <= ratio <= budget:
                return cut
            changed = cut | {self._random_edit(dice)} if ratio > budget else self._shortened(cut, dice)
            if self.allowed(changed):
                cut = changed
        return None

    def _random_edit(self, dice: random.Random) -> Edit:
        fills = sorted(self.cost.fills)
        if fills and dice.random() < 0.4:
            return Edit(*dice.choice(fills), "fill")
        bridges = sorted(self.cost.bridges)
        if bridges and dice.random() < 0.6:
            return Edit(*dice.choice(bridges), "bridge")
        if self.loops and dice.random() < 0.08:
            layer = dice.randrange(self.cost.depth)
            return Edit(layer, layer, "loop")
        first = dice.randrange(self.cost.depth)
        return Edit(first, min(first + dice.randint(0, _MAX_SKIP - 1), self.cost.depth - 1), "skip")

    def _shortened(self, cut: Cut, dice: random.Random) -> Cut:
        """The cut with one edit shortened or gone."""
        edit = dice.choice(sorted(cut))
        shorter = {edit._replace(last=edit.last - 1)} if edit.kind == "skip" and edit.last > edit.first else set()
        return cut - {edit} | shorter

    def _moved(self, edit: Edit, dice: random.Random) -> Edit | None:
        if edit.kind in ("bridge", "fill"):
            return self._exchanged(edit, dice)
        offset = dice.choice([-2, -1, 1, 2])
        if edit.first + offset < 0 or edit.last + offset >= self.cost.depth:
            return None
        return edit._replace(first=edit.first + offset, last=edit.last + offset)

    def _resized(self, edit: Edit, dice: random.Random) -> Edit | None:
        if edit.kind != "skip":
            return self._exchanged(edit, dice)
        last = edit.last + dice.choice([-1, 1])
        return edit._replace(last=last) if edit.first <= last < self.cost.depth else None

    def _exchanged(self, edit: Edit, dice: random.Random) -> Edit | None:
        """A bridge over the same layers for a skip, or the other way round; another fill for one; or any other edit."""
        if edit.kind == "fill" and dice.random() < 0.7:
            return Edit(*dice.choice(sorted(self.cost.fills)), "fill")
        if edit.kind == "skip" and (edit.first, edit.last) in self.cost.bridges:
            return edit._replace(kind="bridge")
        if edit.kind == "bridge" and dice.random() < 0.5:
            return edit._replace(kind="skip")
        return self._random_edit(dice)


Fitness = Callable[[Sequence[Program], float], dict[Program, float]]
"""Fitness of programs, on that share of the prompts."""


def evolve(
    space: Space, budget: float, fitness_of: Fitness, *, population: int, generations: int, dice: random.Random
) -> dict[Program, float]:
    """Fitness on all prompts of every program that reached the last rung; empty if no program fits the budget.

    Args:
        space: Where to look.
        budget: Maximum FLOPs of a program, as a share of identity's.
        fitness_of: Measures programs.
        population: Programs kept from one generation to the next, and new ones tried in each.
        generations: Rounds after the first.
        dice: Source of chance.
    """
    seen: dict[Program, Cut] = {}
    best: dict[Program, float] = {}
    for _ in range(generations + 1):
        leading = sorted(best, key=lambda program: (-best[program], program.steps))[:population]
        new = _brood(space, budget, [seen[program] for program in leading], seen, population, dice)
        seen |= new
        best |= _halve(list(new), fitness_of)
    return best


def _brood(
    space: Space, budget: float, parents: Sequence[Cut], seen: Collection[Program], count: int, dice: random.Random
) -> dict[Program, Cut]:
    """Programs not seen before: neighbours of the parents, or random ones where there are none."""
    brood: dict[Program, Cut] = {}
    for _ in range(6 * count):
        if len(brood) == count:
            break
        cut = space.neighbour(dice.choice(parents), budget, dice) if parents else space.random_cut(budget, dice)
        if cut and (program := space.program(cut)) not in seen:
            brood[program] = cut
    return brood


def _halve(programs: list[Program], fitness_of: Fitness) -> dict[Program, float]:
    """Fitness on all prompts of the programs that reach the last rung."""
    fitness: dict[Program, float] = {}
    for rung, share in enumerate(_RUNGS):
        if not programs:
            return {}
        fitness = fitness_of(programs, share)
        if rung < len(_RUNGS) - 1:
            ranked = sorted(programs, key=lambda program: (-fitness[program], program.steps))
            programs = ranked[: max(1, (len(ranked) + 1) // 2)]
    return fitness
