"""Calibration: count what a router loses along its dial on unseen prompts, and certify tiers on the counts.

`resplit` tests such promises: it calibrates on one random half of the prompts and tests on the other half, many times.
The other half is also a sample: its share of lost prompts is above the true share as often as below. So two numbers are
counted: promises that break on the other half, and promises that break on all prompts together.

Pure, apart from the outcomes passed in. `router/certificate.py` knows how a promise follows from the counts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import ceil
from statistics import fmean
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from polar_sdk.errors import DataError
from polar_sdk.lab.training.outcomes import MIN_CLASS, by_class, grouped
from polar_sdk.router.certificate import (
    FORMS,
    LOSSES,
    Certificate,
    Counts,
    Loss,
    TierPromise,
    check_sizes,
    form_of,
    tier_promise,
)
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.lab.training.outcomes import Outcomes
    from polar_sdk.router.learned import LearnedRouter


TIER_ALPHAS: Final[dict[str, TierPromise]] = {
    "economy": TierPromise(0.10),
    "standard": TierPromise(0.05),
    "premium": TierPromise(0.02),
}
"""The default promises of the tiers."""
HARDER: Final = "harder kinds"
"""Name of the class that `harder_kinds` form together."""
FACTS: Final = "facts"
"""Name of the class of questions whose right answers count, and nothing else of them; see `count_facts`."""


def certify(
    router: LearnedRouter,
    outputs: Tensor,
    outcomes: Outcomes,
    *,
    tiers: Mapping[str, TierPromise] = TIER_ALPHAS,
    delta: float = 0.1,
    facts: Counts | None = None,
    on_progress: Progress = silent,
) -> Certificate:
    """Certify tiers of a bound router.

    Args:
        router: Bound to the model that the outcomes were measured on.
        outputs: Its network's outputs for the calibration prompts, (P, O).
        outcomes: Of the calibration prompts, P rows.
        tiers: What each tier is to promise.
        delta: Maximum probability that a promise is wrong.
        facts: Counts of the class `FACTS`.
        on_progress: Called with (stage, values of θ done, values in all).

    Raises:
        CalibrationSizeError: A tier's α needs more prompts, of every form of answer.
        DataError: A tier counts wrong answers, but the right ones are not known.
    """
    tiers = {tier: TierPromise(*promised) for tier, promised in tiers.items()}  # a plain pair will do
    _check(outcomes, tiers, delta)
    walk = DialWalk.along(router, outputs, outcomes, facts, on_progress)
    return walk.certificate(range(len(outcomes)), tiers, delta)


@dataclass(frozen=True, eq=False)
class DialWalk:
    """Losses and FLOPs of a router on P prompts at each of K values of θ.

    Attributes:
        router: Bound to its model.
        outcomes: Of the prompts.
        lost: (K, P) int8 by loss: 1 lost, −1 gained, 0 neither.
        flops: (K, P) float64, the router's own included where it runs.
        facts: Counts of the class `FACTS`, whose prompts are not among these; None = there is none.
    """

    router: LearnedRouter
    outcomes: Outcomes
    lost: Mapping[Loss, Tensor]
    flops: Tensor
    facts: Counts | None = None

    @classmethod
    def along(
        cls,
        router: LearnedRouter,
        outputs: Tensor,
        outcomes: Outcomes,
        facts: Counts | None = None,
        on_progress: Progress = silent,
    ) -> DialWalk:
        """Walk a router's dial over prompts whose outcomes are known."""
        dial, rows = router.facts.dial, range(len(outcomes))
        lengths = [len(tokens) for tokens in outcomes.matrix.tokens]
        lost: dict[Loss, list[list[int]]] = {loss: [] for loss in LOSSES}
        flops = []
        for done, theta in enumerate(dial):
            on_progress("calibrating", done, len(dial))
            programs = [router.programs[0]] * len(rows) if theta == 0 else router.choose_all(outputs, theta, lengths)
            spent = torch.tensor([outcome.flops for outcome in outcomes.all(programs)]).double()
            flops.append(spent + router.network.flops if theta else spent)
            for loss, values in lost.items():
                values.append(outcomes.losses(rows, programs, loss))
        on_progress("calibrating", len(dial), len(dial))
        counted: dict[Loss, Tensor] = {loss: torch.tensor(values, dtype=torch.int8) for loss, values in lost.items()}
        return cls(router, outcomes, counted, torch.stack(flops), facts)

    def certificate(self, rows: Sequence[int], tiers: Mapping[str, TierPromise], delta: float) -> Certificate:
        """The certificate that calibration on these prompts gives."""
        matrix = self.outcomes.matrix
        classes = {name: self._count(of_class) for name, of_class in self.by_class(rows).items()}
        of_forms = grouped(rows, lambda row: form_of(matrix.kinds[row]))
        certificate = Certificate(
            subject=self.router.subject,
            data=self.outcomes.matrix.data,
            delta=delta,
            thetas=self.router.facts.dial,
            saved={form: self._saved(of_forms[form]) for form in FORMS if form in of_forms},
            kinds={kind: self._count(of_kind) for kind, of_kind in self.by_kind(rows).items()},
            classes=classes if self.facts is None else {**classes, FACTS: self.facts},
        )
        for tier, promised in tiers.items():
            certificate = tier_promise(certificate, tier, promised)
        return certificate

    def _saved(self, rows: Sequence[int]) -> tuple[float, ...]:
        """Share of identity's FLOPs saved on those rows at each θ."""
        full = self.outcomes.matrix.flops[rows, 0].sum().item()
        return tuple((1 - self.flops[:, rows].sum(1) / full).tolist())

    def by_kind(self, rows: Sequence[int]) -> dict[str, list[int]]:
        """Those rows, by kind of prompt."""
        return grouped(rows, lambda row: self.outcomes.matrix.kinds[row])

    def by_class(self, rows: Sequence[int]) -> dict[str, list[int]]:
        """Those of the rows that are answered in text, by the class that their items name, where it has enough.

        A class that the router has programs for counts however small it is. The harder ones of those that are too
        small count together: see `harder_kinds`.
        """
        matrix, training = self.outcomes.matrix, self.router.facts.training
        texts = [row for row in rows if matrix.kinds[row] != "choice"]
        harder, own = training.get("harder", ()), training.get("kinds", {})
        classes = by_class(texts, matrix.classes)
        classes[HARDER] = [row for row in texts if matrix.classes[row] in harder]
        return {name: of_class for name, of_class in classes.items() if len(of_class) >= MIN_CLASS or name in own}

    def _count(self, rows: Sequence[int]) -> Counts:
        values = {loss: self.lost[loss][:, rows] for loss in _countable(self.outcomes, rows)}
        gained = (values["drops"] == -1).sum(1).tolist() if "drops" in values else ()
        return Counts(
            n=len(rows),
            lost={loss: tuple((change == 1).sum(1).tolist()) for loss, change in values.items()},
            gained=tuple(gained),
        )


