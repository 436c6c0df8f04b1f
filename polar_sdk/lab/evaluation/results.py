"""What an evaluation found, as data. Saves as JSON; measures and renders nothing.

Shares are fractions of 1; an interval is a value with the ends of its 95 % confidence interval.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from polar_sdk.router.certificate import Certificate
from polar_sdk.router.exact_tests import Interval


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Saved(_Frozen):
    """Share of identity's FLOPs saved; router, head and bridges are counted on the system's side."""

    prefill: float
    """Of the layers over the prompts, the router included."""
    decode: float
    """Of everything after the prompts: answers or choices, and the head."""
    total: float


class SystemResult(_Frozen):
    """One system on one set."""

    name: str
    role: Literal["identity", "router", "control", "oracle"]
    deployable: bool = True
    """False for what needs to know the outcome before it runs."""
    note: str = ""
    accuracy: Interval | None = None
    """With Wilson's interval; None where no prompt has an answer."""
    accuracy_drop: Interval | None = None
    """Identity's accuracy − this one's, paired."""
    mcnemar_vs_identity_p: float | None = None
    agreement: Interval
    """Share of prompts with the same answer as identity, with Wilson's interval."""
    answer_share: float
    """Mean share of identity's answer that stays: of its tokens, for prompts that are answered in text."""
    non_identity_rate: float
    programs: dict[str, float]
    """Share of the prompts that run each program, the most used one first."""
    flops_saved: Saved
    ms_per_token: float | None = None
    """Wall-clock at batch 1 per token of short answers, prompt included. Unit: milliseconds; None = not timed."""
    router_ms: float | None = None
    """Of it, per request: what the router took. Unit: milliseconds."""


class Comparison(_Frozen):
    """The router against one control of equal cost, paired, exact McNemar."""

    control: str
    accuracy_p: float | None
    """None where no prompt has an answer."""
    accuracy_gain: float | None
    agreement_p: float
    agreement_gain: float

    @property
    def beaten(self) -> bool:
        """Whether the router is better in accuracy or agreement at p < 0.01."""
        accuracy = self.accuracy_p is not None and (self.accuracy_gain or 0) > 0 and self.accuracy_p < 0.01
        return accuracy or (self.agreement_gain > 0 and self.agreement_p < 0.01)


class ClassResult(_Frozen):
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
    """Of the prompts that run it."""
    shuffled: Comparison
    static: Comparison
    static_program: str
    """What the best static program of equal cost is, in words."""

    @property
    def outcome(self) -> Literal["identity", "static", "routed"]:
        """What serves this class: full depth, a program that needs no router, or a choice per prompt that earns it.

        `routed` only where the router beats both the shuffled router and the static program at p < 0.01.
        """
        if self.non_identity_rate == 0:
            return "identity"
        return "routed" if self.shuffled.beaten and self.static.beaten else "static"


class FrontierPoint(_Frozen):
    """The router with its dial at one θ."""

    theta: float
    flops_saved: float
    agreement: float
    accuracy: float | None


class Generated(_Frozen):
    """Prompts answered in text, by one tier."""

    prompts: int
    same_answer: Interval
    same_tokens: float
    flops_saved: float


class SetResult(_Frozen):
    """All systems on one set of prompts."""

    name: str
    prompts: int
    labelled: int
    data: str
    """Hash of the prompts."""
    systems: tuple[SystemResult, ...]
    comparisons: tuple[Comparison, ...]
    frontier: tuple[FrontierPoint, ...]
    generation: dict[str, Generated]
    """By router system; empty where the set has choice questions only."""

    @property
    def main(self) -> SystemResult:
        """The router at the point that is compared with the controls."""
        return next(system for system in self.systems if system.role == "router")


class Evaluation(_Frozen):
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
    verdict: tuple[str, ...]
    certificate: Certificate | None
    certificate_holds: bool
    training: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """Everything as JSON-like data, the figures that matter most under plain keys."""
        whole = self.sets[0]
        main, drop = whole.main, whole.main.accuracy_drop
        against = {one.control.split(" (")[0]: one for one in whole.comparisons}

        def p_value(control: str) -> float | None:
            one = against.get(control)
            return None if one is None else one.agreement_p if one.accuracy_p is None else one.accuracy_p

        return {
            "flops_saved": main.flops_saved.total,
            "accuracy_drop": None if drop is None else drop.value,
            "accuracy_drop_ci95": None if drop is None else [drop.low, drop.high],
            "non_identity_rate": main.non_identity_rate,
            "mcnemar_vs_shuffled_p": p_value("shuffled router"),
            "mcnemar_vs_static_p": p_value("best static program"),
            "mcnemar_vs_shuffled_agreement_p": getattr(against.get("shuffled router"), "agreement_p", None),
            "mcnemar_vs_static_agreement_p": getattr(against.get("best static program"), "agreement_p", None),
            **self.model_dump(mode="json"),
            "classes": [{**one.model_dump(mode="json"), "outcome": one.outcome} for one in self.classes],
        }
