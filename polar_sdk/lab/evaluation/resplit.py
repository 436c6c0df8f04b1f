"""Do promises hold? Calibrate on one random half of prompts, look at the other half, many times.

The other half is a sample too: its share of lost prompts lies above the truth as often as below. So two things are
counted, promises that the other half breaks, and promises that all prompts together break.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.lab.evaluation.calibrate import TierPromise, Walk
    from polar_sdk.router.certificate import Certificate, Loss


class Resplits(NamedTuple):
    """How often one tier's promise broke for one kind of prompt."""

    tier: str
    kind: str
    """A kind of prompt, or `any` of them."""
    times: int
    other_half: int
    """Times that more than α was lost on the half that was not calibrated on."""
    pooled: int
    """Times that more than α was lost on both halves together: the best estimate of the truth that there is."""

    @property
    def text(self) -> str:
        """In words."""
        return (
            f"{self.tier}, {self.kind}: of {self.times} promises made on a random half, {self.other_half} broke on the "
            f"other half and {self.pooled} on both together"
        )


def resplit(walk: Walk, tiers: Mapping[str, TierPromise], delta: float, times: int = 100) -> list[Resplits]:
    """Split a walk's prompts at random, calibrate, and count broken promises, by tier and kind of prompt.

    Raises:
        CalibrationSizeError: Half of the prompts is too few for a tier's α.
    """
    kinds = walk.by_kind(range(len(walk.outcomes)))
    broken = {(tier, kind): [0, 0] for tier in tiers for kind in (*kinds, "any")}
    for seed in range(times):
        here = _half(kinds, seed)
        certificate = walk.certificate(sorted(here), tiers, delta)
        for tier in tiers:
            found: dict[str, tuple[bool, bool]] = {
                kind: _breaks(walk, certificate, tier, rows, here) for kind, rows in kinds.items()
            }
            found["any"] = (any(a for a, _ in found.values()), any(b for _, b in found.values()))
            for kind, (other, pooled) in found.items():
                broken[tier, kind][0] += other
                broken[tier, kind][1] += pooled
    return [Resplits(tier, kind, times, *counts) for (tier, kind), counts in broken.items()]


def _half(kinds: Mapping[str, Sequence[int]], seed: int) -> set[int]:
    """Half of the rows of each kind."""
    dice = random.Random(seed)
    return {row for rows in kinds.values() for row in dice.sample(rows, len(rows) // 2)}


def _breaks(walk: Walk, certificate: Certificate, tier: str, rows: Sequence[int], here: set[int]) -> tuple[bool, bool]:
    """Whether more than α is lost on the other half, and on both."""
    promise = certificate.tiers[tier]
    at = certificate.thetas.index(promise.theta)
    labelled = bool(walk.outcomes.matrix.labelled[list(rows)].all())
    loss: Loss = "differs" if promise.loss == "drops" and not labelled else promise.loss
    lost = walk.lost[loss][at]
    other = [row for row in rows if row not in here]
    return _mean(lost[other].tolist()) > promise.alpha, _mean(lost[list(rows)].tolist()) > promise.alpha


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