def count_facts(router: LearnedRouter, outputs: Tensor, outcomes: Outcomes, most: float) -> Counts:
    """Of questions whose right answers are known, how many are lost and gained at each θ, by these alone.

    What a program does to the other words of such an answer does not count here: one wrong number among them is small,
    and all that was asked for.

    Args:
        router: Bound to the model that the outcomes are measured on.
        outputs: Of its network for the questions, (P, O).
        outcomes: Of the questions, P rows. Programs are measured when the dial reaches them.
        most: Share that the loosest tier may lose. Beyond the θ where more are lost nothing is measured, and all count
            as lost, so that no tier goes there.
    """
    rows, lengths = range(len(outcomes)), [len(tokens) for tokens in outcomes.matrix.tokens]
    lost, gained = list[int](), list[int]()
    for theta in (dial := router.facts.dial):
        programs = router.choose_all(outputs, theta, lengths) if theta else [router.programs[0]] * len(rows)
        drops = outcomes.losses(rows, programs, "drops")
        lost.append(drops.count(1))
        gained.append(drops.count(-1))
        if lost[-1] - gained[-1] > ceil(most * len(rows)):
            break
    unmeasured = len(dial) - len(lost)
    lost += [len(rows)] * unmeasured
    gained += [0] * unmeasured
    net = tuple(max(0, worse - better) for worse, better in zip(lost, gained, strict=True))
    return Counts(n=len(rows), lost={"differs": net, "harms": tuple(lost), "drops": tuple(lost)}, gained=tuple(gained))


def _countable(outcomes: Outcomes, rows: Sequence[int]) -> tuple[Loss, ...]:
    """The losses that can be counted on these rows."""
    known = bool(outcomes.matrix.labelled[list(rows)].all())
    written = all(outcomes.matrix.kinds[row] != "choice" for row in rows)
    needs: dict[Loss, bool] = {"differs": True, "harms": known, "drops": known, "strict": written}
    return tuple(loss for loss in LOSSES if needs[loss])


