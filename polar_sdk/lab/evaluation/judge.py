"""Calibrating and evaluating a router on a model: from items to a certificate, and to an evaluation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Final

from polar_sdk.engine.route import run_lead
from polar_sdk.errors import RouterError
from polar_sdk.lab.evaluation.calibrate import TIER_ALPHAS, DialWalk, Resplits, certify, resplit
from polar_sdk.lab.evaluation.evaluate import Subjects, evaluate_classes, evaluate_set
from polar_sdk.lab.evaluation.results import Evaluation, verdict
from polar_sdk.lab.items import ChoiceItem
from polar_sdk.lab.training.measuring import Bench, marks, unseen
from polar_sdk.programs.program import Program
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polar_sdk.lab.evaluation.calibrate import TierPromise
    from polar_sdk.lab.items import Item
    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.lab.training.outcomes import Outcomes
    from polar_sdk.model import PolarModel
    from polar_sdk.router.base import Router


_TIMED_TOKENS: Final = 16
"""Length of the answers that are timed."""


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
    on_progress: Progress = field(default=silent)

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

    def resplit(
        self,
        items: Sequence[Item],
        *,
        tiers: Mapping[str, TierPromise] = TIER_ALPHAS,
        delta: float = 0.1,
        times: int = 100,
    ) -> list[Resplits]:
        """Certify on random halves of what training left alone, and count the promises that the other half breaks."""
        training = {name: value for name, value in self._router.facts.training.items() if name == "seen"}
        tasks = self._bench.tasks(unseen(items, training, calibrating=False))
        walk = DialWalk.along(self._router, self._outputs(tasks), self._outcomes(tasks), self.on_progress)
        return resplit(walk, tiers, delta, times)

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
        results, classes = [], []
        for at, (name, some) in enumerate(whole.items()):
            subjects = self._subjects(some, chosen, seed)
            results.append(evaluate_set(name, replace(subjects, timings={} if at else timings)))
            classes += evaluate_classes(subjects, _classes(name, some) if name in tasks else _kinds(some))
        return Evaluation(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            device=self.model.device,
            router=f"{self._router.kind} {self._router.version}",
            point=next(iter(chosen)),
            sets=tuple(results),
            classes=tuple(classes),
            verdict=tuple(verdict(results, classes)),
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

    def _subjects(self, tasks: Sequence[Task], points: Mapping[str, float], seed: int) -> Subjects:
        return Subjects(
            router=self._router,
            points=points,
            outputs=self._outputs(tasks),
            outcomes=self._outcomes(tasks),
            static=list(dict.fromkeys([Program.identity(self.model.depth), *self._static()])),
            policy=self.model.policy,
            cost=self.model.decoder.cost,
            rerun=self._bench.again(tasks),
            seed=seed,
        )

    def _static(self) -> list[Program]:
        """Fixed programs that were measured in training."""
        return [Program.parse(one["program"]) for one in self._router.facts.training.get("static", ())]

    def _outcomes(self, tasks: Sequence[Task]) -> Outcomes:
        return self._bench.outcomes(tasks, [*self._router.programs, *self._static()])

    def _outputs(self, tasks: Sequence[Task]) -> Tensor:
        features = self._router.reader.stack([task.question.prompt for task in tasks])
        return self._router.outputs(features)

    def _timings(self, tasks: Sequence[Task], points: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Milliseconds per token of short answers at batch 1, and of the router per request; medians over prompts.

        Layers that the router reads and the request takes over are the request's, and not in the router's time.
        """
        asked = [_prompt_of(task.item) for task in tasks]
        systems = {"identity": 0.0, **{f"router ({name})": theta for name, theta in points.items()}}
        each: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for at, prompt in enumerate(asked):
            self.on_progress("timing", at, len(asked))
            tokens = self.model.prompt_tokens(prompt)
            for name, theta in systems.items():
                router = self._router.at(theta)
                begin = time.perf_counter_ns()
                answer = self.model.greedy_answers([prompt], max_tokens=_TIMED_TOKENS, router=router)[0]
                end = time.perf_counter_ns()
                each[name].append(((end - begin) / 1e6 / max(1, len(answer)), self._own_time(router, tokens)))
        return {name: (median(a for a, _ in some), median(b for _, b in some)) for name, some in each.items()}

    def _own_time(self, router: Router, tokens: Sequence[int]) -> float:
        """Milliseconds that a router takes for one prompt, without those of a lead."""
        begin = time.perf_counter_ns()
        lead = router.route(tokens).lead
        routed = time.perf_counter_ns()
        if lead is not None:
            run_lead(self.model.decoder, tokens, lead.layers)
        end = time.perf_counter_ns()
        return (routed - begin - (end - routed if lead else 0)) / 1e6


def _kinds(tasks: Sequence[Task]) -> dict[str, list[int]]:
    """Rows of choice questions and of prompts answered in text, where there are both."""
    found: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        found.setdefault("all choices" if isinstance(task.item, ChoiceItem) else "all texts", []).append(row)
    return found if len(found) > 1 else {}


def _classes(name: str, tasks: Sequence[Task]) -> dict[str, list[int]]:
    """Rows of each class of a set: all of it, and each task that its items name."""
    found = {name: list(range(len(tasks)))}
    for row, task in enumerate(tasks):
        if task.item.task is not None:
            found.setdefault(f"{name}/{task.item.task}", []).append(row)
    return found


def _prompt_of(item: Item) -> str:
    return item.question if isinstance(item, ChoiceItem) else item.prompt
