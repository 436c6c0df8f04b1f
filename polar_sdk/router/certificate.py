"""The certificate: what was counted when a router was calibrated, for what exactly, and which promises follow.

A router has one dial, its looseness θ: 0 always runs identity, more lets cheaper programs through. Calibration counts
the lost prompts at each θ of a fixed sequence that was chosen before. *Learn-then-Test* walks it from identity upward:
θ is accepted while the exact binomial test rejects "more than α of such prompts are lost" at level δ, and the walk
stops at the first θ it does not reject, so that the promise at the last accepted θ holds with probability 1 − δ.
Knows counts and hashes; no prompts, no weights.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_sdk.errors import CalibrationSizeError, CertificateError, ToleranceError
from polar_sdk.statistics import (
    binomial_cdf,
    least_paired_prompts,
    least_prompts,
    paired_loss_p,
    smallest_alpha,
)

__all__ = ["LOSSES", "Certificate", "Loss", "Promise", "Subject", "check_size", "tier_promise"]

Loss = Literal["differs", "harms", "drops"]
"""What counts as lost.

`differs`: the answer differs from identity's: another choice, or in text fewer than three quarters of the tokens that
identity would choose (`polar_sdk.rewards.SAME_ANSWER`). `harms`: identity is right and the program is wrong. `drops`:
the same, less the prompts where it is the other way round, so that α bounds the drop of accuracy; where no right answer
is known, an answer that differs is lost.
"""
LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)
Share = Annotated[float, Field(gt=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Subject(_Frozen):
    """What a certificate holds for; a promise is void where one of these differs from what would run."""

    model: str
    """Fingerprint of the base model."""
    menu: str
    """Hash of the programs that the router may choose."""
    router: str
    """Hash of the router's weights."""
    bridges: str
    """Hash of the bridges that those programs cross; empty where they cross none."""
    dtype: str
    """How the base model's weights are held."""
    engine: str
    """Version of the engine's arithmetic."""

    def difference(self, other: Subject) -> str | None:
        """Name and values of the first field that differs, or None."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} {ours[:12] or 'none'!r}, but {theirs[:12] or 'none'!r} would run"
        return None


class Promise(_Frozen):
    """With probability 1 − δ at most α of prompts like the calibration set's are lost at this θ."""

    alpha: Share
    delta: Share
    loss: Loss
    n: int = Field(ge=1)
    """Calibration prompts."""
    k: int = Field(ge=0)
    """Those of them that were lost at θ."""
    gained: int = Field(default=0, ge=0)
    """Those that were gained, where the loss is `drops`."""
    theta: float = Field(ge=0)
    """Of the accepted θ the one that saves most; 0 = always identity."""

    @property
    def text(self) -> str:
        """The promise as a sentence."""
        sure = f"with probability {1 - self.delta:.0%}"
        if self.loss == "drops":
            return (
                f"{sure} the share of right answers drops by at most {self.alpha:.2g} on such prompts "
                f"(of {self.n} in calibration {self.k} were lost, {self.gained} gained)"
            )
        lost = "answer differently from identity" if self.loss == "differs" else "turn a right answer into a wrong one"
        return f"{sure} at most {self.alpha:.2g} of such prompts {lost} ({self.k} of {self.n} did in calibration)"


