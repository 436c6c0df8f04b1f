"""The findings of a suite: what every tier gets right, runs and costs against full depth, on the same problems.

Shares are fractions of 1; an interval is a value with the ends of its 95 % confidence interval. Saves as JSON; measures
and draws nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from pydantic import BaseModel

from polar_sdk.lab.training.outcomes import grouped
from polar_sdk.programs.cost import pieces, size
from polar_sdk.router.exact_tests import Interval, mcnemar, paired_difference, wilson
from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT, FlopUsage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.program import Program


class TierResult(BaseModel, frozen=True):
    """One tier, program or setting on a suite."""

    name: str
    accuracy: Interval
    """With Wilson's interval."""
    accuracy_drop: Interval
    """Full depth's accuracy − this one's, paired."""
    mcnemar_p: float
    """p-value of "both are right equally often", exact."""
    layers_used: float
    """Mean number of layers that a token of prompt or answer runs. A filled visit counts as the share of the layer's
    FLOPs that its map takes, and so does a bridge."""
    layers_share: float
    """The same over the model's depth."""
    flops_saved: float
    """Share of what full depth spends on its own answers to the same problems; the router is counted here."""
    prompt_flops_saved: float
    """Share of full depth's FLOPs for the prompts' layers."""
    same_tokens_flops_saved: float
    """Share of what this one's own answers, as long as they are, would take at full depth."""
    compute_units_per_1000: float
    """Cost of 1,000 such requests. Unit: compute units."""
    answer_tokens: float
    """Mean length of the answers; 1 for letters. Unit: tokens."""
    programs: dict[str, float]
    """Share of the problems that run each program, the most used one first."""
    groups: dict[str, float]
    """Accuracy by group, such as MMLU's subjects."""


class SuiteEvaluation(BaseModel, frozen=True):
    """All tiers on one suite; full depth first."""

    suite: str
    shots: int
    chat: bool
    """Whether the problems were asked through the model's chat template."""
    model: str
    fingerprint: str
    dtype: str
    device: str
    depth: int
    data: str
    """Hash of the problems."""
    problems: int
    does_not_fit: int
    """Problems left out since they exceed the context window."""
    used_before: int
    """Problems left out since the router was trained or calibrated on them."""
    prompt_tokens: float
    """Mean length of a prompt. Unit: tokens."""
    template_tokens: int
    """Tokens of each prompt that are the chat template's; included."""
    tiers: tuple[TierResult, ...]
    flaws: dict[str, tuple[str, ...]]
    """By tier, for each problem: what is wrong with the answer; empty if it is right."""

    @property
    def baseline(self) -> TierResult:
        """Full depth."""
        return self.tiers[0]


@dataclass(frozen=True)
class Request:
    """One problem as one tier answered it."""

    program: Program
    prompt: int
    """Unit: tokens."""
    output: int
    flaw: str
    router_flops: int = 0

    def flops(self, cost: CostModel) -> FlopUsage:
        """FLOPs of the run."""
        return cost.request(self.program, self.prompt, self.output, router=self.router_flops)

    def layers(self, cost: CostModel) -> float:
        """Layers that its tokens ran, all together."""
        layers = cost.layers
        prompt = sum(
            size(share.parts.running) * _worth(cost, share.step.first, share.step.last, bridge=share.step.bridge)
            + size(share.parts.leaving)
            + (
                size(share.parts.filled)
                * cost.fill((share.step.segment[0], share.step.segment[1]))
                / layers[share.step.first].linear
                if share.step.begins_segment
                else 0.0
            )
            for piece in pieces(self.prompt)
            for share in cost.shares(self.program, piece)
        )
        decoded = sum(_worth(cost, step.first, step.last, bridge=step.bridge) for step in self.program)
        return prompt + decoded * (self.output - 1)

    @property
    def tokens(self) -> int:
        """Tokens that ran: the last one of the answer does not."""
        return self.prompt + self.output - 1


def _worth(cost: CostModel, first: int, last: int, *, bridge: bool) -> float:
    """The worth of a step in layers."""
    return cost.bridges[first, last] / cost.layers[first].linear if bridge else 1.0


def tier_result(
    name: str,
    ours: Sequence[Request],
    full: Sequence[Request],
    groups: Sequence[str | None],
    cost: CostModel,
) -> TierResult:
    """Compare a tier's requests with full depth's, problem by problem; at least one."""
    right, reference = ([not request.flaw for request in some] for some in (ours, full))
    spent, whole = ([request.flops(cost) for request in some] for some in (ours, full))
    identity = full[0].program
    total = sum(flops.total for flops in spent)
    same = sum(cost.request(identity, request.prompt, request.output).total for request in ours)
    layers = sum(request.layers(cost) for request in ours) / sum(request.tokens for request in ours)
    by_group = grouped(range(len(ours)), lambda row: groups[row])
    return TierResult(
        name=name,
        accuracy=wilson(sum(right), len(right)),
        accuracy_drop=paired_difference(reference, right),
        mcnemar_p=mcnemar(reference, right),
        layers_used=layers,
        layers_share=layers / cost.depth,
        flops_saved=1 - total / sum(flops.total for flops in whole),
        prompt_flops_saved=1
        - sum(flops.layers_prefill + flops.router for flops in spent) / sum(flops.layers_prefill for flops in whole),
        same_tokens_flops_saved=1 - total / same,
        compute_units_per_1000=1000 * total / len(ours) / FLOPS_PER_COMPUTE_UNIT,
        answer_tokens=fmean(request.output for request in ours),
        programs={
            program.text: count / len(ours)
            for program, count in Counter(request.program for request in ours).most_common()
        },
        groups={name: fmean(right[row] for row in rows) for name, rows in sorted(by_group.items())},
    )
