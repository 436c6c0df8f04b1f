"""The controls of an evaluation: what a router must be better than, at the same cost, to be worth having.

Programs in, programs out: shuffled, random and static systems of equal cost, and the oracle. Knows outcomes only where
the oracle needs them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polar_sdk.programs.cost import NOMINAL_OUTPUT, NOMINAL_PROMPT
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
    order = sorted(range(len(dealt)), key=lambda at: (0.0 if sizes is None else sizes[at], at))
    block = len(order) if sizes is None else _NEIGHBOURS
    for start in range(0, len(order), block or 1):
        places = order[start : start + block]
        for place, other in zip(places, dice.sample(places, len(places)), strict=True):
            dealt[place] = programs[other]
    return dealt


@dataclass(frozen=True)
class StaticMix:
    """A program for every prompt, or two dealt at random where no single one has the cost.

    Attributes:
        cheap: The cheaper one.
        dear: The dearer one; the same where there is only one.
        share: Of the prompts that run the cheaper one.
    """

    cheap: Program
    dear: Program
    share: float

    def deal(self, count: int, seed: int) -> list[Program]:
        """One program per prompt."""
        cheap = round(self.share * count)
        return shuffled([self.cheap] * cheap + [self.dear] * (count - cheap), seed)

    @property
    def text(self) -> str:
        """In words."""
        if self.cheap == self.dear:
            return self.cheap.text
        return f"{self.share:.0%} {self.cheap.text}, {1 - self.share:.0%} {self.dear.text}"


def best_static(quality: Mapping[Program, float], cost: Mapping[Program, float], target: float) -> StaticMix:
    """The best that fixed programs can do at a cost: the highest quality of one program or of two mixed.

    Args:
        quality: Of each program, identity included.
        cost: Of each program on the prompts evaluated.
        target: Cost to meet; one that no program has is moved to the nearest that one has.
    """
    cheapest, dearest = min(quality, key=cost.__getitem__), max(quality, key=cost.__getitem__)
    target = min(max(target, cost[cheapest]), cost[dearest])
    found, height = StaticMix(cheapest, cheapest, 1.0), -1.0
    for cheap in quality:
        for dear in quality:
            if not cost[cheap] <= target <= cost[dear]:
                continue
            span = cost[dear] - cost[cheap]
            share = (cost[dear] - target) / span if span else 1.0
            mixed = share * quality[cheap] + (1 - share) * quality[dear]
            if mixed > height + 1e-12:
                found, height = StaticMix(cheap, cheap if share == 1 else dear, share), mixed
    return found


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
    protected = {layer % cost.depth for layer in policy.protected}
    free = [layer for layer in range(cost.depth) if layer not in protected]
    full = cost.request(Program.identity(cost.depth), NOMINAL_PROMPT, NOMINAL_OUTPUT).total
    layer = full - cost.request(Program.skipping(cost.depth, free[:1]), NOMINAL_PROMPT, NOMINAL_OUTPUT).total
    wanted = max(0.0, (1 - ratio) * full / layer)
    # Between two whole numbers of layers both occur, in the share that gives the ratio on average.
    more = round((wanted - int(wanted)) * count)
    numbers = [min(int(wanted) + (at < more), len(free)) for at in range(count)]
    return [Program.skipping(cost.depth, generator.sample(free, number)) for number in numbers]


def oracle(outcomes: Outcomes, programs: Sequence[Program]) -> list[Program]:
    """Per prompt the cheapest of the programs that answers as identity does: known only afterwards."""
    chosen = []
    for row in range(len(outcomes)):
        facts = outcomes.of([row] * len(programs), programs)
        agreeing = [(one.flops, at) for at, one in enumerate(facts) if one.agree]
        chosen.append(programs[min(agreeing)[1]])
    return chosen
