"""Calibrate and evaluate a router on a model: from items to a certificate, and to an evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import DataError, RouterError
from polar_sdk.lab.evaluation.calibrate import TIER_ALPHAS, DialWalk, Resplits, certify, count_facts, resplit
from polar_sdk.lab.evaluation.evaluate import Subjects, evaluate_classes, evaluate_set, evaluate_texts
from polar_sdk.lab.evaluation.results import Evaluation, verdict
from polar_sdk.lab.evaluation.text_answers import LENGTHS, FreeRunner, length_name
from polar_sdk.lab.items import ChoiceItem, builtin_items
from polar_sdk.lab.training.outcomes import Bench, grouped, id_prefixes, unseen
from polar_sdk.programs.program import Program
from polar_sdk.promises.novelty import Usual
from polar_sdk.router.certificate import FORMS, Setting, TierPromise, form_of
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.map_set import MapSet
from polar_sdk.router.store import find_router, map_folders, save_with_maps
from polar_sdk.show.progress import Progress, silent
from polar_sdk.usage import new_request_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.lab.evaluation.text_answers import TierTexts
    from polar_sdk.lab.items import Item
    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.lab.training.outcomes import Outcomes
    from polar_sdk.model import PolarModel
    from polar_sdk.router.base import Router
    from polar_sdk.router.certificate import Counts


_TIMED_TOKENS: Final = 16
"""Length of the answers that are timed."""


def calibrate(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    *,
    router: Router | str | Path | None = None,
    tiers: Mapping[str, TierPromise] | None = None,
    delta: float = 0.1,
    out: str | Path | None = None,
    on_progress: Progress = silent,
) -> LearnedRouter:
    """Certify what a router promises, on prompts it was not trained on.

    Args:
        model: The model.
        items: Prompts; None = the prompts that come with the package. What the router was trained on is left out.
        router: A trained router or its folder; None = this model's.
        tiers: What each tier is to promise; None = `TIER_ALPHAS`.
        delta: Maximum probability that a promise is wrong.
        out: Folder to write the certified router to; None = the folder `router`, where that is one.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        CalibrationSizeError: A tier's α needs more prompts.
        DataError: No unseen prompt is left, or the labels are of one class.
        RouterError: There is no learned router.
    """
    judge = Judge(model, find_router(router, model, look=False), on_progress=on_progress)
    certified = judge.calibrate(
        builtin_items() if items is None else items, tiers=TIER_ALPHAS if tiers is None else tiers, delta=delta
    )
    beside = Path(router) if isinstance(router, str | Path) else None
    if (target := beside if out is None else Path(out)) is not None:
        save_with_maps(certified, target, [] if beside is None else map(MapSet.load, map_folders(beside)))
    return certified


def evaluate(
    model: PolarModel,
    data: Sequence[Item] | Mapping[str, Sequence[Item]] | None = None,
    *,
    router: Router | str | Path | None = None,
    points: Mapping[str, Setting] | None = None,
    timed: int = 8,
    free: int = 0,
    seed: int = 0,
    on_progress: Progress = silent,
) -> Evaluation:
    """Measure a router beside identity and honest controls, on prompts it has not seen.

    Args:
        model: The model.
        data: Items, or several sets by name; None = the prompts that come with the package. What the router was
            trained or calibrated on is left out.
        router: A trained router or its folder; None = this model's.
        points: Settings of the dial by name; None = the certified tiers. The first is compared with the controls.
        timed: Prompts that are timed; 0 times none.
        free: Prompts that every tier also answers freely, for texts as a reader sees them.
        seed: Of the controls.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        DataError: There is no set, no unseen prompt is left, or the labels are of one class.
        RouterError: There is no learned router.
    """
    items = builtin_items() if data is None else data
    sets = items if isinstance(items, Mapping) else {"data": items}
    if not sets:
        raise DataError("there is no set to evaluate on; give at least one.")
    judge = Judge(model, find_router(router, model, look=False), on_progress=on_progress)
    return judge.evaluate(sets, points=points, timed=timed, free=free, seed=seed)


@dataclass
class Judge:
    """Calibrates and evaluates one learned router, or else the model's; rewards are kept on disk, or in another cache.

    Certificates also count right answers to the questions about `facts`; see `count_facts`. See `calibrate` and
    `evaluate`.
    """

    model: PolarModel
    router: Router | None = None
    cache: RewardCache | None = None
    on_progress: Progress = silent
    facts: Sequence[Item] = ()

    def __post_init__(self) -> None:
        router = self.router or self.model.router
        if not isinstance(router, LearnedRouter):
            what = "no router" if router is None else f"a router of kind {router.kind}, which has nothing to calibrate"
            raise RouterError(f"the model has {what}.", hint="Name a trained one, or train it with `polar lab train`.")
        self._router: LearnedRouter = router.bind(self.model.decoder, self.model.fingerprint)
        self._bench = Bench(self.model, self.on_progress, self.cache)

    def calibrate(
        self, items: Sequence[Item], *, tiers: Mapping[str, TierPromise] = TIER_ALPHAS, delta: float = 0.1
    ) -> LearnedRouter:
        """The router with a certificate made on these items, without those that it was trained on."""
        training = {name: value for name, value in self._router.facts.training.items() if name != "calibrated"}
        tasks = self._bench.tasks(unseen(items, training, calibrating=True))
        outputs = self._outputs(tasks)
        outcomes = self._outcomes(tasks, outputs, labels=True)
        certificate = certify(
            self._router,
            outputs,
            outcomes,
            tiers=tiers,
            delta=delta,
            facts=self._count_facts(tiers),
            on_progress=self.on_progress,
        )
        certificate = certificate.model_copy(update={"usual": self._usual(tasks)})
        training["calibrated"] = id_prefixes(task.id for task in tasks)
        return self._router.with_facts(training=training).with_certificate(certificate)

    def resplit(
        self,
        items: Sequence[Item],
        *,
        tiers: Mapping[str, TierPromise] = TIER_ALPHAS,
        delta: float = 0.1,
        times: int = 100,
    ) -> list[Resplits]:
        """Certify on random halves of the items that training did not use, and count the promises that then break."""
        training = {name: value for name, value in self._router.facts.training.items() if name == "seen"}
        tasks = self._bench.tasks(unseen(items, training, calibrating=False))
        outputs = self._outputs(tasks)
        outcomes, facts = self._outcomes(tasks, outputs, labels=True), self._count_facts(tiers)
        walk = DialWalk.along(self._router, outputs, outcomes, facts, self.on_progress)
        return resplit(walk, tiers, delta, times)

    def evaluate(
        self,
        sets: Mapping[str, Sequence[Item]],
        *,
        points: Mapping[str, Setting] | None = None,
        timed: int = 8,
        free: int = 0,
        seed: int = 0,
    ) -> Evaluation:
        """Evaluate on sets of items, and on all of them together."""
        settings = dict(points or self._points())
        training = self._router.facts.training
        tasks = {name: self._bench.tasks(unseen(items, training, calibrating=False)) for name, items in sets.items()}
        everything = list({task.id: task for of_set in tasks.values() for task in of_set}.values())
        whole = {"all": everything, **tasks} if len(tasks) > 1 else tasks
        timings = self._timings(everything[:: max(1, len(everything) // timed)][:timed], settings) if timed else {}
        results, classes = [], []
        texts: dict[str, TierTexts] = {}
        for index, (name, of_set) in enumerate(whole.items()):
            subjects = self._subjects(of_set, settings, seed)
            texts = self._texts(subjects, of_set, free) if index == 0 else texts
            results.append(evaluate_set(name, replace(subjects, timings={} if index else timings)))
            classes += evaluate_classes(subjects, _classes(name, of_set) if name in tasks else _kinds(of_set))
            classes += evaluate_classes(subjects, _lengths(of_set)) if index == 0 else []
        return Evaluation(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            device=self.model.device,
            router=f"{self._router.kind} {self._router.version}",
            point=next(iter(settings)),
            sets=tuple(results),
            classes=tuple(classes),
            texts=texts,
            verdict=tuple(verdict(results, classes)),
            certificate=self._router.certificate,
            certificate_holds=self._router.certified,
            training={name: value for name, value in training.items() if name not in ("seen", "calibrated")},
        )

    def _texts(self, subjects: Subjects, tasks: Sequence[Task], free: int) -> dict[str, TierTexts]:
        """The certified tiers and `exact` on the prompts answered in text; the points where there is no certificate."""
        certificate = self._router.certificate
        tiers = {} if certificate is None else {name: tier.setting for name, tier in certificate.tiers.items()}
        points = {**(tiers or subjects.points), "exact": Setting()}
        runs = evaluate_texts(subjects, points)
        sample = sorted((task for task in tasks if task.kind != "choice"), key=lambda task: task.id)[:free]
        runner = FreeRunner(self.model, self._router, self.on_progress)
        written = runner.figures(sample, points) if runs and sample else {}
        return {name: run.whole(written.get(name)) for name, run in runs.items()}

    def _points(self) -> dict[str, Setting]:
        """Settings of the certified tiers, the default tier first; the default θ where there are none."""
        certificate, default = self._router.certificate, self._router.facts.default_tier
        if certificate is None or not certificate.tiers:
            return {"uncalibrated": Setting.to(self._router.facts.default_theta)}
        order = sorted(certificate.tiers, key=lambda tier: tier != default)
        return {tier: certificate.tiers[tier].setting for tier in order}

    def _subjects(self, tasks: Sequence[Task], points: Mapping[str, Setting], seed: int) -> Subjects:
        outputs = self._outputs(tasks)
        outcomes = self._outcomes(tasks, outputs, labels=False)
        fixed = [program for program in self._static() if program in outcomes.matrix.programs]
        return Subjects(
            router=self._router,
            points=points,
            outputs=outputs,
            outcomes=outcomes,
            static=list(dict.fromkeys([Program.identity(self.model.depth), *fixed])),
            policy=self.model.policy,
            cost=self.model.decoder.cost,
            rerun=self._bench.again(tasks),
            seed=seed,
        )

    def _static(self) -> list[Program]:
        """The fixed programs that were measured in training."""
        return [Program.parse(row["program"]) for row in self._router.facts.training.get("static", ())]

    def _outcomes(self, tasks: Sequence[Task], outputs: Tensor, *, labels: bool) -> Outcomes:
        """Outcomes of the router's programs and of the fixed ones.

        The prompts of each form of answer are scored at once under all that is asked of them, since programs share what
        they begin with: the programs for every form here, and what the router chooses along its dial. Where all prompts
        are answered in text, programs that are never chosen are left out: on long prompts each of them would cost as
        much as half of all the rest.
        """
        every, dial = self._router.programs, self._router.facts.dial
        lengths = [len(task.question.prompt) for task in tasks]
        along = [self._router.choose_all(outputs, theta, lengths) for theta in dial]
        of_forms = grouped(range(len(tasks)), lambda row: form_of(tasks[row].kind))
        chosen = {form: dict.fromkeys(at[row] for at in along for row in rows) for form, rows in of_forms.items()}
        partial = {
            program for form in FORMS if form in chosen for program in {*every} - {*self._router.programs_for(form)}
        }
        programs = [program for program in (*every, *self._static()) if program not in partial]
        if [*chosen] == ["text"]:
            programs = [program for program in programs if program in chosen["text"]]
        for form, rows in of_forms.items():
            self._bench.matrix([tasks[row] for row in rows], [*programs, *chosen[form]], labels=False)
        return self._bench.outcomes(tasks, programs, labels=labels)

    def _count_facts(self, tiers: Mapping[str, TierPromise]) -> Counts | None:
        """Of the questions about facts, what is lost at each θ; None where there are none."""
        tasks = self._bench.tasks(self.facts)
        if not tasks:
            return None
        outputs = self._outputs(tasks)
        self._outcomes(tasks, outputs, labels=False)  # scored together, programs share what they begin with
        most = max((TierPromise(*promised).alpha for promised in tiers.values()), default=0.0)
        return count_facts(self._router, outputs, self._bench.outcomes(tasks, ()), most)

    def _outputs(self, tasks: Sequence[Task]) -> Tensor:
        """What is decided on."""
        chooses = [isinstance(task.item, ChoiceItem) for task in tasks]
        return self._router.allowed_each(self._router.outputs(self._features(tasks)), chooses)

    def _features(self, tasks: Sequence[Task]) -> Tensor:
        return self._router.reader.stack([task.question.prompt for task in tasks])

    def _usual(self, tasks: Sequence[Task]) -> dict[str, Usual]:
        """Where the prompts of each kind fall among what the router knows."""
        likeness = self._router.likeness(self._features(tasks))
        kinds = grouped(range(len(tasks)), lambda row: tasks[row].kind)
        return {kind: Usual.of([likeness[row] for row in rows], self._router.centres) for kind, rows in kinds.items()}

    def _timings(self, tasks: Sequence[Task], points: Mapping[str, Setting]) -> dict[str, tuple[float, float]]:
        """Milliseconds per token of short answers at batch 1, and of the router per request; medians over prompts.

        No run shares a prefix with another one, and each system comes first, second and so on in turn.
        """
        items = [task.item for task in tasks]
        prompts = [item.question if isinstance(item, ChoiceItem) else item.prompt for item in items]
        systems = {"identity": Setting(), **{f"router ({name})": setting for name, setting in points.items()}}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for done, prompt in enumerate(prompts):
            self.on_progress("timing", done, len(prompts))
            tokens = self.model.prompt_tokens(prompt)
            turn = done % len(systems)
            for name in [*systems][turn:] + [*systems][:turn]:
                router, alone = self._router.at(systems[name]), f"timing {new_request_id()}"
                begin = time.perf_counter_ns()
                (answer,) = self.model.greedy_answers([prompt], max_tokens=_TIMED_TOKENS, router=router, tenant=alone)
                end = time.perf_counter_ns()
                router.route(tokens)
                routed = time.perf_counter_ns()
                times[name].append(((end - begin) / 1e6 / max(1, len(answer)), (routed - end) / 1e6))
        return {
            name: (median(per_token for per_token, _ in pairs), median(own for _, own in pairs))
            for name, pairs in times.items()
        }


def _kinds(tasks: Sequence[Task]) -> dict[str, list[int]]:
    """Rows of choice questions and of prompts answered in text, where there are both."""
    kinds = grouped(range(len(tasks)), lambda row: "all choices" if tasks[row].kind == "choice" else "all texts")
    return kinds if len(kinds) > 1 else {}


def _lengths(tasks: Sequence[Task]) -> dict[str, list[int]]:
    """Rows of prompts answered in text, by length, where there are several lengths."""
    written = [row for row, task in enumerate(tasks) if task.kind != "choice"]
    found = grouped(written, lambda row: length_name(len(tasks[row].question.prompt)))
    if len(found) < 2:
        return {}
    return {f"texts {name.replace('_', ' ')}": found[name] for name in LENGTHS if name in found}


def _classes(name: str, tasks: Sequence[Task]) -> dict[str, list[int]]:
    """Rows of each class of a set: all of it, and each task that its items name."""
    named = grouped(range(len(tasks)), lambda row: tasks[row].item.task)
    return {name: list(range(len(tasks))), **{f"{name}/{task}": rows for task, rows in named.items()}}
