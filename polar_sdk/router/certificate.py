"""The certificate: what a router's calibration counted, for exactly what, and which promises follow.

A router has one dial, its looseness θ: 0 always runs identity, more allows cheaper programs. Calibration counts the
lost prompts at each θ of a fixed sequence chosen beforehand. *Learn-then-Test* walks the sequence from identity upward:
θ is accepted while an exact test rejects "more than α of such prompts are lost" at level δ, and the walk stops at the
first θ where it does not, so that the promise at the last accepted θ holds with probability 1 − δ.

Answers in text and choices among given texts are walked apart: a tier has a θ for each form of answer, and its promise
holds for prompts of each with that probability. A form with too few prompts for a promise runs identity, which keeps
every promise. Of texts there may be two kinds, those whose right answer is known and others; there a θ is accepted
where the tests of both reject. That needs no correction, since the promise is broken only if one of them is wrong. For
texts a tier may promise two things at once, at most α lost and at most another share changed by more than a few tokens
(`strict`); then both tests must reject, too.

Texts are of classes (notes, code, …), each too small for a test of its own. There a θ is refused where the
calibration prompts of a class lose more than the promise allows, rounded up to a whole prompt: a promise that holds on
average must not be carried by the easy classes. Classes of a few prompts are one class, the harder ones of them (see
`lab.training.examples.harder_kinds`). Knows counts and hashes, no prompts.
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
    from collections.abc import Iterator, Mapping

    from polar_sdk.promises.audit import AuditedLoss

AnswerForm = Literal["text", "choice"]
"""Whether a request's answer is written freely, or is one of the texts that the request names."""
FORMS: Final[dict[AnswerForm, str]] = {"text": "answers in text", "choice": "choices"}
"""The forms, in words."""
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

    def fewest(self, alpha: float, delta: float, loss: Loss) -> int:
        """Minimum number of such prompts, below which not even identity could be certified."""
        return (least_paired_prompts if self._counted(loss) == "drops" else least_prompts)(alpha, delta)

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
    """At the same setting, at most α of texts lose more than 5 % of the tokens that identity would choose."""

    alpha: Share
    n: dict[str, int]
    """Number of calibration texts of each kind."""
    k: dict[str, int]
    """Number of them that lost more."""


class WorstClass(_Frozen):
    """The class of calibration texts that loses the largest share at a setting of the dial."""

    name: str
    n: int
    k: int
    """Number of its prompts that were lost, less those gained."""


class Setting(_Frozen):
    """Where a router's dial is set, θ, for each form of answer; 0 = always identity."""

    text: float = Field(default=0.0, ge=0)
    choice: float = Field(default=0.0, ge=0)

    @classmethod
    def to(cls, theta: float) -> Self:
        """The same θ for both."""
        return cls(text=theta, choice=theta)

    def of(self, form: AnswerForm) -> float:
        """θ of answers in this form."""
        return self.text if form == "text" else self.choice

    @property
    def runs_identity(self) -> bool:
        """Whether all requests run identity."""
        return not (self.text or self.choice)


