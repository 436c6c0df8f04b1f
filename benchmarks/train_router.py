"""Make the shipped router: heal, measure, train, calibrate, evaluate. `make router` runs it for the default model.

Questions with choices are the JSONL sets in the folder POLAR_DATA that `--sets` names; prompts answered in text are
those of `router_texts`, by kind. Bridges are tuned to the right choices; fills are fitted and distilled on texts,
without labels. The menu is the one that ships, unless `--programs search` asks for a search. Every stage keeps its
work, so that the same command resumes after Ctrl-C.

The router is trained, certified and evaluated once per seed, and the best on dev ships. The measurements, with
`--epochs 3` of the article's router too, are printed and written beside the work; the figures of what ships go to
`--results`, and the artifact, of at most 12 MB, to `--out`.

`--shipped` trains nothing: it measures the router in `--out` again on the questions with choices.

Tuned bridges have seen the questions of the train split, so that programs do not behave there as on new questions. So a
router learns about choices from the dev split. Texts that fills were fitted on take no further part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.results import RESULTS, Recorder
from benchmarks.router_seeds import record_choices, record_router, record_seeds
from benchmarks.router_texts import COMPARISONS, FITTED, PER_TASK, ROUTED, route_texts, texts
from polar_sdk import PolarModel, lab
from polar_sdk.engine import engine_version
from polar_sdk.lab.checkpoint import run_key
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.evaluation.rendering import to_html
from polar_sdk.lab.items import (
    AnswerItem,
    ChoiceItem,
    PromptItem,
    Shares,
    data_hash,
    distinct_items,
    item_id,
    read_items,
    split_of,
)
from polar_sdk.lab.program_search.matrix import measured_matrix
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.lab.training.layerwise_training import LayerwiseSettings
from polar_sdk.lab.training.menu_training import MenuSettings
from polar_sdk.lab.training.outcomes import id_prefixes
from polar_sdk.programs.floors import TIERS
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import save_router
from polar_sdk.router.certificate import TierPromise
from polar_sdk.router.map_set import MapSet, stored
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.lab.items import Item, Split
    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.router.certificate import Loss
    from polar_sdk.router.learned import LearnedRouter
    from polar_sdk.router.network import FeatureKind

SHIPPED = Path(__file__).parents[1] / "polar_sdk" / "shipped" / "routers" / "smollm2-135m-instruct"
MAX_BYTES = 12_000_000
HEAL_SETS = "arc_easy.train,arc_challenge.train,openbookqa.train,mmlu.test-open:2400"
SETS = "arc_easy.train,arc_challenge.train,openbookqa.train"
CUTS = "27,24,23,20-21+23,18-21+23,14-15+18-21+23,12-15+18-21+23"
"""Segments of the shipped router's fills. Layers 16, 17 and 22 do what no map can (`polar lab heal --fills`)."""
MENU = (
    "0-26 (27-29);0-23 (24-29:16);0-22 (23-29:16);0-19 (20-21:16) 22 (23-29:16);0-17 (18-21:16) 22 (23-29:16);"
    "0-13 (14-15:16) 16-17 (18-21:16) 22 (23-29:16);0-11 (12-15:16) 16-17 (18-21:16) 22 (23-29:16);"
    "0-11 [12-20] 21-29;0-11 [12-20] 21 [22-26] 27-29;0-11 [12-20] 21-23 (24-29);0-11 [12-20] 21-22 (23-29)"
)
"""The shipped menu: three cuts, from which layers are filled, and four programs that spare layers within; and bridges
for choices, alone and with fills.

The last 16 tokens of a prompt, mostly its question, run all layers: that takes a tenth to a third off the divergence of
long prompts, for 3 % of what is saved on them.
"""
SEARCH = "search"
HALVES = Shares(0.6, 0.4, 0.0, 0.0)
"""Shares of the dev split of choices: to train on, and to choose by."""
MAIN = "menu-ending"
"""The router that is trained for every seed of the bridges, of which the best on dev ships.
"""
OTHERS: dict[str, FeatureKind] = {"static": "ending", "menu-embedding": "embedding"}
"""Routers that are trained once, for comparison, and what they read."""
FREE = 60
"""Prompts of the test split that every tier of what may ship also answers freely."""


