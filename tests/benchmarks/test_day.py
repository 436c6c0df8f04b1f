"""The simulated day on the tiny engine: an open loop, budgets that refuse, the ledger's figures, and faults."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.day.__main__ import compare, day_seconds, same_answers
from benchmarks.day.arrivals import DAY, arrival_times, arrivals_of, rate_at
from benchmarks.day.trial import FULL_DEPTH, Trial, audit, run_trial
from polar_billing import ALL_TENANTS, Budgets, Ledger, Selection
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from polar_billing import StoredUsage
    from polar_sdk import PolarModel

HOUR = DAY // 24


def integral(until: float) -> float:
    """The curve's integral from midnight on, by the trapezium rule, which is exact between its corners."""
    corners = [*(hour * HOUR for hour in range(int(until // HOUR) + 1)), until]
    return math.fsum((later - now) * (rate_at(now) + rate_at(later)) / 2 for now, later in pairwise(corners))


class TestArrivals:
    @settings(max_examples=20)
    @given(st.integers(0, 2**32))
    def test_times_rescaled_by_the_curve_are_even(self, seed: int) -> None:
        """The largest distance from an even distribution, times √n, exceeds 3 in one of 30 million seeds."""
        times = arrival_times(300, Random(seed))
        assert times == sorted(times)
        even = [integral(time) / integral(DAY) for time in times]
        furthest = max(max(place / 300 - time, time - (place - 1) / 300) for place, time in enumerate(even, 1))
        assert furthest * math.sqrt(300) < 3

    def test_everything_follows_from_the_seed(self) -> None:
        assert arrivals_of(40, 1) == arrivals_of(40, 1) != arrivals_of(40, 2)
        assert [arrival.number for arrival in arrivals_of(40, 1)] == list(range(40))


@pytest.fixture(scope="module")
def model() -> PolarModel:
    return tiny_model(context_window=1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledgers")


@pytest.fixture(scope="module")
def both(model: PolarModel, folder: Path) -> tuple[Trial, Trial]:
    """A day of forty requests at full depth and routed; all arrive at once."""
    torch.set_num_threads(1)  # as in every test; a fixture of the module is made before that of the test
    return compare(model, folder, 40, 1e-4, 5)


def stored(path: Path) -> list[StoredUsage]:
    with Ledger(f"sqlite:///{path}") as ledger:
        return list(ledger.read(Selection(ALL_TENANTS)))


class TestBothWays:
    def test_one_runs_at_full_depth_and_one_as_drawn(self, both: tuple[Trial, Trial], folder: Path) -> None:
        drawn = {f"day-{arrival.number}": arrival for arrival in arrivals_of(40, 5)}
        full, routed = (stored(folder / f"{way}-seed-5.sqlite3") for way in ("full-depth", "routed"))
        assert {usage.record.tier for usage in full} == {FULL_DEPTH}
        assert all(usage.record.tier == drawn[usage.record.request_id].tier for usage in routed)
        assert both[0].total.saved == 0 < both[1].total.saved < 0.5
        tokens = [{one.record.request_id: one.record.tokens.input for one in usages} for usages in (full, routed)]
        assert len(tokens[0].keys() & tokens[1].keys()) > 30
        assert all(tokens[0][one] == tokens[1][one] for one in tokens[0].keys() & tokens[1].keys())

    def test_figures_are_those_of_the_ledger(self, both: tuple[Trial, Trial], folder: Path) -> None:
        for trial, way in zip(both, ("full-depth", "routed"), strict=True):
            assert trial.faults == []
            records = stored(folder / f"{way}-seed-5.sqlite3")
            for tier, share in trial.tiers.items():
                own = [usage for usage in records if usage.record.tier == tier]
                assert share.requests == len(own)
                assert share.flops == sum(usage.record.flops.total for usage in own)
                assert share.identity_flops == sum(usage.record.identity_flops for usage in own)
                assert share.cost == sum((usage.cost or Decimal(0) for usage in own), Decimal(0))

    def test_budgets_refuse_and_are_never_overspent(self, both: tuple[Trial, Trial], folder: Path) -> None:
        for trial, way in zip(both, ("full-depth", "routed"), strict=True):
            assert trial.ends["answered"] + trial.ends["refused"] == 40
            assert trial.total.requests == trial.ends["answered"] == len(trial.latencies)
            with Ledger(f"sqlite:///{folder / f'{way}-seed-5.sqlite3'}") as ledger:
                (starter,) = Budgets(ledger).standings("starter")
                assert starter.spent <= starter.budget.limit_count
        assert both[0].ends["refused"]

    def test_full_depth_answers_alike_in_any_company(self, both: tuple[Trial, Trial]) -> None:
        assert 0 < same_answers(*both) < 1
        assert same_answers(*both, "premium") == 1  # the tiny model's premium is full depth, and it runs in float32


class TestTrial:
    def test_requests_are_sent_though_none_is_answered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a closed loop the second would wait for the first, which waits for it."""
        together, reserve = threading.Barrier(3, timeout=30), Budgets.reserve

        def wait(*args: Any, **facts: Any) -> Any:
            together.wait()
            return reserve(*args, **facts)

        monkeypatch.setattr(Budgets, "reserve", wait)
        model = tiny_model(context_window=1024)
        assert run_trial(model, tmp_path / "t.sqlite3", [(0.0, one) for one in arrivals_of(3, 0)], {}).faults == []

    def test_an_error_of_ours_is_counted_and_a_bug_raised(
        self, model: PolarModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arrivals = [(0.0, arrival) for arrival in arrivals_of(2, 0)]
        counted = run_trial(model, tmp_path / "gold.sqlite3", arrivals, {}, tier="gold")
        assert counted.ends.total() == 2 == len(counted.failed)
        assert counted.faults == []

        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(type(model), "generate", fail)
        with pytest.raises(ZeroDivisionError):
            run_trial(model, tmp_path / "bug.sqlite3", arrivals, {})

    def test_faults_of_the_ledger_are_found(self, model: PolarModel, tmp_path: Path) -> None:
        path = tmp_path / "t.sqlite3"
        trial = run_trial(model, path, [(0.0, arrival) for arrival in arrivals_of(6, 0)], {})
        assert trial.ends == {"answered": 6}
        assert trial.faults == []
        (never_sent, *others), lost = trial.answers, trial.answers | {77: ("exact", 0)}
        assert faults(trial, path, lost) == ["1 requests are answered, but not in the ledger: day-77"]
        sent = {number: trial.answers[number] for number in others}
        assert faults(trial, path, sent) == [f"1 requests are in the ledger, but never admitted: day-{never_sent}"]
        with closing(sqlite3.connect(path)) as database, database:
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                database.execute(f'DROP TRIGGER "{name}"')
            database.execute("UPDATE polar_usage SET tokens_output = tokens_output + 1 WHERE seq = 1")
        assert faults(trial, path, trial.answers)

    @pytest.mark.long
    def test_capacity_is_measured_and_leaves_no_setting_behind(self, model: PolarModel) -> None:
        limits = model.scheduler.limits
        assert day_seconds(model, 300, 0.7) > 0
        assert model.scheduler.limits == limits


def faults(trial: Trial, path: Path, answers: dict[int, tuple[str, int]]) -> list[str]:
    """Faults of a ledger, had these requests been answered."""
    seen = replace(trial, answers=answers, faults=[])
    with Ledger(f"sqlite:///{path}") as ledger:
        audit(seen, ledger)
    return seen.faults


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "figure"),
    [
        (["--seeds", "2"], "same answers as at full depth: routed"),
        (["--soak", "0.05"], "memory at the end against the beginning"),
    ],
)
def test_the_command(tmp_path: Path, arguments: list[str], figure: str) -> None:
    command = [sys.executable, "-m", "benchmarks.day", "--tiny", "--requests", "20", "--factor", "1e5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # matrices so small that a second thread only waits
    done = subprocess.run(
        [*command, *arguments, "--results", str(tmp_path)],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    (path,) = tmp_path.glob("*.json")
    assert figure in {one["name"] for one in json.loads(path.read_text(encoding="utf-8"))["figures"]}
    assert "ledger sound" in done.stdout
