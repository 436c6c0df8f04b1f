"""Make the shipped router: heal, measure, train, calibrate, evaluate. `make router` runs it for the default model.

Prompts: those of the package and, where POLAR_DATA names a folder, the JSONL sets in it that `--sets` names, each a
class of its own in the evaluation. Some bridges are tuned to the right choices of those sets, others distilled on
texts without labels. The menu is the one that ships, unless `--programs search` asks for a search. Every stage keeps
its work, so that the same command goes on after Ctrl-C. What is measured is printed and written beside the work, the
article's router too; the figures of what ships go to `--results`, the artifact to `--out`, at most 5 MB of it.

Tuned bridges know the questions of the train split: what programs do there says nothing of new questions. So a router
learns about choices from the dev split, and about texts from train and dev.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import RESULTS, Recorder
from benchmarks.router_bridges import Bridging
from benchmarks.router_seeds import record_router, record_seeds
from polar_sdk import PolarModel, lab
from polar_sdk.engine import ENGINE_VERSION
from polar_sdk.lab.evaluation.judge import Judge
from polar_sdk.lab.evaluation.rendering import to_html
from polar_sdk.lab.items import (
    AnswerItem,
    ChoiceItem,
    PromptItem,
    Shares,
    builtin_items,
    data_hash,
    distinct_items,
    item_id,
    read_items,
    split_of,
)
from polar_sdk.lab.program_search.matrix import measured_matrix
from polar_sdk.lab.program_search.search import Search, SearchOptions
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.lab.training.checkpoint import run_key
from polar_sdk.lab.training.layerwise_training import LayerwiseSettings
from polar_sdk.lab.training.measuring import marks
from polar_sdk.lab.training.menu_training import MenuSettings
from polar_sdk.programs.policy import TIERS
from polar_sdk.programs.program import Program
from polar_sdk.router.artifact import save_router
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.evaluation.calibrate import TierPromise
    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.lab.items import Item, Split
    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.router.certificate import Loss
    from polar_sdk.router.learned import LearnedRouter

SHIPPED = Path(__file__).parents[1] / "polar_sdk" / "shipped" / "routers" / "smollm2-135m-instruct"
MOST_BYTES = 5_000_000
HEAL_SETS = "arc_easy.train,arc_challenge.train,openbookqa.train,mmlu.test-open:2400,gsm8k.train:700"
SETS = "arc_easy.train,arc_challenge.train,openbookqa.train,gsm8k.train:1200"
MENU = (
    "0-14 [15] 16 [17] 18-29;0-12 [13] 14 [15] 16 [17] 18-29;0-13 [14-18] 19-29;"
    "0-11 [12-20] 21-29;0-11 [12-20] 21 [22-26] 27-29"
)
"""What ships: three programs for texts, whose bridges alternate with layers or not, and two for choices."""
SEARCH = "search"
HALVES = Shares(0.6, 0.4, 0.0, 0.0)
"""Of the dev split of choices: to learn from and to choose by."""
MAIN = "menu-embedding"
"""The router that every seed of the bridges makes, of which the best on dev ships; the others are made for the first
seed alone, to compare with. It reads embeddings: early states do better on dev, but promises on them broke too often.
"""
OTHERS = ("static", "menu-early")
OPEN = "@open"
"""Behind a set's name: its questions are asked without their choices."""


