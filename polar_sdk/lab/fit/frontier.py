"""The frontier of measured programs: which ones no other beats, which decide what tiers save, and what a router gains.

Knows measurements, no model.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import torch

from polar_sdk.lab.training.examples import losses

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.programs.program import Program
    from polar_sdk.router.certificate import TierPromise
    from polar_sdk.router.learned import LearnedRouter


def earned(router: LearnedRouter, matrix: RewardMatrix) -> float:
    """Share of prompts that a router spares a strict loss, against mixes of static programs of equal cost.

    The mean along its dial; negative where the mixes lose less.
    """
    lost = losses(matrix, "strict").double()
    flops, rows = matrix.flops.double(), torch.arange(len(matrix))
    place = {program: column for column, program in enumerate(matrix.programs)}
    outputs = router.outputs(router.reader.stack(matrix.tokens).cpu())
    lengths = [len(tokens) for tokens in matrix.tokens]
    mixes = sorted(zip(flops.sum(0).tolist(), lost.mean(0).tolist(), strict=True))
    gains = []
    for theta in router.facts.dial[1:]:
        columns = torch.tensor([place[program] for program in router.choose_all(outputs, theta, lengths)])
        spent = float(flops[rows, columns].sum())
        gains.append(_mixed(mixes, spent) - float(lost[rows, columns].mean()))
    return fmean(gains) if gains else 0.0


def _mixed(points: Sequence[tuple[float, float]], spent: float) -> float:
    """The smallest loss of a mix of two static programs, (FLOPs, loss) each, that spends that much."""
    cheaper = [point for point in points if point[0] <= spent] or [points[0]]
    costlier = [point for point in points if point[0] >= spent] or [points[-1]]
    return min(
        loss if high == low else loss + (more - loss) * (spent - low) / (high - low)
        for low, loss in cheaper
        for high, more in costlier
    )


def near(matrix: RewardMatrix, promises: Iterable[TierPromise]) -> list[Program]:
    """The programs that decide what tiers with these promises save, from few to many FLOPs saved.

    Of each promise the one that saves most of those that keep it here, and the next, which training may bring within
    it. No more: they share the training steps, and a few well-trained maps save more than many.
    """
    flops, strict = matrix.flops.double().sum(0), losses(matrix, "strict").mean(0)
    ranked = sorted(range(1, len(matrix.programs)), key=lambda column: -float(flops[column]))
    chosen: set[int] = set()
    for promise in promises:
        lost = losses(matrix, promise.loss).mean(0)
        kept = [
            place
            for place, column in enumerate(ranked)
            if lost[column] <= promise.alpha and (promise.strict is None or strict[column] <= promise.strict)
        ]
        last = max(kept, default=-1)
        chosen.update(ranked[max(last, 0) : last + 2])
    return [matrix.programs[column] for column in ranked if column in chosen]


def undominated(matrix: RewardMatrix) -> RewardMatrix:
    """The matrix without programs that another one beats: one that saves as much and keeps as many tokens."""
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
