"""Calibration: count what a router loses along its dial on prompts it never saw, and certify tiers on the counts.

Pure but for the outcomes it is given. How a promise follows from the counts is `router/certificate.py`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polar_sdk.errors import DataError
from polar_sdk.router.certificate import Certificate, Loss, check_size, tier_promise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from polar_sdk.learning.outcomes import Outcomes
    from polar_sdk.router.learned import LearnedRouter

__all__ = ["TIER_ALPHAS", "TierPromise", "certify"]

TierPromise = tuple[float, Loss]
"""α and what counts as lost."""
TIER_ALPHAS: Final[dict[str, TierPromise]] = {
    "economy": (0.10, "differs"),
    "standard": (0.05, "differs"),
    "premium": (0.02, "differs"),
}
"""What the tiers promise unless told otherwise."""


def _silent(stage: str, done: int, total: int) -> None: ...


def certify(
    router: LearnedRouter,
    outputs: Tensor,
    outcomes: Outcomes,
    *,
    tiers: Mapping[str, TierPromise] = TIER_ALPHAS,
    delta: float = 0.1,
    on_progress: Callable[[str, int, int], None] = _silent,
) -> Certificate:
    """Certify tiers of a bound router.

    Args:
        router: Bound to the model that the outcomes were measured on.
        outputs: What its network says about the calibration prompts, (P, O).
        outcomes: Of the calibration prompts, P rows.
        tiers: α and loss of each tier.
        delta: Most probability that a promise is wrong.
        on_progress: Called with (stage, values of θ done, values in all).

    Raises:
        CalibrationSizeError: A tier's α needs more prompts.
        DataError: A tier counts wrong answers, and the prompts come without right ones.
    """
    _check(outcomes, tiers, delta)
    counts: dict[Loss, list[int]] = {loss: [] for loss in _countable(outcomes)}
    gained: list[int] = []
    saved: list[float] = []
    rows = range(len(outcomes))
    own = sum(router.route_flops(len(tokens)) for tokens in outcomes.matrix.tokens)
    full = outcomes.matrix.flops[:, 0].sum().item()
    dial = router.facts.dial
    for at, theta in enumerate(dial):
        on_progress("calibrating", at, len(dial))
        programs = [router.programs[0]] * len(rows) if theta == 0 else router.choose_all(outputs, theta)
        spent = sum(one.flops for one in outcomes.all(programs)) + (own if theta else 0)
        saved.append(1 - spent / full)
        losses = {loss: outcomes.losses(rows, programs, loss) for loss in counts}
        for loss, values in losses.items():
            counts[loss].append(values.count(1))
        gained.append(losses.get("drops", []).count(-1))
    on_progress("calibrating", len(dial), len(dial))
    certificate = Certificate(
        subject=router.subject,
        data=outcomes.matrix.data,
        delta=delta,
        n=len(rows),
        thetas=dial,
        saved=tuple(saved),
        lost={loss: tuple(values) for loss, values in counts.items()},
        gained=tuple(gained) if "drops" in counts else (),
    )
    for tier, (alpha, loss) in tiers.items():
        certificate = tier_promise(certificate, tier, alpha, loss)
    return certificate


def _countable(outcomes: Outcomes) -> tuple[Loss, ...]:
    """Losses that can be counted: some need right answers, of some prompts or of all."""
    labelled = outcomes.matrix.labelled
    return ("differs", *(("drops",) if labelled.any() else ()), *(("harms",) if labelled.all() else ()))


def _check(outcomes: Outcomes, tiers: Mapping[str, TierPromise], delta: float) -> None:
    """Before anything is measured."""
    countable = _countable(outcomes)
    for alpha, loss in tiers.values():
        if loss not in countable:
            needed = (
                "an answer with every calibration prompt" if loss == "harms" else "calibration prompts with answers"
            )
            raise DataError(f"a tier that counts wrong answers (loss {loss!r}) needs {needed}.")
        check_size(len(outcomes), alpha, delta, loss)