class Certificate(_Frozen):
    """The counts of one calibration, and the promises of the tiers."""

    subject: Subject
    data: str
    """Hash of the calibration prompts."""
    delta: Share
    n: int = Field(ge=1)
    thetas: tuple[float, ...] = Field(min_length=1)
    """The fixed sequence, ascending from 0."""
    lost: dict[Loss, tuple[int, ...]]
    """Lost prompts at each θ; `harms` and `drops` only where answers are known."""
    gained: tuple[int, ...] = ()
    """Prompts gained at each θ, for the loss `drops`."""
    saved: tuple[float, ...]
    """Share of identity's FLOPs saved at each θ, the router's own counted."""
    tiers: dict[str, Promise] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.thetas[0] != 0 or list(self.thetas) != sorted(set(self.thetas)):
            raise ValueError("thetas must ascend strictly from 0")
        if len(self.saved) != len(self.thetas):
            raise ValueError("saved needs one share per theta")
        counted = {f"lost[{loss}]": counts for loss, counts in self.lost.items()}
        counted |= {"gained": self.gained} if "drops" in self.lost else {}
        for name, counts in counted.items():
            if len(counts) != len(self.thetas) or not all(0 <= k <= self.n for k in counts):
                raise ValueError(f"{name} needs one count of 0 to {self.n} per theta")
        for name, promise in self.tiers.items():
            if promise != self.promise(promise.alpha, promise.loss):
                raise ValueError(f"the promise of tier {name} does not follow from the counts")
        return self

    def promise(self, alpha: float, loss: Loss = "differs") -> Promise:
        """Of all θ that the counts allow at α, the one that saves most.

        Raises:
            CalibrationSizeError: Not even identity could be certified with so few prompts.
            CertificateError: That loss was not counted.
        """
        if loss not in self.lost:
            raise CertificateError(f"loss {loss!r} was not counted; calibrate on a set with answers.")
        check_size(self.n, alpha, self.delta, loss)
        accepted = 0
        for at in range(len(self.thetas)):
            if self._p_value(at, alpha, loss) > self.delta:
                break
            # All accepted θ hold together, so any may be taken; one that saves less than nothing is not.
            accepted = at if self.saved[at] > self.saved[accepted] else accepted
        theta, k = self.thetas[accepted], self.lost[loss][accepted]
        gained = self.gained[accepted] if loss == "drops" else 0
        return Promise(alpha=alpha, delta=self.delta, loss=loss, n=self.n, k=k, gained=gained, theta=theta)

    def _p_value(self, at: int, alpha: float, loss: Loss) -> float:
        """Of "more than α is lost at that θ"."""
        k = self.lost[loss][at]
        if loss == "drops":
            return paired_loss_p(k, self.gained[at], self.n, alpha, self.delta)
        return binomial_cdf(k, self.n, alpha)

    def at_tolerance(self, tolerance: float) -> Promise:
        """The promise that at most that share of answers differs from identity's.

        Raises:
            ToleranceError: It is no share, or smaller than anything the calibration can promise.
        """
        if not 0 < tolerance < 1:
            raise ToleranceError(
                f"tolerance {tolerance:g} is out of range; it is a share between 0 and 1, such as 0.05; "
                "compute='exact' tolerates nothing."
            )
        least = smallest_alpha(self.n, self.delta)
        if tolerance < least:
            raise ToleranceError(
                f"tolerance {tolerance:g} is below {least:.4f}, the smallest that {self.n} calibration prompts can "
                f"certify at δ = {self.delta:g}.",
                hint="Ask for more, use compute='exact', or run `polar calibrate` with more prompts.",
            )
        return self.promise(tolerance)

    def check(self, running: Subject) -> None:
        """Raise where the promise does not hold for what would run.

        Raises:
            CertificateError: A hash, the dtype or the engine's version differs.
        """
        if (difference := self.subject.difference(running)) is not None:
            raise CertificateError(
                f"the router's certificate holds for {difference}.",
                hint="Run `polar calibrate` for this setting, or ask for compute='exact'.",
            )


def check_size(prompts: int, alpha: float, delta: float, loss: Loss) -> None:
    """Raise where not even identity could be certified.

    Raises:
        CalibrationSizeError: There are too few prompts.
    """
    needed = (least_paired_prompts if loss == "drops" else least_prompts)(alpha, delta)
    if prompts < needed:
        raise CalibrationSizeError(
            f"α = {alpha * 100:g} % needs at least {needed} calibration prompts at δ = {delta:g}; you gave {prompts}.",
            hint="Give more prompts, or a larger α.",
        )


def tier_promise(certificate: Certificate, tier: str, alpha: float, loss: Loss) -> Certificate:
    """The certificate with one more tier, promised as loosely as its counts allow."""
    tiers = {**certificate.tiers, tier: certificate.promise(alpha, loss)}
    return Certificate.model_validate({**certificate.model_dump(), "tiers": tiers})
