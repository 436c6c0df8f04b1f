"""Prompts and choice questions, and a reward matrix with a rule that can be learned: which letters a prompt uses."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk.lab.items import ChoiceItem, Item, PromptItem
from polar_sdk.lab.program_search.matrix import RewardMatrix
from polar_sdk.programs.program import Program
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.model import PolarModel

DEPTH = 6
THINGS = "apples pears boats trains clouds rivers stones birds maps songs lamps doors".split()  # noqa: SIM905
MENU = (Program.identity(DEPTH), Program.skipping(DEPTH, [2]), Program.skipping(DEPTH, [2, 3]))


@pytest.fixture(scope="session")
def mixed_items() -> list[Item]:
    """Twelve prompts and twelve choice questions."""
    return [
        *(PromptItem(prompt=f"tell me all of the {thing} there") for thing in THINGS),
        *(
            ChoiceItem(
                question=f"which colour have {thing}?", choices=("red", f"blue {thing}", "green"), answer=number % 3
            )
            for number, thing in enumerate(THINGS)
        ),
    ]


@pytest.fixture(scope="session")
def model() -> PolarModel:
    return tiny_model()


@pytest.fixture(scope="session")
def matrix(model: PolarModel) -> Callable[..., RewardMatrix]:
    """Program 1 agrees on 70 % of all prompts, program 2 on those of letters of the first half (95 %), else on 20 %."""

    def make(prompts: int = 600, seed: int = 0, *, learnable: bool = True) -> RewardMatrix:
        dice = random.Random(seed)
        easy = [dice.random() < 0.5 for _ in range(prompts)]
        letters = [range(65, 78) if one else range(78, 91) for one in easy]
        if not learnable:
            dice.shuffle(letters)
        tokens = tuple(tuple(dice.choices(some, k=dice.randint(5, 30))) for some in letters)
        agree = [[True, dice.random() < 0.7, dice.random() < (0.95 if one else 0.2)] for one in easy]
        right = [[dice.random() < 0.6] * 3 for _ in easy]
        right = [
            [one and kept for one, kept in zip(row, same, strict=True)] for row, same in zip(right, agree, strict=True)
        ]
        cost = model.decoder.cost
        flops = [[cost.request(program, len(row), 8).total for program in MENU] for row in tokens]
        margin = [[0.3 if kept else -0.2 for kept in row] for row in agree]
        splits = ("train", "train", "train", "dev", "dev", "calibration")
        return RewardMatrix(
            ids=tuple(f"{seed:016x}{at:016x}"[::-1] for at in range(prompts)),
            kinds=("choice",) * prompts,  # type: ignore[arg-type]
            splits=tuple(splits[at % 6] for at in range(prompts)),  # type: ignore[misc]
            tokens=tokens,
            programs=MENU,
            agree=torch.tensor(agree),
            share=torch.tensor(agree).float(),
            margin=torch.tensor(margin) + 0.05 * torch.randn(prompts, 3, generator=torch.Generator().manual_seed(seed)),
            right=torch.tensor(right),
            labelled=torch.ones(prompts, dtype=torch.bool),
            flops=torch.tensor(flops),
            model="tiny",
            fingerprint=model.fingerprint,
            dtype=model.dtype,
            bridges="",
            data="d",
        )

    return make
