"""Fit: from a model to its own certified router, which is used whenever the model is loaded from then on.

The steps: measure the pace and plan; fit maps that fill a prompt's upper layers, of several cuts at once; measure the
programs; if there is time, train the maps of those that decide what the tiers save, and measure those again; keep those
that no other beats; train a router that has a program for each kind of prompt; certify it; evaluate it on unseen
prompts; register it. Every step keeps its work in a folder that belongs to the model, the prompts and the settings, so
that the same call resumes where it stopped. Knows the steps; each is done by the lab.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import BaseModel

from polar_sdk.engine import engine_version
from polar_sdk.errors import DataError
from polar_sdk.lab.checkpoint import run_key
from polar_sdk.lab.evaluation.calibrate import check_answered
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.evaluation.rendering import require_report, to_html
from polar_sdk.lab.fit.frontier import near, undominated
from polar_sdk.lab.fit.plan import SHARES, Plan, make_plan, measure_pace, workload_of
from polar_sdk.lab.fit.prompts import fact_items, prompts_of, worded
from polar_sdk.lab.fit.summary import CHOICES, TEXTS, figures, tiers_in_words
from polar_sdk.lab.healing.fills import DEFAULT
from polar_sdk.lab.healing.heal import heal
from polar_sdk.lab.items import ChoiceItem, Shares, data_hash, item_id, kind_of, split_of
from polar_sdk.lab.program_search.matrix import RewardMatrix, measured_matrix
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.lab.training.examples import harder_kinds
from polar_sdk.lab.training.menu_training import MenuSettings
from polar_sdk.lab.training.outcomes import Bench, id_prefixes
from polar_sdk.lab.training.train import train
from polar_sdk.models.paths import cache_folder, disk_errors
from polar_sdk.programs.program import Program
from polar_sdk.reading import read_document
from polar_sdk.router.artifact import load_router
from polar_sdk.router.certificate import FORMS, TierPromise, form_of
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.map_set import MapSet
from polar_sdk.router.store import map_folders, save_with_maps, saved_router_path
from polar_sdk.show.progress import Progress, silent
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.lab.items import Item, PromptKind, Split
    from polar_sdk.model import PolarModel
    from polar_sdk.router.certificate import AnswerForm, Certificate, Loss

PROMISES: Final[dict[str, TierPromise]] = {
    "economy": TierPromise(0.05, strict=0.4),
    "standard": TierPromise(0.025, strict=0.25),
    "premium": TierPromise(0.01, strict=0.1),
}
"""Promises of tiers by default; what the prompts are too few for is left out. Where there are questions with
choices, of which right answers are known, the loss is `drops`: of these, right answers count."""
_OF_RIGHT: Final = ("harms", "drops")
"""Losses that count right answers."""
_DELTA: Final = 0.1
_HALVES: Final = Shares(0.6, 0.4, 0.0, 0.0)
"""Shares of the prompts that the menu is chosen on: to train the router on, and to choose by."""
_FEWEST: Final = 8
"""Prompts that each split must have."""
_USED: Final = 0.04
"""Share of the prompts of a tier from which a program is worth its maps."""
_WIDEST: Final = 2
"""Where a router's dial ends, as a multiple of the widest promise."""


class FitFacts(BaseModel, frozen=True):
    """The facts of a fit, as its folder keeps them."""

    key: str
    """Hash of the model, the engine, the prompts and the settings."""
    plan_key: str
    """The same without the promises, on which no plan and no map depends."""
    model: str
    fingerprint: str
    dtype: str
    plan: Plan
    sentences: tuple[str, ...] = ()
    """The result in words; empty until it is done."""
    figures: dict[str, Any] = {}
    """By tier: FLOPs saved and tokens kept, of all test prompts and by length."""


@dataclass(frozen=True)
class FitResult:
    """A finished fit.

    Attributes:
        folder: Of its files: `fit.json`, `router/`, `evaluation.json`, `fit.html`.
        facts: What is stored about it.
        registered: Folder of the registered router; None if nothing could be promised.
    """

    folder: Path
    facts: FitFacts
    registered: Path | None


def fit_folder(fingerprint: str, dtype: str) -> Path:
    """Default folder of the fits of a model in a precision."""
    return cache_folder() / "fits" / f"{fingerprint[:24]}-{dtype}"


