"""Findings of an evaluation, as data and in words: whether routing per prompt gains anything, and what to run if not.

Shares are fractions of 1; an interval is a value with the ends of its 95 % confidence interval. Saves as JSON; measures
and draws nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, Field

from polar_sdk.lab.evaluation.text_answers import TierTexts
from polar_sdk.router.certificate import Certificate
from polar_sdk.router.exact_tests import Interval

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


SHUFFLED: Final = "shuffled router"
STATIC: Final = "best static program"
RANDOM: Final = "random program"
_ACCURACY_BOUND: Final = 0.02
"""The accuracy drop that the verdict speaks about."""
_NEARLY_ALL: Final = 0.9
"""Share of the prompts on one program from which a router is called static."""


class Saved(BaseModel, frozen=True):
    """Share of identity's FLOPs saved; router, head and bridges are counted on the system's side."""

    prefill: float
    """Share of the layers over the prompts, the router included."""
    decode: float
    """Share of everything after the prompts: answers or choices, and the head."""
    total: float


class SystemResult(BaseModel, frozen=True):
    """One system on one set."""

    name: str
    role: Literal["identity", "router", "control", "oracle"]
    deployable: bool = True
    """False for a system that must know the outcome before it runs."""
    note: str = ""
    accuracy: Interval | None = None
    """With Wilson's interval; None if no prompt has an answer."""
    accuracy_drop: Interval | None = None
    """Identity's accuracy − this system's, paired."""
    mcnemar_vs_identity_p: float | None = None
    agreement: Interval
    """Share of prompts with the same answer as identity, with Wilson's interval."""
    answer_share: float
    """Mean share of identity's answer that is kept: of its tokens, for prompts that are answered in text."""
    non_identity_rate: float
    programs: dict[str, float]
    """Share of the prompts that run each program, the most used one first."""
    flops_saved: Saved
    ms_per_token: float | None = None
    """Wall-clock at batch 1 per token of short answers, prompt included. Unit: milliseconds; None = not timed."""
    router_ms: float | None = None
    """Time of the router per request, included above. Unit: milliseconds."""


class Comparison(BaseModel, frozen=True):
    """The router against one control of equal cost, paired, exact McNemar."""

    control: str
    accuracy_p: float | None
    """None if no prompt has an answer."""
    accuracy_gain: float | None
    agreement_p: float
    agreement_gain: float
    share_gain: float = 0.0
    """Gain in the mean share of identity's answers that is kept: of their tokens, in text."""

    @property
    def beaten(self) -> bool:
        """Whether the router is better in accuracy or agreement at p < 0.01."""
        accuracy = self.accuracy_p is not None and (self.accuracy_gain or 0) > 0 and self.accuracy_p < 0.01
        return accuracy or (self.agreement_gain > 0 and self.agreement_p < 0.01)


class ClassResult(BaseModel, frozen=True):
    """The router within one class of prompts, at one of its points, against controls of equal cost."""

    name: str
    """A set, or `set/task` where its rows name tasks."""
    point: str
    prompts: int
    flops_saved: float
    non_identity_rate: float
    agreement: float
    accuracy_drop: Interval | None
    program: str
    """The most used one."""
    program_share: float
    """Share of the prompts that run it."""
    shuffled: Comparison
    static: Comparison
    static_program: str
    """The best static program of equal cost, in words."""

    @property
    def outcome(self) -> Literal["identity", "static", "routed"]:
        """The best server of this class: full depth, a program without a router, or a choice per prompt that earns it.

        `routed` only where the router beats both the shuffled router and the static program at p < 0.01.
        """
        if self.non_identity_rate == 0:
            return "identity"
        return "routed" if self.shuffled.beaten and self.static.beaten else "static"


class FrontierPoint(BaseModel, frozen=True):
    """The router with its dial at one θ."""

    theta: float
    flops_saved: float
    agreement: float
    accuracy: float | None


class SetResult(BaseModel, frozen=True):
    """All systems on one set of prompts."""

    name: str
    prompts: int
    labelled: int
    data: str
    """Hash of the prompts."""
    systems: tuple[SystemResult, ...]
    comparisons: tuple[Comparison, ...]
    frontier: tuple[FrontierPoint, ...]

    @property
    def main(self) -> SystemResult:
        """The router at the point that is compared with the controls."""
        return next(system for system in self.systems if system.role == "router")