@dataclass
class Work:
    """All stages, with every seed of the router.

    Attributes:
        model: The model.
        options: Of the command line.
        sets: Prompts by the name of their set.
        fitted: The texts that the fills are fitted on.
        folder: Of the work.
        show: Progress.
    """

    model: PolarModel
    options: argparse.Namespace
    sets: dict[str, list[Item]]
    fitted: list[Item]
    folder: Path
    show: ProgressBars

    @property
    def items(self) -> list[Item]:
        """All prompts, without the right texts: those are compared with what is written freely, and train nothing."""
        return [_unanswered(item) for items in self.sets.values() for item in items]

    def run(self, others: Sequence[str]) -> tuple[Path, list[Path]]:
        """Run all stages; returns the folder of the router to ship, and those of the main router, one per seed."""
        self.heal()
        matrix = self.search()
        mains = [f"{MAIN}-{seed}" for seed in _seeds(self.options.seeds)]
        facts = {name: self.make(name, matrix) for name in [*mains, *others]}
        best = max(mains, key=lambda name: float(facts[name]["utility"]))
        saved = {name: self._saved(name) for name in facts}
        routed = saved[best] > saved.get("static", 0.0)
        if not routed:
            given = f"{saved['static']:.1%} at these promises, and the router {saved[best]:.1%}"
            print(f"static programs save {given}: they ship")
        return self.folder / (best if routed else "static"), [self.folder / name for name in mains]

    def make(self, name: str, matrix: RewardMatrix) -> dict[str, Any]:
        """Train, certify and evaluate one router, unless that is done already for the same data and settings."""
        tiers = _tiers(self.options.tier, "drops" if self.labelled else "differs")
        mark = self.folder / f"{name}.done.json"
        settings = self._layerwise if name == "policy" else self._menu(name)
        version = engine_version(self.model.dtype)
        key = run_key(matrix.data, matrix.bridges, matrix.programs, settings, tiers, version)
        if mark.is_file() and (done := json.loads(mark.read_text(encoding="utf-8")))["key"] == key:
            return dict(done)
        router = self.train(name, matrix)
        certified = lab.calibrate(self.model, self.items, router=self.folder / name, tiers=tiers, on_progress=self.show)
        if self.options.resplits and name != "policy":  # it runs many programs, none of them in the matrix
            self.resplit(name, certified, tiers)
        self.evaluate(name)
        done = {"key": key, "utility": router.facts.training["utility"]}
        mark.write_text(json.dumps(done) + "\n", encoding="utf-8")
        return done

    def _saved(self, name: str) -> float:
        """Share of FLOPs that the default tier of a router saves on the test prompts: what its promises are worth."""
        return float(json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))["flops_saved"])

    @property
    def labelled(self) -> bool:
        """Whether right choices are known for some prompts."""
        return any(isinstance(item, ChoiceItem) for item in self.items)

    def heal(self) -> None:
        """Fit the bridges and the fills that are not fitted yet."""
        chosen = self.options
        if healed := self._healed():
            tuned = {"distil": chosen.tune, "labels": chosen.labels, "choices": chosen.choices, "rate": chosen.rate}
            self._fit("bridge", healed, chosen.segments, "bridges-float32", **tuned, seed=chosen.bridge_seed)
            self.model.use_maps(self._bridges())
        self._fit("fill", self.fitted, chosen.cuts, "fills", distil=chosen.distil, rate=chosen.fill_rate)
        self.model.use_maps(self.folder / "fills")

    def _fit(self, kind: Literal["bridge", "fill"], items: Sequence[Item], layers: str, out: str, **how: Any) -> None:
        """Fit maps in float32, which processors without bfloat16 tiles multiply twice as fast."""
        folder = self.folder / out
        if (folder / "maps.json").is_file():
            return
        exact = PolarModel.from_pretrained(self.options.model, precision="fp32", ledger=None)
        with RewardCache(cache_path(exact.fingerprint, exact.dtype)) as cache:
            lab.heal(exact, items, layers, kind=kind, out=folder, cache=cache, on_progress=self.show, **how)

    def _bridges(self) -> Path:
        """Folder of the bridges in the precision that the router serves in."""
        out, decoder = self.folder / "bridges", self.model.decoder
        if not (out / "maps.json").is_file():
            exact = MapSet.load(self.folder / "bridges-float32")
            bridges = {segment: one.to(decoder.dtype, decoder.device) for segment, one in exact.bridges.items()}
            MapSet(exact.facts.model_copy(update={"dtype": self.model.dtype}), stored(bridges, "exact")).save(out)
        return out

    def search(self) -> RewardMatrix:
        """Search the menu, or take the one in the options; prompts in the cache are not measured again."""
        if self.options.programs != SEARCH:
            return self._measure([Program.parse(text) for text in self.options.programs.split(";")])
        with RewardCache(cache_path(self.model.fingerprint, self.model.dtype)) as cache:
            result = lab.search(
                self.model,
                self.items,
                programs=MapSet.load(self.folder / "fills").programs,
                cache=cache,
                on_progress=self.show,
                budgets=tuple(map(float, self.options.budgets.split(","))),
                menu=self.options.menu,
                prompts=self.options.prompts,
                train=self.options.train,
                population=self.options.population,
                generations=self.options.generations,
            )
        result.save(self.folder / "menu.json")
        return result.matrix

    def _measure(self, programs: list[Program]) -> RewardMatrix:
        """The matrix of a given menu, on all prompts that show how it does on new ones."""
        with RewardCache(cache_path(self.model.fingerprint, self.model.dtype)) as cache:
            tasks = make_tasks(self.model, distinct_items(self.items), cache, on_progress=self.show)
            split = {task.id: self._split(task) for task in tasks}
            drawn = sorted(task.id for task in tasks if split[task.id] == "train")
            left_out = {*drawn[self.options.train :], *(item for item, name in split.items() if name is None)}
            kept = [(task, split[task.id]) for task in tasks if task.id not in left_out]
            return measured_matrix(
                Measurer(self.model, cache, self.show),
                [task for task, _ in kept],
                [Program.identity(self.model.depth), *programs],
                splits=[name for _, name in kept if name is not None],
                data=data_hash(task.item for task, _ in kept),
                write_tokens=None,
            )

    def _split(self, task: Task) -> Split | None:
        """The split that a prompt counts as; None = it is not used, as the bridges were tuned to its right choice."""
        split = split_of(task.id)
        if not (self.options.tune and isinstance(task.item, ChoiceItem)) or split in ("calibration", "test"):
            return split
        return None if split == "train" else split_of(task.id, HALVES, seed=1)

    def _menu(self, name: str) -> MenuSettings:
        """Settings of a menu router; the main one has a seed of its own in its name."""
        seeds = _seeds(self.options.seeds)
        return MenuSettings(
            steps=self.options.steps,
            seeds=(int(name.rsplit("-", 1)[1]),) if name.startswith(f"{MAIN}-") else seeds,
            loss="drops" if self.labelled else "differs",
            strict=1.0,
            hidden=((64,),),  # a linear head cannot tell that a program serves one kind of prompt and ruins another
            penalties=(0.3, 1.0, 3.0),
            risks=(0.05, 0.15, 0.3),
            least=self.options.least,
        )

    @property
    def _layerwise(self) -> LayerwiseSettings:
        return LayerwiseSettings(epochs=self.options.epochs, price=self.options.price)

    def train(self, name: str, matrix: RewardMatrix) -> LearnedRouter:
        """Train a menu router on one kind of features, one that reads nothing, or the article's router."""
        kind = name.partition("-")[0]
        router = lab.train(
            self.model,
            matrix,
            kind=kind,  # type: ignore[arg-type]
            items=self.items,
            features=OTHERS.get(name, "ending"),
            settings=self._layerwise if kind == "policy" else self._menu(name),
            out=self.folder / name,
            maps=[folder for name in ("bridges", "fills") if (folder := self.folder / name).is_dir()],
            on_progress=self.show,
        )
        router = router.with_facts(training={**router.facts.training, "seen": self._seen()})
        if kind == "policy":  # every θ has programs of its own, which would all have to be measured: one θ is enough
            router = router.with_facts(dial=(0.0, router.facts.default_theta))
        save_router(router, self.folder / name)
        return router

    def _seen(self) -> str:
        """Marks of all prompts that a router or its bridges learned from, so that it is judged on none of them."""
        ids = map(item_id, distinct_items([*self.items, *self._healed(), *self.fitted]))
        return id_prefixes(identity for identity in ids if split_of(identity) in ("train", "dev"))

    def _healed(self) -> list[Item]:
        """The questions that the bridges are fitted on."""
        sets = read_sets(self.options.heal_sets.split(","), self.options.limit)
        return [item for items in sets.values() for item in items]

    def resplit(self, name: str, router: LearnedRouter, tiers: dict[str, TierPromise]) -> None:
        """Count promises that break, made on random halves of the prompts that training did not use."""
        judge = Judge(self.model, router, on_progress=self.show)
        broken = judge.resplit(self.items, tiers=tiers, times=self.options.resplits)
        for count in broken:
            print(f"{name}: {count.text}")
        rows = [count._asdict() for count in broken if count.kind == "any"]
        (self.folder / f"{name}.resplits.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    def evaluate(self, name: str) -> Evaluation:
        """Measure one router on the prompts it has not seen."""
        evaluation = lab.evaluate(
            self.model,
            self.sets,
            router=self.folder / name,
            timed=self.options.timed,
            free=self.options.free if name.startswith((MAIN, "static")) else 0,
            on_progress=self.show,
        )
        (self.folder / f"{name}.json").write_text(json.dumps(evaluation.plain(), indent=1) + "\n", encoding="utf-8")
        (self.folder / f"{name}.html").write_text(to_html(evaluation), encoding="utf-8")
        for sentence in evaluation.verdict:
            print(f"{name}: {sentence}")
        return evaluation


def ship(router: Path, out: Path) -> None:
    """Copy the artifact to where the package looks for it."""
    size = sum(path.stat().st_size for path in router.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        sys.exit(f"error: the router has {size:,} bytes, {MAX_BYTES:,} are allowed; fit fewer or low-rank bridges.")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(router, out)
    print(f"wrote {out} ({router}, {size:,} bytes)")


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _tiers(promises: Sequence[str], loss: Loss) -> dict[str, TierPromise]:
    """Promises by tier, from texts such as `economy=0.1` or `economy=0.1:strict=0.5`."""
    tiers: dict[str, TierPromise] = {}
    for text in promises:
        name, _, promised = text.partition("=")
        alpha, _, strict = promised.partition(":strict=")
        if name not in TIERS:
            raise ValueError(f"tier {name!r} does not exist; choose from: {', '.join(TIERS)}.")
        tiers[name] = TierPromise(float(alpha), loss, float(strict) if strict else None)
    return tiers


def read_sets(names: Sequence[str], limit: int | None) -> dict[str, list[Item]]:
    """Those sets that POLAR_DATA has: `name`, or `name:400` for 400 questions drawn by hash."""
    folder = Path(os.environ.get("POLAR_DATA") or os.devnull)
    sets = {}
    for name in names:
        stem, _, limit_of_set = name.partition(":")
        path = folder / f"{stem}.jsonl"
        if path.is_file():
            items = read_items(path, limit)
            if limit_of_set:
                items = sorted(items, key=item_id)[: int(limit_of_set)]  # by hash: a file may be sorted by kind
            sets[stem] = items
    return sets


def _unanswered(item: Item) -> Item:
    return PromptItem(prompt=item.prompt, task=item.task) if isinstance(item, AnswerItem) else item


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="default: the default model")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--work", type=Path, default=Path("out/router"), help="folder for the work of all stages")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder for the artifact")
    parser.add_argument("--limit", type=int, default=None, help="maximum prompts of each set")
    parser.add_argument("--sets", default=SETS, help="sets to train and to judge the router on")
    parser.add_argument("--heal-sets", default=HEAL_SETS, help="sets to fit and tune the bridges on")
    parser.add_argument("--segments", default="12-20;12-20,22-26", help="bridges for choices")
    parser.add_argument("--cuts", default=CUTS, help="what is filled, a comma between programs, e.g. 27,24,18-21+23")
    parser.add_argument("--fit-per-kind", type=int, default=FITTED, help="texts of each kind that fills are fitted on")
    parser.add_argument("--per-kind", type=int, default=ROUTED, help="texts of each kind for the router")
    parser.add_argument("--per-task", type=int, default=PER_TASK, help="texts of each task about passages not yet used")
    parser.add_argument("--comparisons", type=int, default=COMPARISONS, help="texts that compare two of them")
    parser.add_argument("--distil", type=int, default=900, help="training steps of the fills, without labels")
    parser.add_argument("--fill-rate", type=float, default=3e-4, help="learning rate of those steps")
    parser.add_argument("--free", type=int, default=FREE, help="test prompts that every tier also answers freely")
    parser.add_argument(
        "--tune", type=int, default=380, help="training steps of the bridges for choices, with the right choices"
    )
    parser.add_argument("--labels", type=float, default=2.0, help="weight of the right choices in those steps")
    parser.add_argument("--choices", type=float, default=0.3, help="weight of full depth's choices in those steps")
    parser.add_argument("--rate", type=float, default=4e-4, help="learning rate of those steps")
    parser.add_argument("--budgets", default="0.95,0.9,0.85,0.8,0.75,0.7,0.6")
    parser.add_argument("--programs", default=MENU, help=f"programs of the menu, separated by ;, or {SEARCH}")
    parser.add_argument("--menu", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=128, help="prompts that programs are evolved on")
    parser.add_argument("--train", type=int, default=3000, help="maximum prompts that routers learn from")
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="training steps of the menu routers")
    parser.add_argument(
        "--least", type=float, default=0.15, help="minimum chance of keeping an answer at which a program runs"
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the router; the best on dev ships")
    parser.add_argument("--bridge-seed", type=int, default=0, help="seed of the bridges")
    parser.add_argument("--epochs", type=int, default=0, help="epochs of the layerwise router; 0 leaves it out")
    parser.add_argument("--price", type=float, default=3.0, help="price of a lost prompt for the layerwise router")
    parser.add_argument(
        "--tier",
        nargs="+",
        default=["economy=0.05:strict=0.8", "standard=0.025:strict=0.5", "premium=0.01:strict=0.15"],
    )
    parser.add_argument("--shipped", action="store_true", help="measure what ships on choices, and train nothing")
    parser.add_argument("--timed", type=int, default=8)
    parser.add_argument("--resplits", type=int, default=100, help="random re-splits that the promises are tested on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file of figures")
    options = parser.parse_args(arguments)
    recorder = Recorder("router", options.results, model=options.model)
    model = PolarModel.from_pretrained(options.model, precision=options.precision, ledger=None)
    with ProgressBars(quiet=not sys.stderr.isatty()) as show:
        if options.shipped:
            questions = read_sets(options.sets.split(","), options.limit)
            record_choices(recorder, lab.evaluate(model, questions, router=options.out, timed=0, on_progress=show))
            print(f"wrote {recorder.path}")
            return
        fitted = texts("fit", options.fit_per_kind, options.limit)
        sets = {
            "texts": route_texts(fitted, options.per_kind, options.per_task, options.comparisons, options.limit),
            **read_sets(options.sets.split(","), options.limit),
        }
        work = Work(model, options, sets, fitted, options.work, show)
        shipped, mains = work.run([*OTHERS, *(["policy"] if options.epochs else [])])
    print(record_seeds(recorder, [router.with_suffix(".json") for router in mains]))
    record_router(recorder, shipped.with_suffix(".json"))
    print(f"wrote {recorder.path}")
    ship(shipped, options.out)


if __name__ == "__main__":
    main()
