"""A fixed few hundred schedules hold every invariant, and broken products are found.

In processes of their own, because the simulator replaces names in the product's modules, and because the order of sets
is part of a schedule.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def simulate(*arguments: str) -> tuple[dict[str, Any], str]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "billing", "integrations"))
    ran = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result, ran.stderr


@pytest.mark.parametrize("schedules", [40, pytest.param(200, marks=pytest.mark.long)])
def test_schedules_hold_every_invariant(schedules: int) -> None:
    result, problems = simulate("--schedules", str(schedules))
    assert result["schedules"] == schedules
    assert result["invariants_broken"] == 0, problems


@pytest.mark.parametrize(
    "mutations",
    [
        ("settle-twice", "forget-to-free", "answer-before-writing"),
        ("record-twice", "leave-before-the-end", "mix-rows", "miss-the-end"),
    ],
)
def test_a_broken_product_is_found(mutations: tuple[str, ...]) -> None:
    """The others, which take longer, are run by `python -m tests.simulation --mutate`."""
    result, problems = simulate("--mutate", *mutations)
    assert result["found"] == len(mutations), problems


@pytest.mark.parametrize("schedule", ["ledger:7", "serving:7"])
def test_a_schedule_repeats_itself(schedule: str) -> None:
    _, first = simulate("--repeat", schedule, "--trace")
    _, again = simulate("--repeat", schedule, "--trace")
    assert first.count("\n") > 100
    assert first == again
