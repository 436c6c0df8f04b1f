"""What a search is told and what it finds. Knows budgets and files, measures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polar_sdk.errors import DataError
from polar_sdk.lab.items import DEFAULT_SHARES, Shares

if TYPE_CHECKING:
    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.lab.program_search.menu import Menu


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
