"""The frontier of measured programs: which ones no other beats, and which decide what tiers save.

Knows measurements, no model.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from polar_sdk.lab.training.examples import harder_kinds, kinds_of, losses

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.programs.program import Program
    from polar_sdk.router.certificate import Loss, TierPromise


def near(
    matrix: RewardMatrix, promises: Iterable[TierPromise], facts: Mapping[Program, float] | None = None
) -> list[Program]:
    """The programs that decide what tiers with these promises save, from few to many FLOPs saved.

    Of each promise the one that saves most of those that keep it here, in the harder half of the classes as well, and
    the next, which training may bring within it. No more: they share the training steps, and a few well-trained maps
    save more than many. The kind that most texts are of decides: a router may give others programs of their own.

    Args:
        matrix: Of texts.
        promises: Of the tiers.
        facts: The share of right answers to questions about facts that a program loses; 0 for those that are not named.
    """
    facts = facts or {}
    kinds, harder = kinds_of(matrix), harder_kinds(matrix)
    ((most, _),) = Counter(kinds).most_common(1)
    matrix = matrix.rows([row for row, kind in enumerate(kinds) if kind == most])
    flops = matrix.flops.double().sum(0)
    ranked = sorted(range(1, len(matrix.programs)), key=lambda column: -float(flops[column]))
    hard = [row for row, name in enumerate(matrix.classes) if name in harder]

    def lost(loss: Loss) -> Tensor:
        each = losses(matrix, loss)
        return torch.maximum(each.mean(0), each[hard].mean(0)) if hard else each.mean(0)

    strict = lost("strict")
    chosen: set[int] = set()
    for promise in promises:
        differs = lost(promise.loss)
        kept = [
            place
            for place, column in enumerate(ranked)
            if differs[column] <= promise.alpha
            and (promise.strict is None or strict[column] <= promise.strict)
            and facts.get(matrix.programs[column], 0.0) <= promise.alpha
        ]
        last = max(kept, default=-1)
        chosen.update(ranked[max(last, 0) : last + 2])
    return [matrix.programs[column] for column in ranked if column in chosen]


def undominated(matrix: RewardMatrix) -> RewardMatrix:
    """The matrix of one form of answers without programs that another one beats.

    That one saves as much and keeps as many tokens.
    """
    kept = matrix.share.double().mean(0).tolist()
    flops = matrix.flops.double().sum(0).tolist()
    programs = range(len(matrix.programs))
    better = [
        place
        for place in programs
        if place == 0
        or not any(kept[other] >= kept[place] and flops[other] < flops[place] for other in programs if other != place)
    ]
    return matrix.only(better)
