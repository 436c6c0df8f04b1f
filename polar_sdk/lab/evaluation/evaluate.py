"""Evaluation: a router beside identity, beside controls of equal cost, and beside the oracle, on the same prompts.

Pure but for the outcomes it is given, which may measure. `evaluate_set` says which systems there are;
`evaluate_classes` looks at the router alone, within one class of prompts after another. Renders nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Final

from polar_sdk.lab.evaluation.controls import StaticMix, best_static, oracle, random_programs, shuffled
from polar_sdk.lab.evaluation.results import (
    ClassResult,
    Comparison,
    FrontierPoint,
    Generated,
    Saved,
    SetResult,
    SystemResult,
)
from polar_sdk.programs.program import Program
from polar_sdk.router.exact_tests import mcnemar, paired_difference, wilson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polar_sdk.lab.training.outcomes import Outcome, Outcomes
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.policy import Policy
    from polar_sdk.router.learned import LearnedRouter


_DEALS: Final = 21
"""Deals of a control at random whose p-values the median is taken of: one could be lucky."""
_SAME_COST: Final = 0.001
"""Difference of cost that counts as none."""
_RANDOM: Final = 4
"""Random programs that the prompts are dealt to."""
_FRONTIER: Final = 25
"""Points of the frontier."""


@dataclass(frozen=True)
class Subjects:
    """What is evaluated on one set.

    Attributes:
        router: Bound to the model.
        points: θ by name, such as a tier's; the first is compared with the controls.
        outputs: What the router's network says about the prompts, (P, O).
        outcomes: Of the prompts.
        static: Fixed programs to compare with, identity among them; all are programs of the outcomes' matrix.
        policy: Bounds of random programs.
        cost: Of the model.
        rerun: Whether identity agreed with itself when it was run again, per prompt; None = it was not.
        seed: Of all that is dealt at random.
    """

    router: LearnedRouter
    points: Mapping[str, float]
    outputs: Tensor
    outcomes: Outcomes
    static: Sequence[Program]
    policy: Policy
    cost: CostModel
    rerun: Sequence[Outcome] | None = None
    seed: int = 0
    timings: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By system: milliseconds per token, and of the router per request."""

    def rows(self, keep: Sequence[int]) -> Subjects:
        """The same for some of the prompts."""
        return replace(
            self, outputs=self.outputs[list(keep)], outcomes=self.outcomes.rows(keep), rerun=None, timings={}
        )


def evaluate_set(name: str, subjects: Subjects) -> SetResult:
    """Evaluate every system on one set."""
    bench = _Bench(subjects)
    routed = {f"router ({point})": bench.routed(theta) for point, theta in subjects.points.items()}
    main = next(iter(routed.values()))
    controls, notes = bench.controls(main)
    systems = [bench.identity()]
    systems += [bench.system(point, "router", run) for point, run in routed.items()]
    if subjects.rerun is not None:
        again = replace(bench.identity_run, outcomes=subjects.rerun)
        systems.append(bench.system("identity again", "control", again))
    systems += [bench.system(control, "control", run, notes.get(control, "")) for control, run in controls.items()]
    systems.append(bench.system("oracle", "oracle", bench.oracle_run(), "not deployable: it knows the outcome"))
    return SetResult(
        name=name,
        prompts=len(bench.rows),
        labelled=len(bench.labelled),
        data=subjects.outcomes.matrix.data,
        systems=tuple(systems),
        comparisons=tuple(bench.comparison(control, main) for control in controls),
        frontier=tuple(bench.frontier()),
        generation={point: bench.generated(run) for point, run in routed.items()} if bench.written else {},
    )


def evaluate_classes(subjects: Subjects, classes: Mapping[str, Sequence[int]]) -> list[ClassResult]:
    """The router at every point within each class, the rows of which are given."""
    found = []
    for name, rows in classes.items():
        bench = _Bench(subjects.rows(rows))
        found += [bench.within(name, point, bench.routed(theta)) for point, theta in subjects.points.items()]
    return found


@dataclass(frozen=True)
class _Run:
    """One system's programs, its router's FLOPs, and what came of it, per prompt."""

    programs: Sequence[Program]
    router_flops: Sequence[int]
    outcomes: Sequence[Outcome]


