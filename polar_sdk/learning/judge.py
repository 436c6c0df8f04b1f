"""Calibrating and evaluating a router on a model: from items to a certificate, and to an evaluation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final

from polar_sdk.data import ChoiceItem
from polar_sdk.errors import RouterError
from polar_sdk.learning.calibrate import TIER_ALPHAS, certify
from polar_sdk.learning.evaluate import Subjects, evaluate_set
from polar_sdk.learning.measuring import Bench, marks, unseen
from polar_sdk.learning.results import Evaluation
from polar_sdk.learning.verdict import verdict
from polar_sdk.program import Program
from polar_sdk.router.learned import LearnedRouter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.data import Item
    from polar_sdk.learning.calibrate import TierPromise
    from polar_sdk.learning.outcomes import Outcomes
    from polar_sdk.learning.results import SetResult
    from polar_sdk.model import PolarModel
    from polar_sdk.rewards import RewardCache, Task
    from polar_sdk.router import Router

__all__ = ["Judge"]

_TIMED_TOKENS: Final = 16
"""Length of the answers that are timed."""


def _silent(stage: str, done: int, total: int) -> None: ...


@dataclass
class Judge:
    """Calibrates and evaluates one router.

    Attributes:
        model: The model.
        router: A learned router; None = the model's.
        cache: Where rewards are kept; None = the one on disk.
        on_progress: Called with (stage, steps done, steps in all).
    """

    model: PolarModel
    router: Router | None = None
    cache: RewardCache | None = None
    on_progress: Callable[[str, int, int], None] = field(default=_silent)

    def __post_init__(self) -> None:
        found = self.router or self.model.router
        if not isinstance(found, LearnedRouter):
            what = "no router" if found is None else f"a router of kind {found.kind}, which has nothing to calibrate"
            raise RouterError(f"the model has {what}.", hint="Name a trained one, or train it with `polar train`.")
        self._router: LearnedRouter = found.bind(self.model.decoder, self.model.fingerprint)
        self._bench = Bench(self.model, self.on_progress, self.cache)

    def calibrate(
        self, items: Sequence[Item], *, tiers: Mapping[str, TierPromise] = TIER_ALPHAS, delta: float = 0.1
    ) -> LearnedRouter:
        """The router with a certificate made on these items, those left out that it was trained on.

        Raises:
            CalibrationSizeError: A tier's α needs more prompts.
            DataError: Nothing is left, or the labels are of one class.
        """
        training = {name: value for name, value in self._router.facts.training.items() if name != "calibrated"}
        tasks = self._bench.tasks(unseen(items, training, calibrating=True))
        outcomes = self._outcomes(tasks)
        outputs = self._outputs(tasks)
        certificate = certify(self._router, outputs, outcomes, tiers=tiers, delta=delta, on_progress=self.on_progress)
        training["calibrated"] = marks(task.id for task in tasks)
        return self._router.with_facts(training=training).with_certificate(certificate)

    def evaluate(
        self,
        sets: Mapping[str, Sequence[Item]],
        *,
        points: Mapping[str, float] | None = None,
        timed: int = 8,
        seed: int = 0,
    ) -> Evaluation:
        """Evaluate on sets of items, and on all of them together.

        Args:
            sets: By name; what the router was trained or calibrated on is left out.
            points: θ by name; None = the certified tiers, or the default θ. The first is compared with the controls.
            timed: Prompts that are timed; 0 times none.
            seed: Of the controls.
        """
        chosen = dict(points or self._points())
        training = self._router.facts.training
        tasks = {name: self._bench.tasks(unseen(items, training, calibrating=False)) for name, items in sets.items()}
        everything = list({task.id: task for some in tasks.values() for task in some}.values())
        whole = {"all": everything, **tasks} if len(tasks) > 1 else tasks
        timings = self._timings(everything[:timed], chosen) if timed else {}
        results = [
            self._set(name, some, chosen, timings if at == 0 else {}, seed)
            for at, (name, some) in enumerate(whole.items())
        ]
        return Evaluation(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            device=self.model.device,
            router=f"{self._router.kind} {self._router.version}",
            point=next(iter(chosen)),
            sets=tuple(results),
            verdict=tuple(verdict(results)),
            certificate=self._router.certificate,
            certificate_holds=self._router.certified,
            training={name: value for name, value in training.items() if name not in ("seen", "calibrated")},
        )

    def _points(self) -> dict[str, float]:
        """The default tier first, then the others."""
        certificate, default = self._router.certificate, self._router.facts.default_tier
        if certificate is None or not certificate.tiers:
            return {"uncalibrated": self._router.facts.default_theta}
        order = sorted(certificate.tiers, key=lambda tier: tier != default)
        return {tier: certificate.tiers[tier].theta for tier in order}

    def _set(
        self,
        name: str,
        tasks: Sequence[Task],
        points: Mapping[str, float],
        timings: Mapping[str, tuple[float, float]],
        seed: int,
    ) -> SetResult:
        outcomes = self._outcomes(tasks)
        quality = {Program.identity(self.model.depth): 1.0}
        quality |= {program: value for program, value in self._static().items() if program in outcomes.matrix.programs}
        return evaluate_set(
            name,
            Subjects(
                router=self._router,
                points=points,
                outputs=self._outputs(tasks),
                outcomes=outcomes,
                static_quality=quality,
                policy=self.model.policy,
                cost=self.model.decoder.cost,
                rerun=self._bench.again(tasks),
                seed=seed,
                timings=timings,
            ),
        )

    def _static(self) -> dict[Program, float]:
        listed = self._router.facts.training.get("static", ())
        return {Program.parse(one["program"]): float(one["quality"]) for one in listed}

    def _outcomes(self, tasks: Sequence[Task]) -> Outcomes:
        return self._bench.outcomes(tasks, [*self._router.programs, *self._static()])

    def _outputs(self, tasks: Sequence[Task]) -> Tensor:
        features = self._router.reader.stack([task.question.prompt for task in tasks])
        return self._router.outputs(features)

    def _timings(self, tasks: Sequence[Task], points: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Milliseconds per token of short answers at batch 1, and of the router per request; medians over prompts."""
        asked = [_prompt_of(task.item) for task in tasks]
        systems = {"identity": 0.0, **{f"router ({name})": theta for name, theta in points.items()}}
        each: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for at, prompt in enumerate(asked):
            self.on_progress("timing", at, len(asked))
            tokens = self.model.prompt_tokens(prompt)
            for name, theta in systems.items():
                begin = time.perf_counter_ns()
                program = self._router.at(theta).route(tokens).program
                routed = time.perf_counter_ns()
                answer = self.model.greedy_answers([prompt], max_tokens=_TIMED_TOKENS, program=program)[0]
                end = time.perf_counter_ns()
                each[name].append(((end - begin) / 1e6 / max(1, len(answer)), (routed - begin) / 1e6))
        return {name: (median(a for a, _ in some), median(b for _, b in some)) for name, some in each.items()}


def _prompt_of(item: Item) -> str:
    return item.question if isinstance(item, ChoiceItem) else item.prompt
