"""The monitor of a promise: a bet that loses on average while the promise holds, and the same everywhere."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.promises.monitor import Monitor, State

SHARES: Final = st.fractions(Fraction(1, 500), Fraction(19, 20), max_denominator=1000)
AUDITS: Final = st.lists(st.booleans(), max_size=80)


def stakes(monitor: Monitor) -> int:
    """All stakes in the smallest unit."""
    return monitor._total


class TestWhileThePromiseHolds:
    @given(alpha=SHARES, audits=AUDITS)
    def test_no_audit_raises_the_stakes_on_average(self, alpha: Fraction, audits: list[bool]) -> None:
        before = Monitor.of(float(alpha), 0.05, audits)
        lost, kept = before.observe(True), before.observe(False)
        assert alpha * stakes(lost) + (1 - alpha) * stakes(kept) <= stakes(before)
        assert stakes(kept) <= stakes(lost), "and still less where fewer are lost than is allowed"

    @pytest.mark.parametrize(("alpha", "streams"), [(0.05, 400), (0.5, 200)])
    def test_it_is_hardly_ever_at_risk(self, alpha: float, streams: int) -> None:
        dice, delta, alarms = random.Random(7), 0.1, 0
        for _ in range(streams):
            monitor = Monitor(alpha, delta)
            for _ in range(400):
                monitor = monitor.observe(dice.random() < alpha)
            alarms += monitor.state is State.AT_RISK
        assert alarms <= streams * delta + 3 * math.sqrt(streams * delta * (1 - delta))

    def test_it_is_hardly_ever_at_risk_where_doubts_have_more_audited(self) -> None:
        dice, streams, delta, alarms, audits = random.Random(11), 200, 0.1, 0, [0, 0]
        for _ in range(streams):
            monitor, requests = Monitor(0.05, delta), 0
            while requests < 4_000:
                requests += 1
                if dice.random() < (0.5 if monitor.doubtful else 0.02):
                    audits[monitor.doubtful] += 1
                    monitor = monitor.observe(dice.random() < 0.05)
            alarms += monitor.state is State.AT_RISK
        assert alarms <= streams * delta + 3 * math.sqrt(streams * delta * (1 - delta))
        assert 0 < audits[True] < audits[False], "and doubts are few, and short"

    def test_the_interval_covers_chances_that_change(self) -> None:
        dice, streams, missed = random.Random(3), 60, 0
        for _ in range(streams):
            monitor, chances = Monitor(0.05, 0.1), 0.0
            for audit in range(1, 201):
                chance = 0.02 if audit < 100 else 0.3
                chances += chance
                monitor = monitor.observe(dice.random() < chance)
                low, high = monitor.interval if audit % 20 == 0 else (0.0, 1.0)
                if not low <= chances / audit <= high:
                    missed += 1
                    break
        assert missed <= 0.1 * streams


class TestWhereItIsBroken:
    @pytest.mark.parametrize(("good", "within"), [(0, 260), (50, 330), (2000, 650)])
    def test_twice_the_allowed_losses_are_noticed_after_a_long_good_time(self, good: int, within: int) -> None:
        monitor = Monitor.of(0.05, 0.05, [False] * good)
        found = next(
            audit for audit in range(1, 10_000) if (monitor := monitor.observe(audit % 10 == 0)).state is State.AT_RISK
        )
        assert found <= within

    def test_at_risk_is_not_taken_back(self) -> None:
        monitor = Monitor.of(0.05, 0.05, [True] * 3)
        assert monitor.state is State.AT_RISK
        assert Monitor.of(0.05, 0.05, [True] * 3 + [False] * 2000).state is State.AT_RISK

    @given(audits=AUDITS.filter(bool), data=st.data())
    def test_one_more_loss_never_speaks_for_the_promise(self, audits: list[bool], data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(audits) - 1))
        kept, lost = ([*audits[:place], fate, *audits[place + 1 :]] for fate in (False, True))
        fewer, more = Monitor.of(0.05, 0.05, kept), Monitor.of(0.05, 0.05, lost)
        assert fewer.evidence <= more.evidence
        assert fewer.state is State.IN_FORCE or more.state is State.AT_RISK
        assert fewer.interval[0] <= more.interval[0]
        assert fewer.interval[1] <= more.interval[1]

    def test_the_stakes_stay_small_numbers(self) -> None:
        monitor = Monitor.of(0.01, 0.05, [True] * 5000)
        assert stakes(monitor).bit_length() < 256


@given(audits=AUDITS, alpha=SHARES, cut=st.integers(0, 80))
def test_it_is_rebuilt_from_its_audits_or_its_text(audits: list[bool], alpha: Fraction, cut: int) -> None:
    whole = Monitor.of(float(alpha), 0.05, audits)
    begun = Monitor.of(float(alpha), 0.05, audits[:cut])
    grown = Monitor.restored(float(alpha), 0.05, begun.text)
    assert grown == begun
    for lost in audits[cut:]:
        grown = grown.observe(lost)
    assert grown == whole
    assert (grown.evidence, grown.interval) == (whole.evidence, whole.interval)


def test_the_evidence_is_the_sum_of_all_bets() -> None:
    alpha, lost = 0.05, [audit % 6 == 0 for audit in range(1, 61)]
    total = 1.0
    for start in range(60):
        block = (start + 1).bit_length()
        prior = 1 / (block * (block + 1) * 2 ** (block - 1))
        bets = [
            math.prod((odds if each else 1) / (1 + (odds - 1) * alpha) for each in lost[start:])
            for odds in (1.5, 2, 3, 6, 16)
        ]
        total += prior * (sum(bets) / 5 - 1)  # what has not begun is still there
    assert Monitor.of(alpha, 0.05, lost).evidence == pytest.approx(math.log(total), abs=1e-4)


def test_figures_that_every_machine_computes() -> None:
    monitor = Monitor.of(0.05, 0.05, [audit % 7 == 0 for audit in range(1, 201)])
    assert (monitor.audits, monitor.losses, monitor.state) == (200, 28, State.AT_RISK)
    assert (monitor.evidence, monitor.interval) == (10.0839, (0.0704, 0.2356))


@given(audits=AUDITS)
def test_the_interval_holds_what_was_seen(audits: list[bool]) -> None:
    monitor = Monitor.of(0.05, 0.05, audits)
    low, high = monitor.interval
    seen = sum(audits) / len(audits) if audits else 0.5
    assert 0 <= low - 1e-4 <= seen <= high + 1e-4 <= 1.0001 or low == 0


@pytest.mark.parametrize(("alpha", "delta"), [(0.0, 0.05), (1.0, 0.05), (0.05, 0.0), (0.05, 1.5), (math.nan, 0.05)])
def test_shares_that_are_none(alpha: float, delta: float) -> None:
    with pytest.raises(ValueError, match="is"):
        Monitor(alpha, delta)


@pytest.mark.parametrize("text", ["", "1 2", "1 0 0 1 1 1 1 1 1 x", "1 2 0 1 1 1 1 1 1 1", "1 0 0 1 1 1 1 1 -1 1"])
def test_texts_of_no_monitor(text: str) -> None:
    with pytest.raises(ValueError, match=r"monitor|values|invalid"):
        Monitor.restored(0.05, 0.05, text)


@pytest.mark.parametrize(("alpha", "losses"), [(0.01, 1), (0.3, 1), (0.45, 2), (0.8, 6)])
def test_a_doubt_begins_with_a_few_losses_and_ends_with_a_few_audits_that_kept(alpha: float, losses: int) -> None:
    monitor, lost = Monitor.of(alpha, 0.05, [False] * 40), 0
    while not monitor.doubtful:
        monitor, lost = monitor.observe(True), lost + 1
    assert lost == losses
    for _ in range(6):
        monitor = monitor.observe(False)
    assert not monitor.doubtful
    assert not Monitor.of(alpha, 0.05, [True] * 4000).doubtful, "what is decided is no doubt"