class _Bench:
    """Runs and measures systems on one set."""

    def __init__(self, subjects: Subjects) -> None:
        self.subjects = subjects
        matrix = subjects.outcomes.matrix
        self.rows = range(len(matrix))
        self.labelled = [row for row, known in enumerate(matrix.labelled.tolist()) if known]
        self.written = [row for row, kind in enumerate(matrix.kinds) if kind != "choice"]
        self.lengths = [len(tokens) for tokens in matrix.tokens]
        self.identity_run = self._run([Program.identity(subjects.cost.depth)] * len(self.rows))
        self.full = self._flops(self.identity_run)

    def _run(self, programs: Sequence[Program], router_flops: Sequence[int] = ()) -> _Run:
        return _Run(programs, router_flops or [0] * len(programs), self.subjects.outcomes.all(programs))

    def routed(self, theta: float) -> _Run:
        """The router with its dial at θ; at 0 it is not even asked."""
        if theta == 0:
            return self.identity_run
        router = self.subjects.router
        programs = router.choose_all(self.subjects.outputs, theta)
        flops = [router.route_flops(length, one) for length, one in zip(self.lengths, programs, strict=True)]
        return self._run(programs, flops)

    def oracle_run(self) -> _Run:
        """The cheapest agreeing program that is known."""
        known = self.subjects.outcomes.matrix.programs
        return self._run(oracle(self.subjects.outcomes, known))

    def controls(self, main: _Run) -> tuple[dict[str, _Run], dict[str, str]]:
        """Systems of the main one's cost, and a note about some."""
        subjects = self.subjects
        static = self._static(main)
        ratio = min(1.0, sum(self._flops(main)) / sum(self.full))
        drawn = random_programs(ratio, _RANDOM, subjects.cost, subjects.policy, subjects.seed)
        dealt = shuffled([drawn[row % len(drawn)] for row in self.rows], subjects.seed)
        runs = {
            "shuffled router": self._shuffles(main)[0],
            "best static program": self._run(static.deal(len(self.rows), subjects.seed)),
            "random program": self._run(dealt),
        }
        return runs, {"best static program": static.text}

    def within(self, name: str, point: str, run: _Run) -> ClassResult:
        """The router against the two controls that say whether reading a prompt earns anything."""
        system, static = self.system(point, "router", run), self._static(run)
        program, share = next(iter(system.programs.items()))
        return ClassResult(
            name=name,
            point=point,
            prompts=len(self.rows),
            flops_saved=system.flops_saved.total,
            non_identity_rate=system.non_identity_rate,
            agreement=system.agreement.value,
            accuracy_drop=system.accuracy_drop,
            program=program,
            program_share=share,
            shuffled=self._against("shuffled router", run, self._shuffles(run)),
            static=self._against("best static program", run, self._statics(static)),
            static_program=static.text,
        )

    def _static(self, main: _Run) -> StaticMix:
        """The best static program of a run's cost, chosen with hindsight: the one that agrees most on these prompts."""
        quality = {one: fmean(self.subjects.outcomes.agreeing(one)) for one in self.subjects.static}
        return best_static(quality, self._static_costs(), sum(self._flops(main)))

    def _static_costs(self) -> dict[Program, float]:
        """FLOPs of each fixed program over all prompts."""
        matrix = self.subjects.outcomes.matrix
        totals = dict(zip(matrix.programs, matrix.flops.double().sum(0).tolist(), strict=True))
        return {program: totals[program] for program in self.subjects.static}

    def _flops(self, run: _Run) -> list[float]:
        """Per prompt, the router's included."""
        return [one.flops + own for one, own in zip(run.outcomes, run.router_flops, strict=True)]

    def identity(self) -> SystemResult:
        """Full depth."""
        return self.system("identity", "identity", self.identity_run)

    def system(self, name: str, role: str, run: _Run, note: str = "") -> SystemResult:
        """The figures of one system."""
        right, reference = self._right(run), self._right(self.identity_run)
        agree = [one.agree for one in run.outcomes]
        identity = self.identity_run.programs[0]
        timing = self.subjects.timings.get(name)
        return SystemResult.model_validate(
            {
                "name": name,
                "role": role,
                "deployable": role != "oracle",
                "note": note,
                "accuracy": wilson(sum(right), len(right)) if right else None,
                "accuracy_drop": paired_difference(reference, right) if right else None,
                "mcnemar_vs_identity_p": mcnemar(reference, right) if right else None,
                "agreement": wilson(sum(agree), len(agree)),
                "answer_share": fmean(one.share for one in run.outcomes),
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
        cost, identity = self.subjects.cost, self.identity_run.programs[0]
        pairs = list(zip(run.programs, self.lengths, strict=True))
        prefill = sum(cost.prefill(program, length) for program, length in pairs) + sum(run.router_flops)
        full_prefill = sum(cost.prefill(identity, length) for length in self.lengths)
        total, full = sum(self._flops(run)), sum(self.full)
        decode, full_decode = total - prefill, full - full_prefill
        return Saved(
            prefill=1 - prefill / full_prefill,
            decode=1 - decode / full_decode if full_decode > 0 else 0.0,
            total=1 - total / full,
        )

    def comparison(self, control: str, main: _Run) -> Comparison:
        """The router against a control."""
        if control == "shuffled router":
            return self._against(control, main, self._shuffles(main))
        if control == "best static program":
            return self._against(control, main, self._statics(self._static(main)))
        return self._against(control, main, [self.controls(main)[0][control]])

    def _shuffles(self, main: _Run) -> list[_Run]:
        """Its programs dealt anew, several times, and never cheaper than it is itself.

        Where long prompts run identity more often than short ones, dealing at random would be; there programs move
        among prompts of about the same size only.
        """
        plain = [self._run(shuffled(main.programs, seed), main.router_flops) for seed in self._seeds()]
        spent = fmean(one.flops for run in plain for one in run.outcomes)
        if spent >= (1 - _SAME_COST) * fmean(one.flops for one in main.outcomes):
            return plain
        return [self._run(shuffled(main.programs, seed, self.full), main.router_flops) for seed in self._seeds()]

    def _statics(self, static: StaticMix) -> list[_Run]:
        """One program for all; a mix of two is dealt several times."""
        seeds = self._seeds() if static.cheap != static.dear else self._seeds()[:1]
        return [self._run(static.deal(len(self.rows), seed)) for seed in seeds]

    def _seeds(self) -> range:
        return range(self.subjects.seed, self.subjects.seed + _DEALS)

    def _against(self, control: str, main: _Run, rivals: Sequence[_Run]) -> Comparison:
        """Paired figures; of several deals the median p-value and the mean gain."""
        right, agree = self._right(main), [one.agree for one in main.outcomes]
        theirs = [(self._right(rival), [one.agree for one in rival.outcomes]) for rival in rivals]
        return Comparison(
            control=control,
            accuracy_p=median(mcnemar(right, other) for other, _ in theirs) if right else None,
            accuracy_gain=fmean(fmean(right) - fmean(other) for other, _ in theirs) if right else None,
            agreement_p=median(mcnemar(agree, other) for _, other in theirs),
            agreement_gain=fmean(fmean(agree) - fmean(other) for _, other in theirs),
        )

    def frontier(self) -> list[FrontierPoint]:
        """The router along its dial."""
        dial = self.subjects.router.facts.dial
        step = max(1, len(dial) // _FRONTIER)
        points = []
        for theta in dict.fromkeys([*dial[::step], dial[-1]]):
            run = self.routed(theta)
            right = self._right(run)
            points.append(
                FrontierPoint(
                    theta=theta,
                    flops_saved=self._saved(run).total,
                    agreement=fmean(one.agree for one in run.outcomes),
                    accuracy=fmean(right) if right else None,
                )
            )
        return points

    def generated(self, run: _Run) -> Generated:
        """The prompts that are answered in text."""
        outcomes = [run.outcomes[row] for row in self.written]
        spent, full = self._flops(run), sum(self.identity_run.outcomes[row].flops for row in self.written)
        return Generated(
            prompts=len(outcomes),
            same_answer=wilson(sum(one.agree for one in outcomes), len(outcomes)),
            same_tokens=fmean(one.share for one in outcomes),
            flops_saved=1 - sum(spent[row] for row in self.written) / full,
        )