def fit(
    model: PolarModel,
    data: Sequence[Item] | None = None,
    *,
    hours: float = 1.0,
    promises: Mapping[str, TierPromise] | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    distil: int | None = None,
    seed: int = 0,
    on_plan: Callable[[Plan], None] = lambda _: None,
    on_progress: Progress = silent,
) -> FitResult:
    """Make a certified router for a model, and register it for everyone who loads the model.

    An interrupted fit resumes where it stopped; a finished one is returned unchanged.

    Args:
        model: The model, in the precision that it is to serve in.
        data: Prompts like those that it will be asked; None = the package's own, by kind and length.
        hours: Time that the plan must fit in, on this machine.
        promises: What each tier is to promise; None = see `PROMISES`.
        out: Folder of the work; None = one in the cache, see `fit_folder`.
        limit: Maximum prompts, whatever the hours allow.
        distil: Training steps of the maps after their closed form; None = as many as the hours allow.
        seed: Of the training of maps.
        on_plan: Called with the plan before the work begins.
        on_progress: Called with (stage, steps done, steps in all).

    Raises:
        DataError: Prompts or hours are too few, or the folder holds another fit.
        MissingExtraError: The extra `report` is not installed, which the page needs.
    """
    require_report()
    folder = fit_folder(model.fingerprint, model.dtype) if out is None else Path(out)
    with disk_errors(), RewardCache(cache_path(model.fingerprint, model.dtype)) as cache:
        right = promises is not None and any(promise.loss in _OF_RIGHT for promise in promises.values())
        items = prompts_of(data, limit, right=right)
        asked = dict(_usual_promises(items) if promises is None else promises)
        work = _Work(model, items, hours, asked, folder, distil, seed, cache, on_progress)
        return work.run(on_plan)


