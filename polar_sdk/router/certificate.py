"""The certificate: what a router's calibration counted, for exactly what, and which promises follow.

A router has one dial, its looseness θ: 0 always runs identity, more allows cheaper programs. Calibration counts the
lost prompts at each θ of a fixed sequence chosen beforehand. *Learn-then-Test* walks the sequence from identity upward:
θ is accepted while an exact test rejects "more than α of such prompts are lost" at level δ, and the walk stops at the
first θ where it does not, so that the promise at the last accepted θ holds with probability 1 − δ. A promise holds for
each kind of prompt (choices, texts) separately: a θ is accepted where the tests of all kinds reject. That needs no
correction, since the promise is broken only if one of them is wrong. For texts a tier may promise two things at once,
at most α lost and at most another share changed by more than a few tokens (`strict`); then both tests must reject.

Kinds are made of classes (notes, code, …), each too small for a test of its own. There a θ is refused where the
calibration prompts of a class lose more than the promise allows, rounded up to a whole prompt: a promise that holds on
average must not be carried by the easy classes. Knows counts and hashes, no prompts.
"""

from __future__ import annotations

import hashlib
import json
from math import ceil
from typing import TYPE_CHECKING, Annotated, Final, Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_sdk.errors import CalibrationSizeError, CertificateError, ToleranceError
from polar_sdk.promises.audit import PromiseTerms
from polar_sdk.promises.novelty import Usual
from polar_sdk.router.exact_tests import (
    binomial_cdf,
    least_paired_prompts,
    least_prompts,
    paired_loss_p,
    smallest_alpha,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.promises.audit import AuditedLoss

Loss = Literal["differs", "harms", "drops", "strict"]
"""The ways to count a prompt as lost.

`differs`: the answer differs from identity's: another choice, or in text fewer than three quarters of the tokens that
identity would choose (`promises.losses.SAME_ANSWER`). `harms`: identity is right and the program is wrong. `drops`:
the same, minus the prompts where it is the other way round, so that α bounds the drop in accuracy; where the right
answer is not known, an answer that differs is lost. `strict`: another choice, or in text fewer than 95 % of the tokens
(`promises.losses.STRICT_ANSWER`).
"""
LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)


class TierPromise(NamedTuple):
    """A tier's promise as asked for."""

    alpha: float
    """Maximum share of prompts lost."""
    loss: Loss = "differs"
    """The way that losses are counted."""
    strict: float | None = None
    """Maximum share of texts that lose more than 5 % of their tokens; None promises nothing about that."""

    def fewest(self, kind: str, delta: float) -> int:
        """Minimum number of calibration prompts of a kind."""
        paired = self.loss == "drops" and kind != "prompt"
        return (least_paired_prompts if paired else least_prompts)(self.alpha, delta)


