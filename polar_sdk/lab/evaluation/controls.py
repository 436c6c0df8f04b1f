"""The controls of an evaluation: what a router must be better than, at the same cost, to be worth having.

Programs in, programs out: shuffled, random and static systems of equal cost, and the oracle. Only the oracle uses
outcomes.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.lab.training.outcomes import Outcomes
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.policy import Policy


_NEIGHBOURS = 16
"""Prompts of about the same size that programs are shuffled among."""


def shuffled(programs: Sequence[Program], seed: int, sizes: Sequence[float] | None = None) -> list[Program]:
    """The same programs, dealt to random prompts.

    Args:
        programs: One per prompt.
        seed: Of the deal.
        sizes: Of the prompts: programs then move among prompts of about the same size only. A router that gives long
            prompts to identity would otherwise cost more than its shuffled self, and look better for it.
    """
    dice = random.Random(seed)
    dealt = list(programs)
    order = sorted(range(len(dealt)), key=lambda row: (0.0 if sizes is None else sizes[row], row))
    block = len(order) if sizes is None else _NEIGHBOURS
    for start in range(0, len(order), block or 1):
        places = order[start : start + block]
        for place, other in zip(places, dice.sample(places, len(places)), strict=True):
            dealt[place] = programs[other]
    return dealt


class StaticMix(NamedTuple):
    """One program for every prompt, or two dealt at random where no single one has the cost."""

    cheap: Program
    expensive: Program
    share: float
    """Share of the prompts that run the cheaper one."""

    def deal(self, count: int, seed: int) -> list[Program]:
        """One program per prompt."""
        cheap = round(self.share * count)
        return shuffled([self.cheap] * cheap + [self.expensive] * (count - cheap), seed)

    @property
    def text(self) -> str:
        """The mix in words."""
        if self.cheap == self.expensive:
            return self.cheap.text
        return f"{self.share:.0%} {self.cheap.text}, {1 - self.share:.0%} {self.expensive.text}"


def best_static(quality: Mapping[Program, float], cost: Mapping[Program, float], target: float) -> StaticMix:
    """The best that fixed programs can do at a cost: the highest quality of one program or of two mixed.

    Args:
        quality: Of each program, identity included.
        cost: Of each program on the evaluated prompts.
        target: Cost to meet; a cost outside the programs' range is moved to its nearer end.
    """
    cheapest, most_expensive = min(quality, key=cost.__getitem__), max(quality, key=cost.__getitem__)
    target = min(max(target, cost[cheapest]), cost[most_expensive])
    best, best_quality = StaticMix(cheapest, cheapest, 1.0), -1.0
    for cheap in quality:
        for expensive in quality:
            if not cost[cheap] <= target <= cost[expensive]:
                continue
            span = cost[expensive] - cost[cheap]
            share = (cost[expensive] - target) / span if span else 1.0
            mixed = share * quality[cheap] + (1 - share) * quality[expensive]
            if mixed > best_quality + 1e-12:
                best, best_quality = StaticMix(cheap, cheap if share == 1 else expensive, share), mixed
    return best


def random_programs(ratio: float, count: int, cost: CostModel, policy: Policy, seed: int) -> list[Program]:
    """Programs that skip random layers, each about that ratio of identity's FLOPs at 128 prompt and 64 output tokens.

    Args:
        ratio: At most 1.
        count: How many, at least 1.
        cost: Of the model.
        policy: Its protected layers stay.
        seed: Of the choice.
    """
    generator = random.Random(seed)
    free = policy.free(cost.depth)
    skips = max(0.0, (1 - ratio) / (1 - cost.ratio(Program.skipping(cost.depth, free[:1]))))
    # Between two whole numbers of layers both occur, in the shares that give the ratio on average.
    more = round((skips - int(skips)) * count)
    counts = [min(int(skips) + (place < more), len(free)) for place in range(count)]
    return [Program.skipping(cost.depth, generator.sample(free, skipped)) for skipped in counts]


def oracle(outcomes: Outcomes, programs: Sequence[Program]) -> list[Program]:
    """Per prompt the cheapest of the programs that answers as identity does: only known in hindsight."""
    chosen = []
    for row in range(len(outcomes)):
        of_row = outcomes.of([row] * len(programs), programs)
        agreeing = [(outcome.flops, index) for index, outcome in enumerate(of_row) if outcome.agree]
        chosen.append(programs[min(agreeing)[1]])
    return chosen
