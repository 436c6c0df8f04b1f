"""Make the shipped router: heal, search, train, calibrate, evaluate. `make router` runs it for the default model.

Prompts: those of the package and, where POLAR_DATA names a folder, the JSONL sets in it, each a class of its own in the
evaluation. Every stage keeps its work, so that the same command goes on after Ctrl-C. What is measured is printed and
written beside the work, the article's router too; the artifact goes to `--out`, and never more than 5 MB of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polar_sdk import PolarModel
from polar_sdk.bridges import Healer, HealOptions
from polar_sdk.cli.progress import ProgressBars
from polar_sdk.data import builtin_items, read_items
from polar_sdk.learning import MenuSettings, PolicySettings
from polar_sdk.learning.page import to_html
from polar_sdk.policy import TIERS
from polar_sdk.rewards import RewardCache, cache_path
from polar_sdk.search import RewardMatrix, Search, SearchOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.data import Item
    from polar_sdk.learning import Evaluation
    from polar_sdk.learning.calibrate import TierPromise
    from polar_sdk.router import LearnedRouter

SHIPPED = Path(__file__).parents[1] / "polar_sdk" / "routers" / "smollm2-135m-instruct"
MOST_BYTES = 5_000_000


@dataclass
class Work:
    """One run: where it keeps things, and on what."""

    model: PolarModel
    options: argparse.Namespace
    sets: dict[str, list[Item]]
    folder: Path
    show: ProgressBars

    @property
    def items(self) -> list[Item]:
        """All prompts."""
        return [item for some in self.sets.values() for item in some]

    def run(self) -> None:
        """All stages."""
        self.heal()
        matrix = self.search()
        routers = self.train(matrix)
        for name in routers:
            self.model.calibrate(
                self.items, router=self.folder / name, tiers=_tiers(self.options.tier), on_progress=self.show
            )
            self.evaluate(name)
        best = max(routers, key=lambda name: routers[name].facts.training["utility"] if name != "policy" else -1.0)
        self.ship(best)

    def heal(self) -> None:
        """Fit the bridges."""
        out = self.folder / "bridges"
        if not (out / "bridges.json").is_file():
            options = HealOptions(distil=self.options.distil, resume=any(self.folder.glob("bridges/*")))
            cache = RewardCache(cache_path(self.model.fingerprint, self.model.dtype))
            Healer(
                self.model, self.items, self.options.segments, options, out=out, cache=cache, on_progress=self.show
            ).run()
        self.model.load_bridges(out)

    def search(self) -> RewardMatrix:
        """Search the menu, on what the cache does not know yet."""
        path = self.folder / "menu.json"
        options = SearchOptions(
            budgets=tuple(map(float, self.options.budgets.split(","))),
            menu=self.options.menu,
            prompts=self.options.prompts,
            population=self.options.population,
            generations=self.options.generations,
        )
        cache = RewardCache(cache_path(self.model.fingerprint, self.model.dtype))
        with cache:
            found = Search(self.model, self.items, options, cache, self.show).run()
        found.save(path)
        return found.matrix

    def train(self, matrix: RewardMatrix) -> dict[str, LearnedRouter]:
        """A menu router on each kind of features, and the article's router."""
        menu = MenuSettings(steps=self.options.steps, seeds=_seeds(self.options.seeds))
        made = {}
        for features in ("embedding", "early"):
            made[f"menu-{features}"] = self.model.train_router(
                matrix,
                features="early" if features == "early" else "embedding",
                layers=self.options.layers,
                settings=menu,
                out=self.folder / f"menu-{features}",
                bridges=self.folder / "bridges",
                on_progress=self.show,
            )
        if self.options.epochs:
            policy = PolicySettings(epochs=self.options.epochs, price=self.options.price)
            made["policy"] = self.model.train_router(
                matrix,
                kind="policy",
                items=self.items,
                settings=policy,
                out=self.folder / "policy",
                bridges=self.folder / "bridges",
                on_progress=self.show,
            )
        return made

    def evaluate(self, name: str) -> Evaluation:
        """Measure one router on the prompts it has not seen."""
        found = self.model.evaluate(
            self.sets, router=self.folder / name, timed=self.options.timed, on_progress=self.show
        )
        (self.folder / f"{name}.json").write_text(json.dumps(found.plain(), indent=1) + "\n", encoding="utf-8")
        (self.folder / f"{name}.html").write_text(to_html(found), encoding="utf-8")
        for sentence in found.verdict:
            print(f"{name}: {sentence}")
        return found

    def ship(self, name: str) -> None:
        """Put the artifact where the package looks for it."""
        size = sum(path.stat().st_size for path in (self.folder / name).rglob("*") if path.is_file())
        if size > MOST_BYTES:
            sys.exit(f"error: the router has {size:,} bytes, of at most {MOST_BYTES:,}; fit fewer or low-rank bridges.")
        shutil.rmtree(self.options.out, ignore_errors=True)
        shutil.copytree(self.folder / name, self.options.out)
        print(f"wrote {self.options.out} ({name}, {size:,} bytes)")


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _tiers(texts: Sequence[str]) -> dict[str, TierPromise]:
    """`economy=0.1` or `economy=0.1:harms`, several."""
    tiers: dict[str, TierPromise] = {}
    for text in texts:
        name, promise = text.split("=")
        alpha, _, loss = promise.partition(":")
        if name not in TIERS:
            raise ValueError(f"tier {name!r} is not one of {', '.join(TIERS)}")
        tiers[name] = (float(alpha), "harms" if loss == "harms" else "differs")
    return tiers


def read_sets(limit: int | None) -> dict[str, list[Item]]:
    """The package's prompts, and the sets of POLAR_DATA."""
    folder = os.environ.get("POLAR_DATA")
    found = {path.stem: read_items(path, limit) for path in sorted(Path(folder).glob("*.jsonl"))} if folder else {}
    return {"package": builtin_items()[:limit], **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="default: the default model")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--work", type=Path, default=Path("out/router"), help="where stages keep their work")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the artifact goes")
    parser.add_argument("--limit", type=int, default=None, help="prompts of each set")
    parser.add_argument("--segments", default="12-15,17-20;12-20;3-7,12-15,17-20", help="bridges to fit")
    parser.add_argument("--distil", type=int, default=0, help="steps of training the bridges")
    parser.add_argument("--budgets", default="0.95,0.9,0.85,0.8,0.75,0.7,0.6")
    parser.add_argument("--menu", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=128, help="prompts that programs are evolved on")
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3, help="layers run for early features")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the menu routers")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=3, help="of the policy router; 0 leaves it out")
    parser.add_argument("--price", type=float, default=3.0, help="weight of a lost prompt for the policy router")
    parser.add_argument("--tier", nargs="+", default=["economy=0.10", "standard=0.05", "premium=0.02"])
    parser.add_argument("--timed", type=int, default=8)
    options = parser.parse_args(arguments)
    model = PolarModel.from_pretrained(options.model, precision=options.precision, ledger=None)
    with ProgressBars(quiet=not sys.stderr.isatty()) as show:
        Work(model, options, read_sets(options.limit), options.work, show).run()


if __name__ == "__main__":
    main()