class Promise(_Frozen):
    """With probability 1 − δ at most α of prompts like the calibration set's are lost at this setting of the dial.

    For answers in text and for choices apart.
    """

    alpha: Share
    delta: Share
    loss: Loss
    n: dict[str, int]
    """Number of calibration prompts of each kind."""
    k: dict[str, int]
    """Number of them that were lost at this setting."""
    gained: dict[str, int]
    """Number of them that were gained, where the loss is `drops`."""
    setting: Setting
    """The accepted θ that saves most, for each form of answer."""
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
            if self.setting.of(form_of(kind))
        )
        identity = " and ".join(kind for kind in self.n if not self.setting.of(form_of(kind)))
        counted = "; ".join(filter(None, (counted, identity and f"{identity}: always identity")))
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
    saved: dict[AnswerForm, tuple[float, ...]]
    """Share of identity's FLOPs saved at each θ, after those of the router, by form of answer."""
    tiers: dict[str, Promise] = Field(default_factory=dict)
    classes: dict[str, Counts] = Field(default_factory=dict)
    """Counts in each class of prompts that has enough of them."""
    usual: dict[str, Usual] = Field(default_factory=dict)
    """By kind, where its prompts fell among what the router knows; none where nobody looked."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.thetas[0] != 0 or list(self.thetas) != sorted(set(self.thetas)):
            raise ValueError("thetas must ascend strictly from 0")
        if {*self.saved} != {form_of(kind) for kind in self.kinds}:
            raise ValueError("saved needs the forms of answers of the kinds")
        for form, shares in self.saved.items():
            if len(shares) != len(self.thetas):
                raise ValueError(f"saved[{form!r}] needs one share per theta")
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
        terms = {
            tier: tuple(self._terms(tier, promise))
            for tier, promise in self.tiers.items()
            if not promise.setting.runs_identity
        }
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
        """The promise at the setting that saves most among those that the counts allow.

        Args:
            alpha: Maximum share of prompts lost.
            loss: What counts as lost.
            strict: Maximum share of texts that lose more than 5 % of their tokens; None promises nothing about that.

        Raises:
            CalibrationSizeError: The prompts of every form of answer are too few to certify even identity.
            CertificateError: A loss was not counted.
        """
        texts = {kind: counts for kind, counts in self.kinds.items() if "strict" in counts.lost}
        if strict is not None and not texts:
            raise CertificateError("loss 'strict' was not counted; calibrate on prompts that are answered in text.")
        asked = TierPromise(alpha, loss, strict)
        check_sizes(self.kinds, asked, self.delta)
        accepted = {form: self._accepted(form, asked) for form in self.saved}
        pairs = {kind: counts.pair(accepted[form_of(kind)], loss) for kind, counts in self.kinds.items()}
        return Promise(
            alpha=alpha,
            delta=self.delta,
            loss=loss,
            n={kind: counts.n for kind, counts in self.kinds.items()},
            k={kind: lost for kind, (lost, _) in pairs.items()},
            gained={kind: gained for kind, (_, gained) in pairs.items()},
            setting=Setting(**{form: self.thetas[index] for form, index in accepted.items()}),
            strict=None if strict is None else _strict(texts, accepted["text"], strict),
            worst=self._worst(accepted["text"], loss) if "text" in accepted else None,
        )

    def _accepted(self, form: AnswerForm, asked: TierPromise) -> int:
        """Index of the θ that saves most among those that the walk of answers in this form accepts."""
        own = [counts for kind, counts in self.kinds.items() if form_of(kind) == form]
        demands = [(counts, *demand) for counts in own for demand in _demands(counts, asked)]
        classes = self.classes.values() if form == "text" else ()
        of_classes = [
            (counts, share, loss)
            for counts in classes
            for share, loss in _demands(counts, asked)
            if counts.counts(loss)
        ]
        accepted = 0
        for index in range(len(self.thetas)):
            if any(counts.p_value(index, share, self.delta, loss) > self.delta for counts, share, loss in demands):
                break
            if not all(counts.within(index, share, loss) for counts, share, loss in of_classes):
                break
            # All accepted θ hold together, so any of them may be taken, but none that saves less than identity does.
            accepted = index if self.saved[form][index] > self.saved[form][accepted] else accepted
        return accepted

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
        of_forms = ([counts.n for kind, counts in self.kinds.items() if form_of(kind) == form] for form in self.saved)
        fewest = max(map(min, of_forms))
        least = smallest_alpha(fewest, self.delta)
        if tolerance < least:
            raise ToleranceError(
                f"tolerance {tolerance:g} is below {least:.4f}, the smallest that {fewest} calibration prompts can "
                f"certify at δ = {self.delta:g}.",
                hint="Use a larger tolerance or compute='exact', or run `polar lab calibrate` with more prompts.",
            )
        return self.promise(tolerance)

    def saves(self, tier: str) -> float:
        """Share of identity's FLOPs that a tier saved on the calibration prompts, texts or else choices."""
        form: AnswerForm = "text" if "text" in self.saved else "choice"
        return self.saved[form][self.thetas.index(self.tiers[tier].setting.of(form))]

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


def form_of(kind: str) -> AnswerForm:
    """The form of the answers to a kind of calibration prompts."""
    return "choice" if kind == "choice" else "text"


def check_sizes(kinds: Mapping[str, Counts], asked: TierPromise, delta: float) -> None:
    """Raise where a promise would be about no form of answer, as not even identity could be certified.

    Args:
        kinds: The counts of each kind; their numbers of prompts are looked at, and which losses they count.
        asked: The promise.
        delta: Maximum probability that it is wrong.

    Raises:
        CalibrationSizeError: Of each form of answer, some kind has too few prompts.
    """
    short: dict[AnswerForm, str] = {}
    for kind, counts in kinds.items():
        for share, loss in _demands(counts, asked):
            if counts.n < (needed := counts.fewest(share, delta, loss)):
                short[form_of(kind)] = (
                    f"α = {share * 100:g} % needs at least {needed} calibration prompts at δ = {delta:g}; there are "
                    f"{counts.n} of kind {kind!r}."
                )
    if len(short) == len({*map(form_of, kinds)}):
        raise CalibrationSizeError(
            " ".join(short.values()), hint="Pass more prompts of that kind or none of it, or choose a larger α."
        )


def _demands(counts: Counts, asked: TierPromise) -> list[tuple[float, Loss]]:
    """The shares of such prompts that may be lost, and the way that losses are counted for each."""
    demands: list[tuple[float, Loss]] = [(asked.alpha, asked.loss)]
    if asked.strict is not None and "strict" in counts.lost:
        demands.append((asked.strict, "strict"))
    return demands


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
