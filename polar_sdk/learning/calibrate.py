"""Calibration: count what a router loses along its dial on prompts it never saw, and certify tiers on the counts.

Pure but for the outcomes it is given. How a promise follows from the counts is `router/certificate.py`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polar_sdk.errors import DataError
from polar_sdk.router.certificate import Certificate, tier_promise
from polar_sdk.router.counts import LOSSES, Counts, Loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.learning.outcomes import Outcomes
    from polar_sdk.program import Program
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
    kinds = _by_kind(outcomes)
    _check(kinds, outcomes, tiers, delta)
    dial = router.facts.dial
    chosen: list[Sequence[Program]] = []
    saved: list[float] = []
    own = sum(router.route_flops(len(tokens)) for tokens in outcomes.matrix.tokens)
    full = outcomes.matrix.flops[:, 0].sum().item()
    for at, theta in enumerate(dial):
        on_progress("calibrating", at, len(dial))
        programs = [router.programs[0]] * len(outcomes) if theta == 0 else router.choose_all(outputs, theta)
        spent = sum(one.flops for one in outcomes.all(programs)) + (own if theta else 0)
        saved.append(1 - spent / full)
        chosen.append(programs)
    on_progress("calibrating", len(dial), len(dial))
    certificate = Certificate(
        subject=router.subject,
        data=outcomes.matrix.data,
        delta=delta,
        thetas=dial,
        saved=tuple(saved),
        kinds={kind: _count(outcomes, rows, chosen) for kind, rows in kinds.items()},
    )
    for tier, (alpha, loss) in tiers.items():
        certificate = tier_promise(certificate, tier, alpha, loss)
    return certificate


def _by_kind(outcomes: Outcomes) -> dict[str, list[int]]:
    """Rows of each kind of prompt."""
    found: dict[str, list[int]] = {}
    for row, kind in enumerate(outcomes.matrix.kinds):
        found.setdefault(kind, []).append(row)
    return found


def _count(outcomes: Outcomes, rows: Sequence[int], chosen: Sequence[Sequence[Program]]) -> Counts:
    """Counts of some rows, for the programs that were chosen for all rows at each θ."""
    values = {
        loss: [outcomes.losses(rows, [programs[row] for row in rows], loss) for programs in chosen]
        for loss in _countable(outcomes, rows)
    }
    return Counts(
        n=len(rows),
        lost={loss: tuple(one.count(1) for one in some) for loss, some in values.items()},
        gained=tuple(one.count(-1) for one in values.get("drops", ())),
    )


def _countable(outcomes: Outcomes, rows: Sequence[int]) -> tuple[Loss, ...]:
    """Losses that these rows can be counted by."""
    return LOSSES if bool(outcomes.matrix.labelled[list(rows)].all()) else ("differs",)


def _check(
    kinds: Mapping[str, Sequence[int]], outcomes: Outcomes, tiers: Mapping[str, TierPromise], delta: float
) -> None:
    """Before anything is measured: whether the losses can be counted, and on prompts enough."""
    labelled = outcomes.matrix.labelled
    countable = {"differs": True, "harms": bool(labelled.all()), "drops": bool(labelled.any())}
    for _, loss in tiers.values():
        if not countable[loss]:
            needed = (
                "an answer with every calibration prompt" if loss == "harms" else "calibration prompts with answers"
            )
            raise DataError(f"a tier that counts wrong answers (loss {loss!r}) needs {needed}.")
    for kind, rows in kinds.items():
        empty = Counts(n=len(rows), lost=dict.fromkeys(_countable(outcomes, rows), ()))
        for alpha, loss in tiers.values():
            empty.check_size(kind, alpha, delta, loss)
