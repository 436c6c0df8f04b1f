"""Trials on the tiny engine: open loop, budgets that refuse, figures of the ledger, and what the audit finds."""

from __future__ import annotations

import threading
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_billing import ALL_TENANTS, Budgets, Ledger, Selection
from polar_billing.reports.figures import percentile
from polar_sdk import ListSink
from polar_sdk.errors import InvalidRequestError
from polar_sdk.show.progress import silent
from polar_sdk.testing import tiny_model
from polar_simulate.audit import audit
from polar_simulate.capacity import Speed, measure_capacity, unshared_starts
from polar_simulate.comparison import Comparison, compare
from polar_simulate.day import DAY, Day
from polar_simulate.load import Load
from polar_simulate.tally import Sent, Tally
from polar_simulate.trial import FULL_DEPTH, Trial, compute_needed, run_trial

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polar_billing import StoredUsage
    from polar_sdk import PolarModel
    from polar_sdk.usage import UsageBound

FACTOR = 1e9
"""Everything arrives at once."""


@pytest.fixture(scope="module")
def model() -> PolarModel:
    return tiny_model(context_window=1024)


@pytest.fixture(scope="module")
def comparison(model: PolarModel, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two days of forty requests, in both ways."""
    folder = tmp_path_factory.mktemp("ledgers")
    return compare(model, folder, Speed.given(FACTOR, 40), [5, 6], silent)


def stored(trial: Trial) -> list[StoredUsage]:
    with Ledger(f"sqlite:///{trial.ledger}") as ledger:
        return list(ledger.read(Selection(ALL_TENANTS)))


class TestLoad:
    def test_requests_are_sent_though_none_is_answered(self) -> None:
        """In a closed loop the second would wait for the first, which waits for it."""
        together = threading.Barrier(3, timeout=30)

        class Gate(ListSink):
            def reserve(self, bound: UsageBound) -> int:
                together.wait()
                return super().reserve(bound)

        gate, ended = Gate(), Tally()
        load = Load(tiny_model(sink=gate, context_window=1024), tier=None, prefix="open", on_end=ended.add)
        load.run((0.0, arrival) for arrival in Day(3).arrivals)
        assert ended.ends == {"answered": 3}
        assert {record.request_id for record in gate.records} == {"open-0", "open-1", "open-2"}

    def test_an_error_that_is_a_bug_is_raised(self) -> None:
        class Broken(ListSink):
            def reserve(self, bound: UsageBound) -> int:
                raise ZeroDivisionError("a bug")

        load = Load(tiny_model(sink=Broken(), context_window=1024), tier=None, prefix="bug")
        with pytest.raises(ZeroDivisionError):
            load.run((0.0, arrival) for arrival in Day(3).arrivals)

    def test_an_error_of_ours_is_counted(self) -> None:
        ended = Tally()
        load = Load(tiny_model(context_window=1024), tier="gold", prefix="gold", on_end=ended.add)
        load.run((0.0, arrival) for arrival in Day(2).arrivals)
        assert ended.ends == {"failed": 2}
        assert all("gold" in error for error in ended.errors)

    def test_none_is_sent_after_the_end(self) -> None:
        ended = Tally()
        load = Load(tiny_model(context_window=1024), tier=None, prefix="end", on_end=ended.add)
        load.run(((60.0 * arrival.number, arrival) for arrival in Day(3).arrivals), until=30.0)
        assert ended.sent == 1


class TestBothWays:
    def test_each_day_was_served_in_both(self, comparison: Comparison) -> None:
        assert [trial.seed for trial in comparison.full] == [trial.seed for trial in comparison.routed] == [5, 6]
        assert not comparison.interrupted
        assert comparison.faults == []

    def test_they_got_the_same_prompts(self, comparison: Comparison) -> None:
        """Of the same tenants, with as many tokens; and not everything else is the same."""
        for full, routed in zip(comparison.full, comparison.routed, strict=True):
            tokens = [
                {usage.record.request_id: (usage.record.tenant, usage.record.tokens.input) for usage in stored(trial)}
                for trial in (full, routed)
            ]
            both = tokens[0].keys() & tokens[1].keys()
            assert len(both) > 30
            assert all(tokens[0][one] == tokens[1][one] for one in both)

    def test_one_runs_at_full_depth_and_one_as_drawn(self, comparison: Comparison) -> None:
        drawn = {(seed, arrival.number): arrival.tier for seed in (5, 6) for arrival in Day(40, seed).arrivals}
        for trial in comparison.full:
            assert {usage.record.tier for usage in stored(trial)} == {FULL_DEPTH}
            assert trial.audit.figures.saved == 0
        for trial in comparison.routed:
            for usage in stored(trial):
                number = int(usage.record.request_id.rpartition("-")[2])
                assert usage.record.tier == drawn[trial.seed, number]
            assert 0 < trial.audit.figures.saved < 0.5

    def test_figures_are_those_of_the_ledger(self, comparison: Comparison) -> None:
        for trial in comparison.trials:
            usages = stored(trial)
            self.check(trial.as_json(), usages)
            for tier, share in trial.as_json()["by_tier"].items():
                self.check(share, [usage for usage in usages if usage.record.tier == tier])

    @staticmethod
    def check(figures: dict[str, object], usages: Sequence[StoredUsage]) -> None:
        records = [usage.record for usage in usages]
        assert figures["requests"] == len(records)
        assert figures["flops"] == sum(record.flops.total for record in records)
        assert figures["identity_flops"] == sum(record.identity_flops for record in records)
        assert figures["tokens_output"] == sum(record.tokens.output for record in records)
        cost = sum((usage.cost for usage in usages if usage.cost is not None), Decimal(0))
        assert Decimal(str(figures["cost"])) == cost
        assert Decimal(str(figures["cost_per_1000"])) == cost * 1000 / len(records)

    def test_at_one_price_money_is_compute(self, comparison: Comparison) -> None:
        """The example book charges compute alone: 0.0004 USD per CU. Costs are rounded to 12 decimals each."""
        for trial in comparison.trials:
            figures = trial.audit.figures
            assert figures.cost_one_price is not None
            compute = Decimal(figures.flops) / 10**12 * Decimal("0.0004")
            assert abs(figures.cost_one_price - compute) < Decimal("1e-11") * figures.requests

    def test_same_answers_are_counted_where_both_answered(self, comparison: Comparison) -> None:
        for share in comparison.same_answers():
            assert 0 < share < 1
        assert set(comparison.same_answers("premium")) == {1.0}  # full depth, in float32, depends on no company
        assert comparison.same_answers("gold") == []


class TestBudgets:
    def test_they_refuse_and_are_never_overspent(self, comparison: Comparison) -> None:
        for trial in comparison.trials:
            assert set(trial.tally.refused_by_tenant) <= {"starter"}
            assert trial.tally.ends["refused"] == sum(trial.tally.refused_by_tenant.values())
            with Ledger(f"sqlite:///{trial.ledger}") as ledger:
                (starter,) = Budgets(ledger).standings("starter")
                assert starter.spent <= starter.budget.limit_count
                assert Budgets(ledger).holds(ALL_TENANTS) == []
        assert all(trial.tally.ends["refused"] for trial in comparison.full)

    def test_refused_requests_are_in_no_ledger(self, comparison: Comparison) -> None:
        for trial in comparison.trials:
            assert trial.audit.figures.requests == trial.tally.sent - trial.tally.ends["refused"]


class TestAudit:
    @pytest.fixture
    def trial(self, model: PolarModel, tmp_path: Path) -> Trial:
        arrivals = Day(6).arrivals
        needed = {tenant: 9 * compute for tenant, compute in compute_needed(model, arrivals).items()}
        return run_trial(model, arrivals, tmp_path / "t.sqlite3", seed=0, tier=None, factor=FACTOR, needed=needed)

    def faults(self, trial: Trial, tally: Tally) -> tuple[str, ...]:
        return audit(trial.ledger, tally, lambda number: f"seed-0-{number}", trial.book).faults

    def test_all_is_well(self, trial: Trial) -> None:
        assert trial.tally.ends == {"answered": 6}
        assert self.faults(trial, trial.tally) == ()

    def test_a_request_that_was_lost(self, trial: Trial) -> None:
        trial.tally.admitted.append(77)
        assert self.faults(trial, trial.tally) == ("1 requests are answered, but not in the ledger: seed-0-77.",)

    def test_a_record_that_nobody_sent(self, trial: Trial) -> None:
        number = trial.tally.admitted.pop()
        (fault,) = self.faults(trial, trial.tally)
        assert fault == f"1 requests are in the ledger, but never admitted: seed-0-{number}."
        trial.tally.failed.append(number)  # an error may come before the record or after it
        assert self.faults(trial, trial.tally) == ()

    def test_a_ledger_that_was_changed(self, trial: Trial) -> None:
        import sqlite3

        with sqlite3.connect(trial.ledger) as database:
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                database.execute(f'DROP TRIGGER "{name}"')
            database.execute("UPDATE polar_usage SET tokens_output = tokens_output + 1 WHERE seq = 1")
        assert self.faults(trial, trial.tally)

    def test_an_older_ledger_of_the_name_is_replaced(self, trial: Trial, model: PolarModel) -> None:
        (trial.ledger.parent / "t.sqlite3.spool").mkdir(exist_ok=True)
        arrivals = Day(2).arrivals
        again = run_trial(
            model,
            arrivals,
            trial.ledger,
            seed=0,
            tier=FULL_DEPTH,
            factor=FACTOR,
            needed={tenant: 9 * compute for tenant, compute in compute_needed(model, arrivals).items()},
        )
        assert again.audit.figures.requests == 2
        assert again.audit.faults == ()


class TestSpeed:
    def test_a_load_is_that_of_the_busiest_moment(self) -> None:
        speed = Speed.of_load(0.7, 300, capacity=6.0)
        assert speed.peak == pytest.approx(4.2)
        assert speed.seconds == pytest.approx(DAY / speed.factor)

    def test_capacity_is_measured_and_leaves_nothing(self, model: PolarModel) -> None:
        seen: list[int] = []
        limits = model.scheduler.limits
        with unshared_starts(model):
            assert model.scheduler.limits == replace(limits, prefix_share=0)
            assert measure_capacity(model, progress=lambda done, total: seen.append(total - done)) > 0
        assert seen[-1] == 0
        assert model.scheduler.limits == limits

    @pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_factor_that_is_none(self, factor: float) -> None:
        with pytest.raises(InvalidRequestError, match="out of range; use a number above 0"):
            Speed.given(factor, 10)


class TestTally:
    @given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 100))
    def test_a_percentile_has_as_many_at_or_below_it(self, values: list[float], percent: int) -> None:
        found = percentile(sorted(values), percent)
        assert found in values
        assert 100 * sum(value <= found for value in values) >= percent * len(values)
        assert 100 * sum(value < found for value in values) < percent * len(values)

    def test_of_nothing_there_is_none(self) -> None:
        assert percentile([], 50) is None

    def test_ends_are_kept_apart(self) -> None:
        tally = Tally()
        for number, end in enumerate(("answered", "refused", "queue full", "cancelled", "failed")):
            tally.add(Sent(number, "acme", "exact", end, 1.0, 0.5, answer=number, error=None))  # type: ignore[arg-type]
        assert list(tally.admitted) == [0, 3]
        assert list(tally.failed) == [4]
        assert tally.refused_by_tenant == {"acme": 1}
        assert {tier: list(latencies) for tier, latencies in tally.latencies.items()} == {"exact": [1.0]}
        assert tally.answers == {0: 0}
        assert tally.latest == 0.5
