"""Evaluation: a router against identity, controls of equal cost, and the oracle, on the same prompts.

Pure, apart from the outcomes passed in, which may measure. `evaluate_set` defines the systems; `evaluate_classes`
evaluates only the router, within one class of prompts after another. Renders nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, median
from typing import TYPE_CHECKING, Final

import torch

from polar_sdk.lab.evaluation.controls import best_static, oracle, random_programs, shuffled
from polar_sdk.lab.evaluation.results import (
    RANDOM,
    SHUFFLED,
    STATIC,
    ClassResult,
    Comparison,
    FrontierPoint,
    Saved,
    SetResult,
    SystemResult,
)
from polar_sdk.lab.evaluation.text_answers import TextRun
from polar_sdk.programs.program import Program
from polar_sdk.router.certificate import Setting, form_of
from polar_sdk.router.exact_tests import mcnemar, paired_difference, wilson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polar_sdk.lab.training.outcomes import Outcomes, PromptOutcome
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.policy import Policy
    from polar_sdk.router.learned import LearnedRouter


_DEALS: Final = 21
"""Deals of a random control; the median of their p-values is reported, as a single deal could be lucky."""
_SAME_COST: Final = 0.001
"""Relative difference in cost that is ignored."""
_RANDOM_PROGRAMS: Final = 4
"""Random programs that are dealt to the prompts."""
_FRONTIER_POINTS: Final = 25


@dataclass(frozen=True)
class _Run:
    """One system's programs and outcomes, per prompt, and the FLOPs of its router for each."""

    programs: Sequence[Program]
    router_flops: Sequence[int]
    outcomes: Sequence[PromptOutcome]

    @cached_property
    def flops(self) -> list[float]:
        """Per prompt, the router's included."""
        return [outcome.flops + own for outcome, own in zip(self.outcomes, self.router_flops, strict=True)]

    @cached_property
    def agree(self) -> list[bool]:
        """Per prompt, whether the answer is identity's."""
        return [outcome.agree for outcome in self.outcomes]

    @property
    def share(self) -> float:
        """Mean share of identity's answers that is kept."""
        return fmean(outcome.share for outcome in self.outcomes)


@dataclass(frozen=True)
class _Control:
    """A rival of a run, at the same cost: one run, or several deals of a random one, of which the first is shown."""

    name: str
    deals: Sequence[_Run]
    note: str = ""

    @property
    def shown(self) -> _Run:
        return self.deals[0]