class Counts(BaseModel):
    """Prompts of one kind, lost and gained at each θ of a dial."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(ge=1)
    """Number of calibration prompts."""
    lost: dict[Loss, tuple[int, ...]]
    """Number of prompts lost at each θ; `harms` and `drops` only where right answers are known, `strict` for texts."""
    gained: tuple[int, ...] = ()
    """Number of prompts gained at each θ, for the loss `drops`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        counted = {f"lost[{loss}]": counts for loss, counts in self.lost.items()}
        counted |= {"gained": self.gained} if "drops" in self.lost else {}
        for name, counts in counted.items():
            if len(counts) != len(self.lost["differs"]) or not all(0 <= k <= self.n for k in counts):
                raise ValueError(f"{name} needs one count of 0 to {self.n} per theta")
        return self

    def pair(self, index: int, loss: Loss) -> tuple[int, int]:
        """Number of prompts lost and gained at the θ of this index."""
        counted = self._counted(loss)
        return self.lost[counted][index], self.gained[index] if counted == "drops" else 0

    def p_value(self, index: int, alpha: float, delta: float, loss: Loss) -> float:
        """p-value of "more than α is lost at the θ of this index"."""
        lost, gained = self.pair(index, loss)
        if self._counted(loss) == "drops":
            return paired_loss_p(lost, gained, self.n, alpha, delta)
        return binomial_cdf(lost, self.n, alpha)

    def check_size(self, kind: str, alpha: float, delta: float, loss: Loss) -> None:
        """Raise where not even identity could be certified.

        Raises:
            CalibrationSizeError: There are too few prompts of this kind.
        """
        paired = self._counted(loss) == "drops"
        needed = (least_paired_prompts if paired else least_prompts)(alpha, delta)
        if self.n < needed:
            raise CalibrationSizeError(
                f"α = {alpha * 100:g} % needs at least {needed} calibration prompts at δ = {delta:g}; there are "
                f"{self.n} of kind {kind!r}.",
                hint="Pass more prompts of that kind or none of it, or choose a larger α.",
            )

    def _counted(self, loss: Loss) -> Loss:
        """Counts for a loss: without right answers, an answer that differs counts as a drop."""
        counted: Loss = "differs" if loss == "drops" and "drops" not in self.lost else loss
        if counted not in self.lost:
            raise CertificateError(f"loss {loss!r} was not counted; calibrate on prompts with answers.")
        return counted

    def within(self, index: int, alpha: float, loss: Loss) -> bool:
        """Whether no more of these prompts are lost than α allows, rounded up to a whole prompt."""
        lost, gained = self.pair(index, loss)
        return lost - gained <= ceil(alpha * self.n - 1e-9)

    def counts(self, loss: Loss) -> bool:
        """Whether this loss was counted."""
        return loss in self.lost or (loss == "drops" and "differs" in self.lost)