@dataclass
class Work:
    """One run: where it keeps things, and on what.

    Attributes:
        model: The model.
        options: Of the command line.
        sets: Prompts by the name of their set.
        seed: Of the bridges.
        folder: What this seed makes.
        show: Progress.
    """

    model: PolarModel
    options: argparse.Namespace
    sets: dict[str, list[Item]]
    seed: int
    folder: Path
    show: ProgressBars

    @property
    def items(self) -> list[Item]:
        """All prompts."""
        return [item for some in self.sets.values() for item in some]

    def run(self, names: Sequence[str]) -> tuple[float, Path]:
        """All stages; the utility on dev of the main router, and the folder of what to ship of this seed."""
        self.heal()
        matrix = self.search()
        made = {name: self.make(name, matrix) for name in names}
        shipped = MAIN if made[MAIN]["routed"] or "static" not in made else "static"
        return made[MAIN]["utility"], self.folder / shipped

    def make(self, name: str, matrix: RewardMatrix) -> dict[str, Any]:
        """Train, certify and evaluate one router; what is done already for the same data and settings stays."""
        tiers = _tiers(self.options.tier, "drops" if self.labelled else "differs")
        mark = self.folder / f"{name}.done.json"
        settings = self._policy if name == "policy" else self._menu
        key = run_key(
            matrix.data, matrix.bridges, matrix.programs, settings, tiers, self.options.layers, ENGINE_VERSION
        )
        if mark.is_file() and (done := json.loads(mark.read_text(encoding="utf-8")))["key"] == key:
            return dict(done)
        router = self.train(name, matrix)
        certified = lab.calibrate(self.model, self.items, router=self.folder / name, tiers=tiers, on_progress=self.show)
        if self.options.resplits and name != "policy":  # its programs are many, and none is in the matrix
            self.resplit(name, certified, tiers)
        done = {"key": key, "utility": router.facts.training["utility"], "routed": _earned(self.evaluate(name))}
        mark.write_text(json.dumps(done) + "\n", encoding="utf-8")
        return done

    @property
    def labelled(self) -> bool:
        """Whether right choices are known for some prompts."""
        return any(isinstance(item, ChoiceItem) for item in self.items)

    def heal(self) -> None:
        """Fit the bridges."""
        made = Bridging(self.options, self._healed(), self.seed, self.folder, self.show).run(self.model)
        self.model.use_bridges(made)

    def search(self) -> RewardMatrix:
        """Search the menu, or take the one that was named, and measure it on what the cache does not know yet."""
        if self.options.programs != SEARCH:
            return self._measure([Program.parse(text) for text in self.options.programs.split(";")])
        path = self.folder / "menu.json"
        options = SearchOptions(
            budgets=tuple(map(float, self.options.budgets.split(","))),
            menu=self.options.menu,
            prompts=self.options.prompts,
            train=self.options.train,
            population=self.options.population,
            generations=self.options.generations,
        )
        cache = RewardCache(cache_path(self.model.fingerprint, self.model.dtype))
        with cache:
            found = Search(self.model, self.items, options, cache, self.show).run()
        found.save(path)
        return found.matrix

    def _measure(self, programs: list[Program]) -> RewardMatrix:
        """The matrix of a menu that was named, on all prompts that say something about new ones."""
        with RewardCache(cache_path(self.model.fingerprint, self.model.dtype)) as cache:
            tasks = make_tasks(self.model, distinct_items(self.items), cache, on_progress=self.show)
            split = {task.id: self._split(task) for task in tasks}
            drawn = sorted(task.id for task in tasks if split[task.id] == "train")
            left_out = {*drawn[self.options.train :], *(one for one, name in split.items() if name is None)}
            kept = [(task, split[task.id]) for task in tasks if task.id not in left_out]
            return measured_matrix(
                Measurer(self.model, cache, self.show),
                [task for task, _ in kept],
                [Program.identity(self.model.depth), *programs],
                splits=[name for _, name in kept if name is not None],
                data=data_hash(task.item for task, _ in kept),
                write_tokens=64 if self.labelled else None,
            )

    def _split(self, task: Task) -> Split | None:
        """What a router may use a prompt for; None = nothing, as the bridges were tuned to its right choice."""
        split = split_of(task.id)
        if not (self.options.tune and isinstance(task.item, ChoiceItem)) or split in ("calibration", "test"):
            return split
        return None if split == "train" else split_of(task.id, HALVES, seed=1)

    @property
    def _menu(self) -> MenuSettings:
        return MenuSettings(
            steps=self.options.steps,
            seeds=_seeds(self.options.seeds),
            loss="drops" if self.labelled else "differs",
            hidden=((64,),),  # a linear head cannot say that a program serves one kind of prompt and ruins another
            penalties=(0.3, 1.0, 3.0),
            risks=(0.03, 0.1, 0.15),
            least=self.options.least,
        )

    @property
    def _policy(self) -> LayerwiseSettings:
        return LayerwiseSettings(epochs=self.options.epochs, price=self.options.price)

    def train(self, name: str, matrix: RewardMatrix) -> LearnedRouter:
        """A menu router on one kind of features, one that reads nothing, or the article's router."""
        kind, _, features = name.partition("-")
        router = lab.train(
            self.model,
            matrix,
            kind=kind,  # type: ignore[arg-type]
            items=self.items,
            features="early" if features == "early" else "embedding",
            layers=self.options.layers,
            settings=self._policy if kind == "policy" else self._menu,
            out=self.folder / name,
            bridges=self.folder / "bridges",
            on_progress=self.show,
        )
        router = router.with_facts(training={**router.facts.training, "seen": self._seen()})
        if kind == "policy":  # each θ has programs of its own, which must all be measured: only the usual reading is
            router = router.with_facts(dial=(0.0, router.facts.default_theta))
        save_router(router, self.folder / name)
        return router

    def _seen(self) -> str:
        """All prompts that a router or its bridges learned from, so that it is judged on none of them."""
        ids = [item_id(item) for item in distinct_items([*self.items, *self._healed()])]
        return marks(one for one in ids if split_of(one) in ("train", "dev"))

    def _healed(self) -> list[Item]:
        """What the bridges are fitted on."""
        sets = read_sets(self.options.heal_sets.split(","), self.options.limit)
        return [item for some in sets.values() for item in some]

    def resplit(self, name: str, router: LearnedRouter, tiers: dict[str, TierPromise]) -> None:
        """How often promises break: calibrated on a random half of the prompts that training left alone."""
        judge = Judge(self.model, router, on_progress=self.show)
        broken = judge.resplit(self.items, tiers=tiers, times=self.options.resplits)
        for one in broken:
            print(f"{name}: {one.text}")
        rows = [one._asdict() for one in broken if one.kind == "any"]
        (self.folder / f"{name}.resplits.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    def evaluate(self, name: str) -> Evaluation:
        """Measure one router on the prompts it has not seen."""
        found = lab.evaluate(
            self.model, self.sets, router=self.folder / name, timed=self.options.timed, on_progress=self.show
        )
        (self.folder / f"{name}.json").write_text(json.dumps(found.plain(), indent=1) + "\n", encoding="utf-8")
        (self.folder / f"{name}.html").write_text(to_html(found), encoding="utf-8")
        for sentence in found.verdict:
            print(f"{name}: {sentence}")
        return found


def _earned(found: Evaluation) -> bool:
    """Whether reading prompts beats both controls: over all of them together, or within a class."""
    whole = [one.beaten for one in found.sets[0].comparisons if one.control != "random program"]
    return all(whole) or any(one.outcome == "routed" for one in found.classes)


def ship(made: Path, out: Path) -> None:
    """Put the artifact where the package looks for it."""
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        sys.exit(f"error: the router has {size:,} bytes, of at most {MOST_BYTES:,}; fit fewer or low-rank bridges.")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(made, out)
    print(f"wrote {out} ({made}, {size:,} bytes)")


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _tiers(texts: Sequence[str], loss: Loss) -> dict[str, TierPromise]:
    """`economy=0.1`, several."""
    tiers: dict[str, TierPromise] = {}
    for text in texts:
        name, alpha = text.split("=")
        if name not in TIERS:
            raise ValueError(f"tier {name!r} is not one of {', '.join(TIERS)}")
        tiers[name] = (float(alpha), loss)
    return tiers


def read_sets(names: Sequence[str], limit: int | None) -> dict[str, list[Item]]:
    """The package's prompts, and those sets of POLAR_DATA that are there: `name`, or `name:400` for 400 drawn by hash.

    Prompts with an answer in text lose it: a model of this size writes hardly any of those answers, so that what it
    would have written is the better measure. `name@open` asks the questions of a set without their choices.
    """
    folder = Path(os.environ.get("POLAR_DATA") or os.devnull)
    found = {}
    for name in names:
        stem, _, most = name.partition(":")
        path = folder / f"{stem.removesuffix(OPEN)}.jsonl"
        if path.is_file():
            items = read_items(path, limit)
            drawn = sorted(items, key=item_id)[: int(most)] if most else items  # a file may hold kind after kind
            found[stem] = [_opened(one) if stem.endswith(OPEN) else _unanswered(one) for one in drawn]
    return {"package": builtin_items()[:limit], **found}


def _unanswered(item: Item) -> Item:
    return PromptItem(prompt=item.prompt) if isinstance(item, AnswerItem) else item


def _opened(item: Item) -> Item:
    return PromptItem(prompt=item.question if isinstance(item, ChoiceItem) else item.prompt)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="default: the default model")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--work", type=Path, default=Path("out/router"), help="where stages keep their work")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the artifact goes")
    parser.add_argument("--limit", type=int, default=None, help="prompts of each set")
    parser.add_argument("--sets", default=SETS, help="to route and to judge on")
    parser.add_argument("--heal-sets", default=HEAL_SETS, help="to fit and tune the bridges on")
    parser.add_argument("--segments", default="12-20;12-20,22-26", help="bridges for choices")
    parser.add_argument("--text-segments", default="13,15,17;14-18", help="bridges for prompts answered in text")
    parser.add_argument("--distil", type=int, default=200, help="steps of training those, without labels")
    parser.add_argument("--tune", type=int, default=380, help="steps of training the others with the right choices")
    parser.add_argument("--labels", type=float, default=2.0, help="weight of the right choices in those steps")
    parser.add_argument("--choices", type=float, default=0.3, help="weight of full depth's choices in those steps")
    parser.add_argument("--rate", type=float, default=4e-4, help="learning rate of those steps")
    parser.add_argument("--budgets", default="0.95,0.9,0.85,0.8,0.75,0.7,0.6")
    parser.add_argument("--programs", default=MENU, help=f"the menu, parted by ;, or {SEARCH}")
    parser.add_argument("--menu", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=128, help="prompts that programs are evolved on")
    parser.add_argument("--train", type=int, default=3000, help="most prompts that routers learn from")
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3, help="layers run for early features")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the menu routers")
    parser.add_argument("--least", type=float, default=0.6, help="least chance of an answer that a program is run at")
    parser.add_argument("--seeds", default="0,1,2", help="of the menu routers")
    parser.add_argument("--bridge-seeds", default="0,1,2", help="bridges are made with each; the best on dev ships")
    parser.add_argument("--epochs", type=int, default=3, help="of the policy router; 0 leaves it out")
    parser.add_argument("--price", type=float, default=3.0, help="weight of a lost prompt for the policy router")
    parser.add_argument("--tier", nargs="+", default=["economy=0.25", "standard=0.02", "premium=0.01"])
    parser.add_argument("--timed", type=int, default=8)
    parser.add_argument("--resplits", type=int, default=100, help="random re-splits that the promises are tried on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file of figures")
    options = parser.parse_args(arguments)
    recorder = Recorder("router", options.results, model=options.model)
    model = PolarModel.from_pretrained(options.model, precision=options.precision, ledger=None)
    with ProgressBars(quiet=not sys.stderr.isatty()) as show:
        sets = read_sets(options.sets.split(","), options.limit)
        found: list[tuple[float, Path]] = []
        for seed in _seeds(options.bridge_seeds):
            work = Work(model, options, sets, seed, options.work / f"seed-{seed}", show)
            found.append(work.run([MAIN] if found else [MAIN, *OTHERS, *(["policy"] if options.epochs else [])]))
    print(record_seeds(recorder, [made.parent / f"{MAIN}.json" for _, made in found]))
    shipped = max(found)[1]
    record_router(recorder, shipped.with_suffix(".json"))
    print(f"wrote {recorder.path}")
    ship(shipped, options.out)


if __name__ == "__main__":
    main()
