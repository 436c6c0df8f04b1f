"""The search: from prompts and budgets to a menu and its reward matrix.

Programs are evolved on prompts of the train split, the menu is picked on the dev split, and every prompt of every split
is then measured under the menu, of the train split as many as a router learns from. Calibration and test prompts have
no say in what is on it. With the same seed a search repeats itself, and the cache answers for what was measured before:
an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
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
from polar_sdk.lab.program_search.cuts import Space, evolve
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
        menu: Most programs on the menu, identity included.
        prompts: Prompts of the train split that programs are evolved on.
        train: Most prompts of the train split that the menu is measured on, drawn by hash: what a router learns from.
        population: Programs tried per generation and budget.
        generations: Generations per budget, after a first one of random programs.
        objective: `identity`: answer as full depth does; `labels`: choose the right choice where one is known.
        loops: Whether layers may be visited twice.
        answer_tokens: Most tokens of identity's answers to prompts.
        write_tokens: Most tokens of the answers that are compared with the right text.
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
            raise DataError(f"budgets {self.budgets} must lie between 0 and 1; use for example 0.9,0.8,0.7,0.6.")
        if self.menu < 2:
            raise DataError(f"a menu of {self.menu} leaves nothing to choose; use at least 2, identity is one of them.")
        if self.objective not in ("identity", "labels"):
            raise DataError(f"objective {self.objective!r} is unknown; use identity or labels.")
        least = min(
            self.prompts, self.train, self.population, self.generations + 1, self.answer_tokens, self.write_tokens
        )
        if least < 1:
            raise DataError(
                "prompts, train, population, answer_tokens and write_tokens must be at least 1, generations 0."
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
    """Where the reward matrix of a menu file is: `menu.json` has `menu.rewards.safetensors` beside it."""
    return Path(menu).with_suffix(".rewards.safetensors")


_FEW: Final = 32
"""Fewer dev prompts than this say too little; then the menu is picked on the train split."""
_FINALISTS: Final = 48
"""Programs that may come onto the menu: the fittest of all budgets."""


def search(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    *,
    cache: RewardCache | None = None,
    on_progress: Progress = silent,
    **options: object,
) -> SearchResult:
    """Search programs for several budgets and pick a menu.

    Args:
        model: The model, with the bridges that programs may use; its policy bounds the programs.
        items: Prompts to search on; None = those that come with the package.
        cache: What is known already; None = nothing.
        on_progress: Called with (stage, steps done, steps in all).
        **options: Fields of `SearchOptions`.

    Raises:
        DataError: The data is empty, nothing but copies, or its labels are of one class.
    """
    chosen = SearchOptions(**options)  # type: ignore[arg-type]
    return Search(model, items, chosen, cache or RewardCache(), on_progress).run()


@dataclass
class Search:
    """A search on one model.

    Attributes:
        model: The model, with the bridges that programs may use; its policy bounds the programs.
        items: Prompts; None = those that come with the package.
        options: How to search.
        cache: What is known already.
        on_progress: Called with (stage, steps done, steps in all).
    """

    model: PolarModel
    items: Sequence[Item] | None = None
    options: SearchOptions = field(default_factory=SearchOptions)
    cache: RewardCache = field(default_factory=RewardCache)
    on_progress: Progress = silent

    def run(self) -> SearchResult:
        """Search, pick and measure.

        Raises:
            DataError: The data is empty, nothing but copies, its labels are of one class, or no prompt is in the train
                split.
        """
        items = distinct_items(builtin_items() if self.items is None else self.items)
        check_labels(items)
        tasks = make_tasks(
            self.model, items, self.cache, answer_tokens=self.options.answer_tokens, on_progress=self.on_progress
        )
        self._measurer = Measurer(self.model, self.cache, self.on_progress)
        splits = [split_of(task.id, self.options.shares) for task in tasks]
        train = [task for task, split in zip(tasks, splits, strict=True) if split == "train"]
        dev = [task for task, split in zip(tasks, splits, strict=True) if split == "dev"]
        if not train:
            raise DataError(f"none of the {len(tasks)} prompts is in the train split; give more prompts.")
        drawn = sorted(train, key=lambda task: task.id)
        fitness = self._evolve(drawn[: self.options.prompts])
        if not any(fitness.values()):
            raise DataError(
                f"no program that the policy allows costs {', '.join(f'{one:g}' for one in self.options.budgets)} of "
                "full depth; give other budgets, or a policy that protects fewer layers."
            )
        judged = dev if len(dev) >= _FEW else train
        programs = self._pick(fitness, judged)
        dropped = {task.id for task in drawn[self.options.train :]}
        measured = [task for task in tasks if task.id not in dropped]
        matrix = self._matrix(measured, programs, data_hash(items))
        return SearchResult(
            self._menu(matrix, judged, len({one for found in fitness.values() for one in found})), matrix
        )

    @property
    def _identity(self) -> Program:
        return Program.identity(self.model.depth)

    def _evolve(self, tasks: Sequence[Task]) -> dict[float, dict[Program, float]]:
        """Fitness on all search prompts, by budget."""
        decoder = self.model.loaded.decoder
        space = Space(decoder.cost, self.model.policy, loops=self.options.loops)

        found = {}
        for number, budget in enumerate(self.options.budgets, 1):
            stage = f"budget {budget:g} ({number} of {len(self.options.budgets)})"

            def judge(programs: Sequence[Program], share: float, stage: str = stage) -> dict[Program, float]:
                some = tasks[: max(1, round(share * len(tasks)))]
                rewards = self._measurer.rewards(some, programs, stage)
                return {program: self._fitness(some, program, reward) for program, reward in rewards.items()}

            found[budget] = evolve(
                space,
                budget,
                judge,
                population=self.options.population,
                generations=self.options.generations,
                dice=random.Random(f"{self.options.seed} {budget}"),
            )
        return found

    def _fitness(self, tasks: Sequence[Task], program: Program, reward: Reward) -> float:
        """Mean reward; a little of the margin parts programs that tie."""
        value = reward.share
        if self.options.objective == "labels":
            choice = torch.tensor([isinstance(task.item, ChoiceItem) for task in tasks])
            scored = [task for task in tasks if isinstance(task.item, ChoiceItem)]
            value = value.clone()
            value[choice] = self._measurer.right(scored, program).float()
        return float(value.mean() + 0.01 * reward.margin.clamp(-1, 1).mean())

    def _pick(self, fitness: dict[float, dict[Program, float]], tasks: Sequence[Task]) -> list[Program]:
        """Identity, the fittest program of each budget, and what covers the prompts best beside them."""
        winners = [max(found, key=lambda one: (found[one], one.text)) for found in fitness.values() if found]
        ranked = [
            sorted(found, key=lambda one, found=found: (-found[one], one.text))  # type: ignore[misc]
            for found in fitness.values()
        ]
        most = max(map(len, ranked), default=0)
        turns = [found[place] for place in range(most) for found in ranked if place < len(found)]
        pool = list(dict.fromkeys([self._identity, *winners, *turns]))[:_FINALISTS]
        rewards = self._measurer.rewards(tasks, pool, "finalists")
        gains = torch.stack([_gain(rewards[program], rewards[self._identity]) for program in pool], dim=1)
        must = [0, *(pool.index(program) for program in winners)]
        return [pool[column] for column in cover(gains, self.options.menu, must)]

    def _matrix(self, tasks: Sequence[Task], programs: Sequence[Program], data: str) -> RewardMatrix:
        ordered = [self._identity, *sorted(programs, key=self._ratio, reverse=True)]
        return measured_matrix(
            self._measurer,
            tasks,
            list(dict.fromkeys(ordered)),
            splits=[split_of(task.id, self.options.shares) for task in tasks],
            data=data,
            write_tokens=self.options.write_tokens,
            stage="menu on all prompts",
        )

    def _menu(self, matrix: RewardMatrix, judged: Sequence[Task], tried: int) -> Menu:
        wanted = {task.id for task in judged}
        rows = matrix.rows([number for number, one in enumerate(matrix.ids) if one in wanted])
        return Menu(
            model=matrix.model,
            fingerprint=matrix.fingerprint,
            dtype=matrix.dtype,
            bridges=matrix.bridges,
            data=matrix.data,
            seed=self.options.seed,
            prompts={split: matrix.splits.count(split) for split in dict.fromkeys(matrix.splits)},
            tried=tried,
            programs=tuple(self._line(rows, column, program) for column, program in enumerate(matrix.programs)),
        )

    def _line(self, rows: RewardMatrix, column: int, program: Program) -> MenuProgram:
        known = rows.right[rows.labelled, column].float()
        return MenuProgram(
            program=program,
            flops_ratio=self._ratio(program),
            agreement=float(rows.agree[:, column].float().mean()),
            token_agreement=float(rows.share[:, column].mean()),
            accuracy=float(known.mean()) if len(known) else None,
        )

    def _ratio(self, program: Program) -> float:
        from polar_sdk.programs.cost import NOMINAL_OUTPUT, NOMINAL_PROMPT

        cost = self.model.loaded.decoder.cost
        full = cost.request(self._identity, NOMINAL_PROMPT, NOMINAL_OUTPUT).total
        return cost.request(program, NOMINAL_PROMPT, NOMINAL_OUTPUT).total / full


def _gain(reward: Reward, identity: Reward) -> Tensor:
    """(P,) share of identity's FLOPs that a prompt saves where the program answers as identity does; else 0."""
    saved = 1 - reward.flops / identity.flops
    return saved * reward.agree
