"""The search: from prompts and budgets to a menu and its reward matrix.

Programs are evolved on prompts of the train split, and the menu is picked on the dev split; then the prompts of all
splits are measured under it, of the train split as many as a router learns from. Calibration and test prompts have no
influence on the menu. The same seed repeats a search, and the cache supplies what was measured before, so that an
interrupted search resumes where it stopped.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import torch

from polar_sdk.errors import DataError
from polar_sdk.lab.items import (
    DEFAULT_SHARES,
    ChoiceItem,
    Item,
    Shares,
    builtin_items,
    check_labels,
    data_hash,
    distinct_items,
    split_of,
)
from polar_sdk.lab.program_search.cuts import Edit, Space, evolve
from polar_sdk.lab.program_search.matrix import measured_matrix
from polar_sdk.lab.program_search.menu import Menu, MenuProgram, cover
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.measure import Measurer, Reward
from polar_sdk.lab.rewards.tasks import Task, make_tasks
from polar_sdk.programs.program import Program
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.model import PolarModel


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        budgets: FLOPs of the programs to look for, as shares of identity's.
        menu: Maximum number of programs on the menu, identity included.
        prompts: Prompts of the train split that programs are evolved on.
        train: Maximum prompts of the train split that the menu is measured on, drawn by hash: a router learns from
            these.
        population: Programs tried per generation and budget.
        generations: Generations per budget after the first, which is random.
        objective: `identity`: answer as full depth does; `labels`: prefer the right choice where it is known.
        loops: Whether layers may be visited twice.
        answer_tokens: Maximum tokens of identity's answers to prompts.
        write_tokens: Maximum tokens of the answers that are compared with the right text.
        shares: Of the splits.
        seed: Of everything random.
    """

    budgets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6)
    menu: int = 12
    prompts: int = 128
    train: int = 1000
    population: int = 12
    generations: int = 4
    objective: Literal["identity", "labels"] = "identity"
    loops: bool = True
    answer_tokens: int = 24
    write_tokens: int = 64
    shares: Shares = DEFAULT_SHARES
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or not all(0 < budget < 1 for budget in self.budgets):
            raise DataError(f"budgets {self.budgets} must be between 0 and 1, e.g. 0.9,0.8,0.7,0.6.")
        if self.menu < 2:
            raise DataError(f"menu={self.menu} leaves nothing to choose from; use at least 2, identity included.")
        if self.objective not in ("identity", "labels"):
            raise DataError(f"objective {self.objective!r} does not exist; use identity or labels.")
        smallest = min(
            self.prompts, self.train, self.population, self.generations + 1, self.answer_tokens, self.write_tokens
        )
        if smallest < 1:
            raise DataError(
                f"prompts={self.prompts}, train={self.train}, population={self.population}, generations="
                f"{self.generations}, answer_tokens={self.answer_tokens}, write_tokens={self.write_tokens}: "
                "use at least 0 generations, and at least 1 of the others."
            )
        self.shares.check()


@dataclass(frozen=True)
class SearchResult:
    """A menu and what its programs do on every prompt."""

    menu: Menu
    matrix: RewardMatrix

    def save(self, path: str | Path) -> Path:
        """Write the menu to `path` and the matrix beside it; returns the matrix's path."""
        self.menu.save(path)
        self.matrix.save(rewards_path(path))
        return rewards_path(path)


def rewards_path(menu: str | Path) -> Path:
    """The path of the reward matrix of a menu file: `menu.json` has `menu.rewards.safetensors` beside it."""
    return Path(menu).with_suffix(".rewards.safetensors")


_MIN_DEV: Final = 32
"""Dev prompts below which the menu is picked on the train split: fewer show too little."""
_FINALISTS: Final = 48
"""Programs that the menu is picked from: the fittest of all budgets."""