def _check(outcomes: Outcomes, tiers: Mapping[str, TierPromise], delta: float) -> None:
    """Check, before anything is measured, that the losses can be counted and that the prompts are enough."""
    for _, _, strict in tiers.values():
        if strict is not None and all(kind == "choice" for kind in outcomes.matrix.kinds):
            raise DataError("a strict promise about texts needs calibration prompts that are answered in text.")
    check_answered(tiers, outcomes.matrix.labelled.tolist())
    by_kind = grouped(range(len(outcomes)), lambda row: outcomes.matrix.kinds[row])
    empty = {
        kind: Counts(n=len(rows), lost=dict.fromkeys(_countable(outcomes, rows), ())) for kind, rows in by_kind.items()
    }
    for promised in tiers.values():
        check_sizes(empty, promised, delta)


def check_answered(tiers: Mapping[str, TierPromise], answered: Collection[bool]) -> None:
    """Check that right answers can be counted where a tier counts them.

    Args:
        tiers: What each tier is to promise.
        answered: For each calibration prompt, whether its right answer is known.

    Raises:
        DataError: They cannot.
    """
    countable = {"harms": all(answered), "drops": any(answered)}
    for _, loss, _ in tiers.values():
        if not countable.get(loss, True):
            needed = "an answer for every calibration prompt" if loss == "harms" else "calibration prompts with answers"
            raise DataError(
                f"a tier that counts wrong answers (loss {loss!r}) needs {needed}; {sum(answered)} of {len(answered)} "
                "have one."
            )


class Resplits(NamedTuple):
    """How often one tier's promise broke for one kind of prompt."""

    tier: str
    kind: str
    """A kind of prompt, or `any`: the promise broke for at least one of them."""
    times: int
    other_half: int
    """Times that more than α was lost on the half that was not calibrated on."""
    pooled: int
    """Times that more than α was lost on both halves together, the best available estimate of the truth."""

    @property
    def text(self) -> str:
        """The counts in words."""
        return (
            f"{self.tier}, {self.kind}: of {self.times} promises made on a random half, {self.other_half} broke on the "
            f"other half and {self.pooled} on both together"
        )


def resplit(walk: DialWalk, tiers: Mapping[str, TierPromise], delta: float, times: int = 100) -> list[Resplits]:
    """Split a walk's prompts at random, calibrate, and count broken promises by tier and kind of prompt.

    Raises:
        CalibrationSizeError: Half of the prompts is too few for a tier's α.
    """
    kinds = walk.by_kind(range(len(walk.outcomes)))
    broken = {(tier, kind): [0, 0] for tier in tiers for kind in (*kinds, "any")}
    for seed in range(times):
        dice = random.Random(seed)
        here = {row for rows in kinds.values() for row in dice.sample(rows, len(rows) // 2)}
        certificate = walk.certificate(sorted(here), tiers, delta)
        for tier in tiers:
            breaks = {kind: _breaks(walk, certificate, tier, rows, here) for kind, rows in kinds.items()}
            breaks["any"] = (any(other for other, _ in breaks.values()), any(pooled for _, pooled in breaks.values()))
            for kind, (other, pooled) in breaks.items():
                broken[tier, kind][0] += other
                broken[tier, kind][1] += pooled
    return [Resplits(tier, kind, times, *counts) for (tier, kind), counts in broken.items()]


def _breaks(
    walk: DialWalk, certificate: Certificate, tier: str, rows: Sequence[int], here: set[int]
) -> tuple[bool, bool]:
    """Whether more than α is lost on the other half, and on both; of one of two promises is enough."""
    promise = certificate.tiers[tier]
    setting = certificate.thetas.index(promise.setting.of(form_of(walk.outcomes.matrix.kinds[rows[0]])))
    countable = _countable(walk.outcomes, rows)
    loss: Loss = "differs" if promise.loss == "drops" and "drops" not in countable else promise.loss
    demands: list[tuple[Loss, float]] = [(loss, promise.alpha)]
    demands += [("strict", promise.strict.alpha)] if promise.strict is not None and "strict" in countable else []
    other = [row for row in rows if row not in here]
    broken = [
        (fmean(lost[other].tolist()) > alpha, fmean(lost[list(rows)].tolist()) > alpha)
        for lost, alpha in ((walk.lost[counted][setting], alpha) for counted, alpha in demands)
    ]
    return any(of_other for of_other, _ in broken), any(of_both for _, of_both in broken)