@dataclass
class _Work:
    """One fit in its folder; see `fit`."""

    model: PolarModel
    items: list[Item]
    hours: float
    promises: dict[str, TierPromise]
    folder: Path
    distil: int | None
    seed: int
    cache: RewardCache
    on_progress: Progress
    facts: Sequence[Item] = ()
    """Questions whose right answers the certificate counts."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what is not possible."""

    def run(self, on_plan: Callable[[Plan], None]) -> FitResult:
        """All steps."""
        facts = self._begin()
        on_plan(facts.plan)
        if facts.sentences:
            kept = saved_router_path(self.model.fingerprint, self.model.dtype)
            return FitResult(self.folder, facts, kept if (kept / "router.json").is_file() else None)
        self.items = self.items[: facts.plan.prompts]
        tiers = self._possible()
        self.facts = fact_items(facts.plan.facts)
        fills = self._fills(facts.plan, tiers)
        certified = self._chosen(self._matrix(fills.programs), tiers)
        evaluation = Judge(self.model, certified, self.cache, self.on_progress).evaluate(self._test_sets())
        assert certified.certificate is not None
        sentences = self._sentences(certified.certificate, evaluation)
        self._write_file("evaluation.json", json.dumps(evaluation.plain(), indent=2) + "\n")
        self._write_file("fit.html", to_html(evaluation, [*sentences, *facts.plan.lines[:2]]))
        registered = self._register(certified)
        facts = facts.model_copy(update={"sentences": tuple(sentences), "figures": figures(evaluation)})
        self._write(facts)
        return FitResult(self.folder, facts, registered)

    def _begin(self) -> FitFacts:
        """The plan that this fit began with, or else a new one.

        Raises:
            DataError: The folder holds something else.
        """
        model, path = self.model, self.folder / "fit.json"
        engine, data = engine_version(model.dtype), data_hash(self.items)
        plan_key = run_key(model.fingerprint, model.dtype, engine, data, self.hours, self.distil, self.seed)
        key = run_key(plan_key, self.promises)
        if path.is_file():
            found = read_document(path, FitFacts, lambda reason: DataError(f"{str(path)!r} {reason}; remove it."))
            if found.fingerprint != model.fingerprint:
                raise DataError(
                    f"{str(self.folder)!r} holds the fit of another model, {found.model} in {found.dtype}; give "
                    "another folder, or remove it."
                )
            if found.key == key:
                return found
            if found.plan_key == plan_key:
                facts = found.model_copy(update={"key": key, "sentences": (), "figures": {}})
                self._write(facts)
                return facts
            raise DataError(
                f"{str(self.folder)!r} holds a fit of this model with other prompts or settings "
                f"({found.plan.prompts:,} prompts, {found.plan.hours:g} hours); give another folder, or remove it."
            )
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise DataError(f"{str(self.folder)!r} is not empty and contains no fit; give another folder.")
        pace = measure_pace(model, self.items, self.on_progress)
        plan = make_plan(model, workload_of(model, self.items), pace, self.hours, self.distil)
        facts = FitFacts(
            key=key, plan_key=plan_key, model=model.name, fingerprint=model.fingerprint, dtype=model.dtype, plan=plan
        )
        self._write(facts)
        return facts

    def _write(self, facts: FitFacts) -> None:
        self._write_file("fit.json", facts.model_dump_json(indent=2) + "\n")

    def _write_file(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as draft:
            draft.write_text(text, encoding="utf-8")

    def _of(self, *splits: Split) -> list[Item]:
        return [item for item in self.items if split_of(item_id(item), SHARES) in splits]

    def _test_sets(self) -> dict[str, list[Item]]:
        """The test prompts that are answered in text, and the questions with choices."""
        sets: dict[str, list[Item]] = {TEXTS: [], CHOICES: []}
        for item in self._of("test"):
            sets[CHOICES if isinstance(item, ChoiceItem) else TEXTS].append(item)
        return {name: items for name, items in sets.items() if items}

    def _possible(self) -> dict[str, TierPromise]:
        """The promises that the calibration prompts of a form of answer are enough for.

        Raises:
            DataError: They are enough for none, or lack the right answers that one counts.
        """
        for split, use in _USES.items():
            if (left := len(self._of(split))) < _FEWEST:
                raise DataError(
                    f"{len(self.items)} prompts are too few to be split: {left} are left {use}, and {_FEWEST} are "
                    "needed; give more prompts."
                )
        kinds = [kind_of(item) for item in self._of("calibration")]
        check_answered(self.promises, [kind != "prompt" for kind in kinds])
        counts, possible = Counter(kinds), {}
        fewest: dict[str, dict[PromptKind, int]] = {}
        for tier, promise in self.promises.items():
            fewest[tier] = {kind: promise.fewest(kind, _DELTA) for kind in counts}
            lacking = {kind: n for kind, n in fewest[tier].items() if counts[kind] < n}
            short = {*map(form_of, lacking)}
            if any(form_of(kind) not in short for kind in counts):
                possible[tier] = promise
            if lacking:
                of_form = f" for {' and '.join(FORMS[form] for form in short)}" if tier in possible else ""
                each = " and ".join(f"{n} {_OF_KIND[kind]} (there are {counts[kind]})" for kind, n in lacking.items())
                self.notes.append(f"No {tier}{of_form}: to calibrate its promise takes {each}.")
        if not possible:
            easiest = min(fewest.values(), key=lambda each: sum(each.values()))
            least = " and ".join(f"{n} {_OF_KIND[kind]}" for kind, n in easiest.items())
            in_all = max(n / counts[kind] for kind, n in easiest.items()) * len(self.items)
            raise DataError(
                f"{len(self.items)} prompts are too few for any promise: {least} must be left for calibration, some "
                f"{in_all:.0f} prompts like these in all; give more prompts, or more hours."
            )
        return possible

    def _fills(self, plan: Plan, tiers: dict[str, TierPromise]) -> MapSet:
        """The fills of all cuts in closed form; where there is time, trained ones of those that decide the tiers."""
        cuts = ",".join([*map(str, plan.cuts), *([DEFAULT] if plan.seek else [])])
        if not plan.distil:
            return self._heal("fills", cuts)
        closed = self._heal("closed", cuts)
        texts, most = self._measured("text", closed.programs), max(promise.alpha for promise in tiers.values())
        deciding = near(texts, tiers.values(), self._facts_lost(closed.programs, most))
        cuts = ",".join("+".join(f"{first}-{last}" for first, last in program.fills) for program in deciding)
        trained = self._heal("trained", cuts, distil=plan.distil, start=str(self.folder / "closed"))
        return self.model.use_maps(trained.over(closed).save(self.folder / "fills"))

    def _facts_lost(self, programs: Sequence[Program], most: float) -> dict[Program, float]:
        """The share of facts that each program loses, by half of the questions; 1 where a deeper one loses too many."""
        bench = Bench(self.model, self.on_progress, self.cache)
        tasks = bench.tasks(self.facts[::2])
        if not tasks:
            return {}
        scored = bench.matrix(tasks, programs, labels=False)  # together, programs share what they begin with
        flops = dict(zip(scored.programs, scored.flops.double().sum(0).tolist(), strict=True))
        outcomes, lost = bench.outcomes(tasks, ()), dict.fromkeys(programs, 1.0)
        for program in sorted(programs, key=flops.__getitem__, reverse=True):
            lost[program] = fmean(outcomes.losses(range(len(tasks)), [program] * len(tasks), "drops"))
            if lost[program] > most:
                break
        return lost

    def _heal(self, name: str, cuts: str, **options: Any) -> MapSet:
        """The fills of some cuts in a folder."""
        out = self.folder / name
        if (out / "maps.json").is_file():
            return self.model.use_maps(out)
        return heal(
            self.model,
            self._of("train", "dev"),
            cuts,
            kind="fill",
            out=out,
            cache=self.cache,
            shares=SHARES,
            on_progress=self.on_progress,
            prompts=len(self.items),
            ridge=1e-4,
            seed=self.seed,
            **options,
        )

    def _chosen(self, matrix: RewardMatrix, tiers: dict[str, TierPromise]) -> LearnedRouter:
        """A certified router with a program for each kind of prompt; see `table_training`."""
        harder = harder_kinds(matrix)
        certified = self._certified(self._trained(matrix, tiers, harder), tiers)
        kinds: dict[str, int] = certified.facts.training["kinds"]
        told = sorted((kind for kind in kinds if kind != "choice"), key=lambda kind: -kinds[kind])
        if len(told) == 1:
            self.notes.append("Each tier runs one program for every prompt that is answered in text.")
        else:
            own = " and ".join(map(repr, told[1:]))
            self.notes.append(f"Prompts recognised as {own} run programs of their own.")
        used = self._used(certified)
        kept = [place for place, program in enumerate(matrix.programs) if place == 0 or program in used]
        if 1 < len(kept) < len(matrix.programs):  # the maps of other programs would only be carried along
            certified = self._certified(self._trained(matrix.only(kept), tiers, harder), tiers)
        return certified

    def _trained(self, matrix: RewardMatrix, tiers: dict[str, TierPromise], harder: list[str]) -> LearnedRouter:
        """A router over the programs of a matrix, bound to the model; which kinds are harder, more programs tell."""
        loss: Loss = "drops" if bool(matrix.labelled.any()) else "differs"
        ratios = [promise.alpha / promise.strict for promise in tiers.values() if promise.strict]
        settings = MenuSettings(
            loss=loss,
            strict=fmean(ratios) if ratios else 0.0,  # a text of which a few words are lost counts a tenth
            own_length=False,
            least=max(0.05, 1 - _WIDEST * max(promise.alpha for promise in tiers.values())),
            most=max(promise.alpha for promise in tiers.values()),
        )
        router = train(
            self.model,
            matrix,
            kind="table",
            items=self._of("train"),
            wordings=worded(self._of("train")),
            settings=settings,
            out=self.folder / "table",
            maps=self.folder / "fills",
            on_progress=self.on_progress,
        )
        seen = id_prefixes(item_id(item) for item in self._of("train", "dev"))
        router = router.with_facts(training={**router.facts.training, "seen": seen, "harder": harder})
        return router.bind(self.model.decoder, self.model.fingerprint)

    def _used(self, router: LearnedRouter) -> set[Program]:
        """The programs that a tier runs for more than a few of the prompts."""
        assert router.certificate is not None
        tasks = make_tasks(self.model, self._of("dev"), self.cache, on_progress=self.on_progress)
        prompts = [task.question.prompt for task in tasks]
        forms = [form_of(task.kind) for task in tasks]
        read = router.outputs(router.reader.stack(prompts).cpu())
        outputs = router.allowed_each(read, [form == "choice" for form in forms])
        lengths = list(map(len, prompts))
        used: set[Program] = set()
        for promise in router.certificate.tiers.values():
            thetas = [promise.setting.of(form) for form in forms]
            counts = Counter(router.choose_all(outputs, torch.tensor(thetas, dtype=torch.float64), lengths))
            used.update(program for program, count in counts.items() if count >= _USED * len(prompts))
        return used

    def _matrix(self, programs: Sequence[Program]) -> RewardMatrix:
        """What these programs do on texts, and on choices with a tail of one token, too, unless another beats them."""
        texts = undominated(self._measured("text", programs))
        if not self._dev("choice"):
            return texts
        short = [Program.filling(self.model.depth, program.fills) for program in programs]
        choices = undominated(self._measured("choice", [*programs, *short]))
        return texts.beside(choices, data_hash(self._of("dev")))

    def _dev(self, form: AnswerForm) -> list[Item]:
        """The prompts that programs are measured on that are answered in this form."""
        return [item for item in self._of("dev") if form_of(kind_of(item)) == form]

    def _measured(self, form: AnswerForm, programs: Sequence[Program]) -> RewardMatrix:
        tasks = make_tasks(self.model, self._dev(form), self.cache, on_progress=self.on_progress)
        return measured_matrix(
            Measurer(self.model, self.cache, self.on_progress),
            tasks,
            [Program.identity(self.model.depth), *programs],
            splits=[split_of(task.id, _HALVES, seed=1) for task in tasks],
            data=data_hash(task.item for task in tasks),
            stage="measuring programs",
        )

    def _certified(self, router: LearnedRouter, tiers: dict[str, TierPromise]) -> LearnedRouter:
        out = self.folder / "router"
        if (out / "router.json").is_file():
            found = load_router(out)
            if isinstance(found, LearnedRouter) and found.version == router.version and found.certificate is not None:
                promised = {tier: promise.asked for tier, promise in found.certificate.tiers.items()}
                if promised == tiers:
                    return found.bind(self.model.decoder, self.model.fingerprint)
        judge = Judge(self.model, router, self.cache, self.on_progress, self.facts)
        certified = judge.calibrate(self._of("calibration"), tiers=tiers, delta=_DELTA)
        save_with_maps(certified, out, [MapSet.load(self.folder / "fills")])
        return certified

    def _register(self, router: LearnedRouter) -> Path | None:
        """Make the router the model's own; None where every tier runs full depth."""
        assert router.certificate is not None
        if all(promise.setting.runs_identity for promise in router.certificate.tiers.values()):
            return None
        target = saved_router_path(self.model.fingerprint, self.model.dtype)
        shutil.rmtree(target, ignore_errors=True)
        save_with_maps(router, target, map(MapSet.load, map_folders(self.folder / "router")))
        return target

    def _sentences(self, certificate: Certificate, evaluation: Evaluation) -> list[str]:
        """Say what each tier saves and promises, on what, and what was not possible."""
        exact = evaluation.texts.get("exact")
        floor = "" if exact is None else f"; full depth against itself keeps {exact.noise_floor:.1%}"
        if not self.facts:
            self.notes.append("Right answers about long notes did not count: that takes more hours or more context.")
        numbers = {split: len(self._of(split)) for split in _USES}
        splits = ", ".join(f"{numbers[split]} {use}" for split, use in _USES.items())
        kinds = len({item.task for item in self.items})
        return [
            *tiers_in_words(certificate, evaluation),
            f"Measured on {len(self.items)} prompts of {kinds} kinds ({splits}), {self.model.name} in "
            f"{self.model.dtype}{floor}. Promises hold with {1 - _DELTA:.0%} confidence, for prompts like these.",
            " ".join(self.notes) or "Everything requested was possible.",
        ]


def _usual_promises(items: Iterable[Item]) -> dict[str, TierPromise]:
    choices = any(isinstance(item, ChoiceItem) for item in items)
    return {tier: promise._replace(loss="drops") if choices else promise for tier, promise in PROMISES.items()}


_OF_KIND: Final[dict[PromptKind, str]] = {
    "prompt": "prompts that are answered in text",
    "answer": "prompts whose right answer is known",
    "choice": "questions with choices",
}
_USES: Final[dict[Split, str]] = {
    "train": "to fit maps on",
    "dev": "to choose programs by",
    "calibration": "for the promises",
    "test": "for these figures",
}