def search(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    *,
    programs: Sequence[Program] = (),
    cache: RewardCache | None = None,
    on_progress: Progress = silent,
    **options: object,
) -> SearchResult:
    """Search programs for several budgets, pick a menu, and measure every prompt under it.

    Args:
        model: The model, with the bridges that programs may use; its policy bounds the programs.
        items: Prompts to search on; None = the prompts that come with the package.
        programs: Go on the menu whatever is found, unless the policy forbids it: those that fills were made for, say
            (`MapSet.programs`). None given = for each fill the program that uses it alone.
        cache: What has been measured already; None = nothing.
        on_progress: Called with (stage, steps done, steps in all).
        **options: Fields of `SearchOptions`.

    Raises:
        DataError: An option is out of range; the data is empty, nothing but copies, or its labels are of one class; no
            prompt is in the train split; or the policy allows no program of these budgets.
    """
    checked = SearchOptions(**options)  # type: ignore[arg-type]
    measurer = Measurer(model, cache or RewardCache(), on_progress)
    return _Search(model, measurer, checked, programs).run(builtin_items() if items is None else items)


@dataclass(frozen=True)
class _Search:
    """A search on one model; see `search`."""

    model: PolarModel
    measurer: Measurer
    options: SearchOptions
    programs: Sequence[Program]

    def run(self, given: Sequence[Item]) -> SearchResult:
        """Search, pick and measure."""
        items = distinct_items(given)
        check_labels(items)
        measurer, tokens = self.measurer, self.options.answer_tokens
        tasks = make_tasks(self.model, items, measurer.cache, answer_tokens=tokens, on_progress=measurer.on_progress)
        splits = [split_of(task.id, self.options.shares) for task in tasks]
        train = [task for task, split in zip(tasks, splits, strict=True) if split == "train"]
        dev = [task for task, split in zip(tasks, splits, strict=True) if split == "dev"]
        if not train:
            raise DataError(f"none of the {len(tasks)} prompts is in the train split; give more prompts.")
        drawn = sorted(train, key=lambda task: task.id)
        fitness = self._evolve(drawn[: self.options.prompts])
        if not any(fitness.values()):
            budgets = ", ".join(f"{budget:g}" for budget in self.options.budgets)
            raise DataError(
                f"no program that the policy allows costs {budgets} of full depth; give other budgets, or a policy "
                "that protects fewer layers."
            )
        judged = dev if len(dev) >= _MIN_DEV else train
        programs = self._pick(fitness, judged)
        dropped = {task.id for task in drawn[self.options.train :]}
        measured = [task for task in tasks if task.id not in dropped]
        matrix = self._matrix(measured, programs, data_hash(items))
        tried = {program for of_budget in fitness.values() for program in of_budget}
        return SearchResult(self._menu(matrix, judged, len(tried)), matrix)

    @property
    def _identity(self) -> Program:
        return Program.identity(self.model.depth)

    def _evolve(self, tasks: Sequence[Task]) -> dict[float, dict[Program, float]]:
        """Fitness on all search prompts, by budget."""
        decoder = self.model.loaded.decoder
        space = Space(decoder.cost, self.model.policy, loops=self.options.loops)
        fitness = {}
        for place, budget in enumerate(self.options.budgets, 1):
            stage = f"budget {budget:g} ({place} of {len(self.options.budgets)})"

            def fitness_of(programs: Sequence[Program], share: float, stage: str = stage) -> dict[Program, float]:
                first = tasks[: max(1, round(share * len(tasks)))]
                rewards = self.measurer.rewards(first, programs, stage)
                return {program: self._fitness(first, program, reward) for program, reward in rewards.items()}

            fitness[budget] = evolve(
                space,
                budget,
                fitness_of,
                population=self.options.population,
                generations=self.options.generations,
                dice=random.Random(f"{self.options.seed} {budget}"),
            )
        return fitness

    def _fitness(self, tasks: Sequence[Task], program: Program, reward: Reward) -> float:
        """Mean reward, plus a little of the margin to separate programs that tie."""
        value = reward.share
        if self.options.objective == "labels":
            choice = torch.tensor([isinstance(task.item, ChoiceItem) for task in tasks])
            scored = [task for task in tasks if isinstance(task.item, ChoiceItem)]
            value = value.clone()
            value[choice] = self.measurer.right(scored, program).float()
        return float(value.mean() + 0.01 * reward.margin.clamp(-1, 1).mean())

    def _pick(self, fitness: dict[float, dict[Program, float]], tasks: Sequence[Task]) -> list[Program]:
        """Identity, programs that fill, the fittest of each budget, and what covers the prompts best beside them.

        The search compares programs at one length; fills save more of long prompts, so each gets its place.
        """
        filled = self._given()
        winners = [
            max(values.items(), key=lambda pair: (pair[1], pair[0].text))[0] for values in fitness.values() if values
        ]
        rankings = [
            [program for program, _ in sorted(values.items(), key=lambda pair: (-pair[1], pair[0].text))]
            for values in fitness.values()
        ]
        in_turn = [program for rank in zip_longest(*rankings) for program in rank if program is not None]
        pool = list(dict.fromkeys([self._identity, *filled, *winners, *in_turn]))[:_FINALISTS]
        rewards = self.measurer.rewards(tasks, pool, "finalists")
        gains = torch.stack([_gain(rewards[program], rewards[self._identity]) for program in pool], dim=1)
        must = [0, *(pool.index(program) for program in (*filled, *winners) if program in pool)]
        return [pool[column] for column in cover(gains, self.options.menu, must)]

    def _given(self) -> list[Program]:
        """The programs that go on the menu whatever is found."""
        space = Space(self.model.decoder.cost, self.model.policy)
        if self.programs:
            return [program for program in self.programs if space.runs(program)]
        cuts = [frozenset({Edit(*segment, "fill")}) for segment in sorted(space.cost.fills)]
        return [space.program(cut) for cut in cuts if space.allowed(cut)]

    def _matrix(self, tasks: Sequence[Task], programs: Sequence[Program], data: str) -> RewardMatrix:
        ordered = [self._identity, *sorted(programs, key=self.model.decoder.cost.ratio, reverse=True)]
        return measured_matrix(
            self.measurer,
            tasks,
            list(dict.fromkeys(ordered)),
            splits=[split_of(task.id, self.options.shares) for task in tasks],
            data=data,
            write_tokens=self.options.write_tokens,
            stage="menu on all prompts",
        )

    def _menu(self, matrix: RewardMatrix, judged: Sequence[Task], tried: int) -> Menu:
        ids = {task.id for task in judged}
        rows = matrix.rows([row for row, item_id in enumerate(matrix.ids) if item_id in ids])
        return Menu(
            model=matrix.model,
            fingerprint=matrix.fingerprint,
            dtype=matrix.dtype,
            bridges=matrix.bridges,
            data=matrix.data,
            seed=self.options.seed,
            prompts={split: matrix.splits.count(split) for split in dict.fromkeys(matrix.splits)},
            tried=tried,
            programs=tuple(self._menu_program(rows, column) for column in range(len(matrix.programs))),
        )

    def _menu_program(self, rows: RewardMatrix, column: int) -> MenuProgram:
        right = rows.right[rows.labelled, column].float()
        return MenuProgram(
            program=rows.programs[column],
            flops_ratio=self.model.decoder.cost.ratio(rows.programs[column]),
            agreement=float(rows.agree[:, column].float().mean()),
            token_agreement=float(rows.share[:, column].mean()),
            accuracy=float(right.mean()) if len(right) else None,
        )


def _gain(reward: Reward, identity: Reward) -> Tensor:
    """(P,) share of identity's FLOPs that a prompt saves where the program answers as identity does; else 0."""
    saved = 1 - reward.flops / identity.flops
    return saved * reward.agree