Share = Annotated[float, Field(gt=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Subject(_Frozen):
    """The subject of a certificate; a promise is void if one of these differs from what would run."""

    model: str
    """Fingerprint of the base model."""
    menu: str
    """Hash of the programs that the router may choose."""
    router: str
    """Hash of the router's weights."""
    bridges: str
    """Hash of the bridges that those programs use; empty if they use none."""
    dtype: str
    """Precision of the base model's weights."""
    engine: str
    """Version of the engine's arithmetic."""

    def difference(self, other: Subject) -> str | None:
        """Name and values of the first field that differs; None where all are equal."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} {ours[:12] or 'none'!r}, but {theirs[:12] or 'none'!r} would run"
        return None


class StrictPromise(_Frozen):
    """At the same θ, at most α of texts lose more than 5 % of the tokens that identity would choose."""

    alpha: Share
    n: dict[str, int]
    """Number of calibration texts of each kind."""
    k: dict[str, int]
    """Number of them that lost more."""


class WorstClass(_Frozen):
    """The class of calibration prompts that loses the largest share at θ."""

    name: str
    n: int
    k: int
    """Number of its prompts that were lost, less those gained."""


class Promise(_Frozen):
    """With probability 1 − δ at most α of prompts like the calibration set's are lost at this θ."""

    alpha: Share
    delta: Share
    loss: Loss
    n: dict[str, int]
    """Number of calibration prompts of each kind."""
    k: dict[str, int]
    """Number of them that were lost at θ."""
    gained: dict[str, int]
    """Number of them that were gained, where the loss is `drops`."""
    theta: float = Field(ge=0)
    """The accepted θ that saves most; 0 = always identity."""
    strict: StrictPromise | None = None
    """The promise about texts beside it."""
    worst: WorstClass | None = None
    """None if no classes were counted."""

    @property
    def asked(self) -> TierPromise:
        """The promise as asked for."""
        return TierPromise(self.alpha, self.loss, None if self.strict is None else self.strict.alpha)

    @property
    def text(self) -> str:
        """The promise as a sentence."""
        alpha = f"{self.alpha:.2g}"
        promised = {
            "differs": f"at most {alpha} of such prompts answer differently from identity",
            "harms": f"at most {alpha} of such prompts turn a right answer into a wrong one",
            "drops": f"the share of right answers, or of unchanged ones in text, drops by at most {alpha}",
            "strict": f"at most {alpha} of such prompts change their choice, or in text more than 5 % of their tokens",
        }[self.loss]
        counted = "; ".join(
            f"{kind}: {self.k[kind]} of {n} lost" + (f", {self.gained[kind]} gained" if self.gained[kind] else "")
            for kind, n in self.n.items()
        )
        if self.worst is not None:
            counted += f"; worst class {self.worst.name}: {self.worst.k} of {self.worst.n}"
        text = f"with probability {1 - self.delta:.0%} {promised} (in calibration, {counted})"
        if self.strict is None:
            return text
        lost = "; ".join(f"{kind}: {self.strict.k[kind]} of {n}" for kind, n in self.strict.n.items())
        return f"{text}, and at most {self.strict.alpha:.2g} of texts change more than 5 % of their tokens ({lost})"


class Certificate(_Frozen):
    """The counts of one calibration, and the promises of the tiers."""

    subject: Subject
    data: str
    """Hash of the calibration prompts."""
    delta: Share
    thetas: tuple[float, ...] = Field(min_length=1)
    """The fixed sequence, ascending from 0."""
    kinds: dict[str, Counts] = Field(min_length=1)
    """Counts at each θ, by kind of prompt: `choice`, `prompt`, `answer`."""
    saved: tuple[float, ...]
    """Share of identity's FLOPs saved at each θ, after those of the router."""
    tiers: dict[str, Promise] = Field(default_factory=dict)
    classes: dict[str, Counts] = Field(default_factory=dict)
    """Counts in each class of prompts that has enough of them."""
    usual: dict[str, Usual] = Field(default_factory=dict)
    """By kind, where its prompts fell among what the router knows; none where nobody looked."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.thetas[0] != 0 or list(self.thetas) != sorted(set(self.thetas)):
            raise ValueError("thetas must ascend strictly from 0")
        if len(self.saved) != len(self.thetas):
            raise ValueError("saved needs one share per theta")
        for kind, counts in [*self.kinds.items(), *self.classes.items()]:
            if len(counts.lost["differs"]) != len(self.thetas):
                raise ValueError(f"kind {kind} needs one count per theta")
        for name, promise in self.tiers.items():
            if promise != self.promise(*promise.asked):
                raise ValueError(f"the promise of tier {name} does not follow from the counts")
        return self

    @property
    def audited(self) -> dict[str, tuple[PromiseTerms, ...]]:
        """The promises that audits of a tier's answers test, by tier.

        Nothing where identity always runs, and nothing of a promise on right answers, which no audit knows.
        """
        terms = {tier: tuple(self._terms(tier, promise)) for tier, promise in self.tiers.items() if promise.theta > 0}
        return {tier: promises for tier, promises in terms.items() if promises}

    def _terms(self, tier: str, promise: Promise) -> Iterator[PromiseTerms]:
        demands: list[tuple[AuditedLoss, float, bool]] = []
        if promise.loss != "harms":  # without right answers, an answer in text that differs counts as a drop
            loss: AuditedLoss = "strict" if promise.loss == "strict" else "differs"
            demands.append((loss, promise.alpha, promise.loss != "drops" and "choice" in self.kinds))
        if promise.strict is not None:
            demands.append(("strict", promise.strict.alpha, False))
        facts = {"subject": self.subject.model_dump(), "data": self.data, "tier": tier, "promise": promise.model_dump()}
        for loss, alpha, choices in demands:
            text = json.dumps({**facts, "loss": loss, "alpha": alpha}, sort_keys=True)
            yield PromiseTerms(hashlib.sha256(text.encode()).hexdigest(), tier, loss, alpha, promise.delta, choices)

    def promise(self, alpha: float, loss: Loss = "differs", strict: float | None = None) -> Promise:
        """The promise at the θ that saves most among those that the counts allow.

        Args:
            alpha: Maximum share of prompts lost.
            loss: What counts as lost.
            strict: Maximum share of texts that lose more than 5 % of their tokens; None promises nothing about that.

        Raises:
            CalibrationSizeError: Not even identity could be certified with so few prompts.
            CertificateError: A loss was not counted.
        """
        texts = {kind: counts for kind, counts in self.kinds.items() if "strict" in counts.lost}
        if strict is not None and not texts:
            raise CertificateError("loss 'strict' was not counted; calibrate on prompts that are answered in text.")
        demands: list[tuple[dict[str, Counts], float, Loss]] = [(self.kinds, alpha, loss)]
        demands += [] if strict is None else [(texts, strict, "strict")]
        for kinds, share, counted in demands:
            for kind, counts in kinds.items():
                counts.check_size(kind, share, self.delta, counted)
        accepted = 0
        for index in range(len(self.thetas)):
            if not all(self._holds(index, kinds, share, counted) for kinds, share, counted in demands):
                break
            # All accepted θ hold together, so any of them may be taken, but none that saves less than identity does.
            accepted = index if self.saved[index] > self.saved[accepted] else accepted
        pairs = {kind: counts.pair(accepted, loss) for kind, counts in self.kinds.items()}
        return Promise(
            alpha=alpha,
            delta=self.delta,
            loss=loss,
            n={kind: counts.n for kind, counts in self.kinds.items()},
            k={kind: lost for kind, (lost, _) in pairs.items()},
            gained={kind: gained for kind, (_, gained) in pairs.items()},
            theta=self.thetas[accepted],
            strict=None if strict is None else _strict(texts, accepted, strict),
            worst=self._worst(accepted, loss),
        )

    def _holds(self, index: int, kinds: dict[str, Counts], alpha: float, loss: Loss) -> bool:
        """Whether a θ may be accepted: the tests of all kinds reject, and no class loses more than α allows."""
        if any(counts.p_value(index, alpha, self.delta, loss) > self.delta for counts in kinds.values()):
            return False
        return all(counts.within(index, alpha, loss) for counts in self.classes.values() if counts.counts(loss))

    def _worst(self, index: int, loss: Loss) -> WorstClass | None:
        """The class that loses the largest share at the θ of this index."""
        lost = {name: counts.pair(index, loss) for name, counts in self.classes.items() if counts.counts(loss)}
        worst = [WorstClass(name=name, n=self.classes[name].n, k=max(0, k - won)) for name, (k, won) in lost.items()]
        return max(worst, key=lambda each: (each.k / each.n, each.name), default=None)

    def at_tolerance(self, tolerance: float) -> Promise:
        """The promise that at most that share of answers differs from identity's.

        Raises:
            ToleranceError: It is not between 0 and 1, or smaller than anything the calibration can promise.
        """
        if not 0 < tolerance < 1:
            raise ToleranceError(
                f"tolerance {tolerance:g} is out of range; use a share above 0 and below 1, or compute='exact'."
            )
        fewest = min(counts.n for counts in self.kinds.values())
        least = smallest_alpha(fewest, self.delta)
        if tolerance < least:
            raise ToleranceError(
                f"tolerance {tolerance:g} is below {least:.4f}, the smallest that {fewest} calibration prompts can "
                f"certify at δ = {self.delta:g}.",
                hint="Use a larger tolerance or compute='exact', or run `polar lab calibrate` with more prompts.",
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
                hint="Run `polar lab calibrate` for this setting, or use compute='exact'.",
            )


def tier_promise(certificate: Certificate, tier: str, promised: TierPromise) -> Certificate:
    """The certificate with one more tier, whose promise is as loose as its counts allow."""
    tiers = {**certificate.tiers, tier: certificate.promise(*promised)}
    return Certificate.model_validate({**certificate.model_dump(), "tiers": tiers})


def _strict(texts: dict[str, Counts], index: int, alpha: float) -> StrictPromise:
    return StrictPromise(
        alpha=alpha,
        n={kind: counts.n for kind, counts in texts.items()},
        k={kind: counts.lost["strict"][index] for kind, counts in texts.items()},
    )