class Evaluation(BaseModel, frozen=True):
    """A whole evaluation; the first set holds all prompts together."""

    model: str
    fingerprint: str
    dtype: str
    device: str
    router: str
    """Kind and version."""
    point: str
    """Tier, tolerance or θ that is compared with the controls."""
    sets: tuple[SetResult, ...]
    classes: tuple[ClassResult, ...] = ()
    """Every class at every point."""
    texts: dict[str, TierTexts] = Field(default_factory=dict)
    """All prompts answered in text, by tier, `exact` among them; empty if there are none."""
    verdict: tuple[str, ...]
    certificate: Certificate | None
    certificate_holds: bool
    training: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """Everything as JSON-like data, with the most important figures under plain keys."""
        whole = self.sets[0]
        main, drop = whole.main, whole.main.accuracy_drop
        against = {comparison.control: comparison for comparison in whole.comparisons}

        def p_value(control: str) -> float | None:
            comparison = against.get(control)
            if comparison is None:
                return None
            return comparison.agreement_p if comparison.accuracy_p is None else comparison.accuracy_p

        return {
            "flops_saved": main.flops_saved.total,
            "accuracy_drop": None if drop is None else drop.value,
            "accuracy_drop_ci95": None if drop is None else [drop.low, drop.high],
            "non_identity_rate": main.non_identity_rate,
            "mcnemar_vs_shuffled_p": p_value(SHUFFLED),
            "mcnemar_vs_static_p": p_value(STATIC),
            "mcnemar_vs_shuffled_agreement_p": getattr(against.get(SHUFFLED), "agreement_p", None),
            "mcnemar_vs_static_agreement_p": getattr(against.get(STATIC), "agreement_p", None),
            **self.model_dump(mode="json"),
            "classes": [{**result.model_dump(mode="json"), "outcome": result.outcome} for result in self.classes],
        }


def verdict(sets: Sequence[SetResult], classes: Sequence[ClassResult] = ()) -> list[str]:
    """Sentences about all prompts at the first point, and about the classes at each point."""
    return [*_whole(sets[0]), *_classes(classes)]


def _whole(result: SetResult) -> Iterator[str]:
    main = result.main
    yield f"The router saves {main.flops_saved.total:.1%} of the FLOPs; it leaves identity for " + (
        f"{main.non_identity_rate:.0%} of the prompts and agrees with it on {main.agreement.value:.1%}."
    )
    if main.accuracy_drop is not None:
        drop = main.accuracy_drop
        excluded = "excludes" if drop.high < _ACCURACY_BOUND else "does not exclude"
        yield (
            f"Accuracy drops by {drop.value * 100:.2f} points (95 % interval {drop.low * 100:+.2f} to "
            f"{drop.high * 100:+.2f}), which {excluded} {_ACCURACY_BOUND * 100:.0f} points."
        )
    if main.non_identity_rate == 0:
        yield "It chooses identity for every prompt: it saves nothing and is not worth running."
        return
    unbeaten = [rival.control for rival in result.comparisons if rival.control != RANDOM and not rival.beaten]
    for comparison in result.comparisons:
        yield _against(comparison)
    if unbeaten:
        yield (
            f"The router does not beat the {' nor the '.join(unbeaten)} of equal cost: which prompt gets which program "
            f"does not matter here. {_instead(result)}"
        )


def _instead(result: SetResult) -> str:
    """Advice where the router earns nothing."""
    program, share = next(iter(result.main.programs.items()))
    if share >= _NEARLY_ALL:
        return f"It is in effect a static program already: {program} for {share:.0%} of these prompts."
    static = next(system for system in result.systems if system.name == STATIC)
    return f"Use the static program instead: {static.note}."


def _against(rival: Comparison) -> str:
    verb = "beats" if rival.beaten else "does not beat"
    accuracy = ""
    if rival.accuracy_p is not None and rival.accuracy_gain is not None:
        accuracy = f"accuracy {rival.accuracy_gain * 100:+.2f} points, p = {rival.accuracy_p:.2g}; "
    return (
        f"It {verb} the {rival.control} of equal cost ({accuracy}agreement {rival.agreement_gain * 100:+.2f} points, "
        f"p = {rival.agreement_p:.2g}; exact McNemar)."
    )


def _classes(classes: Sequence[ClassResult]) -> Iterator[str]:
    """Per point, which classes earn a choice per prompt, and what serves the others just as well."""
    for point in dict.fromkeys(result.point for result in classes):
        here = [result for result in classes if result.point == point]
        routed = [result for result in here if result.outcome == "routed"]
        static = [result for result in here if result.outcome == "static"]
        identity = [result for result in here if result.outcome == "identity"]
        named = f": {', '.join(result.name for result in routed)}" if routed else ""
        yield (
            f"{point}: reading the prompt beats both the shuffled router and the best static program at p < 0.01 in "
            f"{len(routed)} of {len(here)} classes{named}."
        )
        if static:
            ways = {_served(result) for result in static}
            served = ", ".join(f"{result.name} ({_served(result)})" for result in static)
            if len(ways) == 1 and len(static) > 1:
                served = f"all {len(static)} of the others" if routed else f"all {len(static)} classes"
                served += f" ({ways.pop()})"
            yield f"{point}: a static program is as good within {served}."
        if identity:
            yield f"{point}: full depth for all of {', '.join(result.name for result in identity)}."


def _served(result: ClassResult) -> str:
    """The static program, or that the router runs it there already."""
    if result.program_share >= _NEARLY_ALL:
        return f"which it is: {result.program} for {result.program_share:.0%}"
    return f"{result.static_program}; n = {result.prompts}"