@dataclass(frozen=True)
class Subjects:
    """A router and its rivals on one set: runs and measures them.

    Attributes:
        router: Bound to the model.
        points: Settings of its dial by name, such as a tier's; the first is compared with the controls.
        outputs: The router network's outputs for the prompts, (P, O).
        outcomes: Of the prompts.
        static: Fixed programs to compare with, identity among them; all are programs of the outcomes' matrix.
        policy: Bounds of random programs.
        cost: Of the model.
        rerun: Outcomes of identity, run a second time, per prompt; None = it was not.
        seed: Of everything that is dealt at random.
    """

    router: LearnedRouter
    points: Mapping[str, Setting]
    outputs: Tensor
    outcomes: Outcomes
    static: Sequence[Program]
    policy: Policy
    cost: CostModel
    rerun: Sequence[PromptOutcome] | None = None
    seed: int = 0
    timings: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By system: milliseconds per token, and of the router per request."""

    def part(self, keep: Sequence[int]) -> Subjects:
        """The same for some of the prompts."""
        return replace(
            self, outputs=self.outputs[list(keep)], outcomes=self.outcomes.rows(keep), rerun=None, timings={}
        )

    def __len__(self) -> int:
        return len(self.outcomes)

    @cached_property
    def labelled(self) -> list[int]:
        """Prompts whose right answer is known."""
        return [row for row, known in enumerate(self.outcomes.matrix.labelled.tolist()) if known]

    @cached_property
    def written(self) -> list[int]:
        """Prompts that are answered in text."""
        return [row for row, kind in enumerate(self.outcomes.matrix.kinds) if kind != "choice"]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(tokens) for tokens in self.outcomes.matrix.tokens]

    @cached_property
    def identity(self) -> _Run:
        """Full depth for every prompt."""
        return self.run([Program.identity(self.cost.depth)] * len(self))

    def run(self, programs: Sequence[Program], router_flops: Sequence[int] = ()) -> _Run:
        """A system that runs these programs, one per prompt."""
        return _Run(programs, router_flops or [0] * len(programs), self.outcomes.all(programs))

    def routed(self, setting: Setting) -> _Run:
        """The router with its dial set; at 0 it is not even run."""
        thetas = [setting.of(form_of(kind)) for kind in self.outcomes.matrix.kinds]
        router = self.router
        programs = router.choose_all(self.outputs, torch.tensor(thetas, dtype=torch.float64), self.lengths)
        return self.run(programs, [router.network.flops if theta else 0 for theta in thetas])

    def controls(self, run: _Run) -> list[_Control]:
        """All rivals of a run.

        Random programs are measured for this alone: for long prompts answered in text that takes longer than all the
        rest, and says little, so they are rivals on choices only.
        """
        rivals = [self._shuffled(run), self._static(run)]
        return rivals if self.written else [*rivals, self._random(run)]

    def within(self, name: str, point: str, run: _Run) -> ClassResult:
        """The router against the two controls that show whether reading a prompt earns anything."""
        system, static = self.system(point, "router", run), self._static(run)
        program, share = next(iter(system.programs.items()))
        return ClassResult(
            name=name,
            point=point,
            prompts=len(self),
            flops_saved=system.flops_saved.total,
            non_identity_rate=system.non_identity_rate,
            agreement=system.agreement.value,
            accuracy_drop=system.accuracy_drop,
            program=program,
            program_share=share,
            shuffled=self.compare(run, self._shuffled(run)),
            static=self.compare(run, static),
            static_program=static.note,
        )

    def _shuffled(self, run: _Run) -> _Control:
        """The run's own programs dealt anew, several times, and never cheaper than the run itself.

        Where long prompts run identity more often than short ones, dealing at random would be cheaper; there programs
        move among prompts of about the same size only.
        """
        seeds = range(self.seed, self.seed + _DEALS)
        deals = [self.run(shuffled(run.programs, seed), run.router_flops) for seed in seeds]
        spent = fmean(outcome.flops for deal in deals for outcome in deal.outcomes)
        if spent < (1 - _SAME_COST) * fmean(outcome.flops for outcome in run.outcomes):
            deals = [self.run(shuffled(run.programs, seed, self.identity.flops), run.router_flops) for seed in seeds]
        return _Control(SHUFFLED, deals)

    def _static(self, run: _Run) -> _Control:
        """The best static program of the run's cost, chosen with hindsight: the one that agrees most on these prompts.

        Where several agree alike, as on texts, the one that keeps most of the answers. A mix of two is dealt several
        times.
        """
        matrix, static = self.outcomes.matrix, self.static
        quality = (matrix.agree.double().mean(0) + 0.01 * matrix.share.double().mean(0)).tolist()
        known = dict(
            zip(matrix.programs, zip(quality, matrix.flops.double().sum(0).tolist(), strict=True), strict=True)
        )
        qualities, costs = ({program: known[program][which] for program in static} for which in (0, 1))
        mix = best_static(qualities, costs, sum(run.flops))
        seeds = range(self.seed, self.seed + (_DEALS if mix.cheap != mix.expensive else 1))
        return _Control(STATIC, [self.run(mix.deal(len(self), seed)) for seed in seeds], mix.text)

    def _random(self, run: _Run) -> _Control:
        """A few programs that skip random layers, dealt to the prompts."""
        ratio = min(1.0, sum(run.flops) / sum(self.identity.flops))
        drawn = random_programs(ratio, _RANDOM_PROGRAMS, self.cost, self.policy, self.seed)
        dealt = shuffled([drawn[row % len(drawn)] for row in range(len(self))], self.seed)
        return _Control(RANDOM, [self.run(dealt)])

    def system(self, name: str, role: str, run: _Run, note: str = "") -> SystemResult:
        """The figures of one system."""
        right, reference = self._right(run), self._right(self.identity)
        identity = self.identity.programs[0]
        timing = self.timings.get(name)
        return SystemResult.model_validate(
            {
                "name": name,
                "role": role,
                "deployable": role != "oracle",
                "note": note,
                "accuracy": wilson(sum(right), len(right)) if right else None,
                "accuracy_drop": paired_difference(reference, right) if right else None,
                "mcnemar_vs_identity_p": mcnemar(reference, right) if right else None,
                "agreement": wilson(sum(run.agree), len(run.agree)),
                "answer_share": run.share,
                "non_identity_rate": fmean(program != identity for program in run.programs),
                "programs": {
                    program.text: count / len(run.programs) for program, count in Counter(run.programs).most_common()
                },
                "flops_saved": self._saved(run),
                "ms_per_token": timing and timing[0],
                "router_ms": timing and timing[1],
            }
        )

    def _right(self, run: _Run) -> list[bool]:
        return [run.outcomes[row].right for row in self.labelled]

    def _saved(self, run: _Run) -> Saved:
        """Prefill: layers over the prompts and the router. Decode: the rest."""
        cost, identity = self.cost, self.identity.programs[0]
        pairs = list(zip(run.programs, self.lengths, strict=True))
        prefill = sum(cost.prefill(program, length) for program, length in pairs) + sum(run.router_flops)
        full_prefill = sum(cost.prefill(identity, length) for length in self.lengths)
        total, full = sum(run.flops), sum(self.identity.flops)
        decode, full_decode = total - prefill, full - full_prefill
        return Saved(
            prefill=1 - prefill / full_prefill,
            decode=1 - decode / full_decode if full_decode > 0 else 0.0,
            total=1 - total / full,
        )

    def compare(self, run: _Run, control: _Control) -> Comparison:
        """Paired figures of a run and a control; of several deals the median p-value and the mean gain."""
        right, theirs = self._right(run), [(self._right(deal), deal.agree) for deal in control.deals]
        return Comparison(
            control=control.name,
            accuracy_p=median(mcnemar(right, other) for other, _ in theirs) if right else None,
            accuracy_gain=fmean(fmean(right) - fmean(other) for other, _ in theirs) if right else None,
            agreement_p=median(mcnemar(run.agree, other) for _, other in theirs),
            agreement_gain=fmean(fmean(run.agree) - fmean(other) for _, other in theirs),
            share_gain=fmean(run.share - deal.share for deal in control.deals),
        )

    def frontier(self) -> list[FrontierPoint]:
        """The router along its dial."""
        dial = self.router.facts.dial
        step = max(1, len(dial) // _FRONTIER_POINTS)
        points = []
        for theta in dict.fromkeys([*dial[::step], dial[-1]]):
            run = self.routed(Setting.to(theta))
            right = self._right(run)
            points.append(
                FrontierPoint(
                    theta=theta,
                    flops_saved=self._saved(run).total,
                    agreement=fmean(run.agree),
                    accuracy=fmean(right) if right else None,
                )
            )
        return points

    def texts(self, run: _Run) -> TextRun:
        """The prompts that are answered in text."""
        rerun, classes = self.rerun or self.identity.outcomes, self.outcomes.matrix.classes
        return TextRun(
            outcomes=[run.outcomes[row] for row in self.written],
            spent=[run.flops[row] for row in self.written],
            full=[self.identity.flops[row] for row in self.written],
            floor=[rerun[row] for row in self.written],
            lengths=[self.lengths[row] for row in self.written],
            classes=[classes[row] for row in self.written],
        )


def evaluate_set(name: str, subjects: Subjects) -> SetResult:
    """Evaluate every system on one set."""
    routed = {f"router ({point})": subjects.routed(setting) for point, setting in subjects.points.items()}
    main = next(iter(routed.values()))
    controls = subjects.controls(main)
    systems = [subjects.system("identity", "identity", subjects.identity)]
    systems += [subjects.system(point, "router", run) for point, run in routed.items()]
    if subjects.rerun is not None:
        again = replace(subjects.identity, outcomes=subjects.rerun)
        systems.append(subjects.system("identity again", "control", again))
    systems += [subjects.system(control.name, "control", control.shown, control.note) for control in controls]
    hindsight = subjects.run(oracle(subjects.outcomes, subjects.outcomes.matrix.programs))
    systems.append(subjects.system("oracle", "oracle", hindsight, "not deployable: it knows the outcome"))
    return SetResult(
        name=name,
        prompts=len(subjects),
        labelled=len(subjects.labelled),
        data=subjects.outcomes.matrix.data,
        systems=tuple(systems),
        comparisons=tuple(subjects.compare(main, control) for control in controls),
        frontier=tuple(subjects.frontier()),
    )


def evaluate_classes(subjects: Subjects, classes: Mapping[str, Sequence[int]]) -> list[ClassResult]:
    """The router at every point within each class, given the rows of each."""
    results = []
    for name, rows in classes.items():
        part = subjects.part(rows)
        results += [part.within(name, point, part.routed(setting)) for point, setting in part.points.items()]
    return results


def evaluate_texts(subjects: Subjects, points: Mapping[str, Setting]) -> dict[str, TextRun]:
    """The router at each of some settings on the prompts answered in text; empty if there are none."""
    if not subjects.written:
        return {}
    return {name: subjects.texts(subjects.routed(setting)) for name, setting in points.items()}
