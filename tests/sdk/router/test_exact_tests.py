"""Statistics: exact where exactness is claimed, checked against fractions, scipy and published values."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from polar_sdk.router.exact_tests import (
    binomial_cdf,
    least_paired_prompts,
    least_prompts,
    mcnemar,
    paired_difference,
    paired_loss_p,
    smallest_alpha,
    upper_loss,
    upper_share,
    wilson,
)


class TestAgainstScipy:
    """The run-time code needs no scipy; these hold it to scipy's answers for sizes that calibration has."""

    @given(n=st.integers(1, 5_000), data=st.data(), p=st.floats(0.001, 0.999))
    def test_binomial_tail(self, n: int, data: st.DataObject, p: float) -> None:
        k = data.draw(st.integers(0, n))
        assert binomial_cdf(k, n, p) == pytest.approx(binom.cdf(k, n, p), rel=1e-6, abs=1e-9)

    @given(n=st.integers(1, 3_000), data=st.data(), level=st.floats(0.001, 0.4))
    def test_upper_limit_of_clopper_and_pearson(self, n: int, data: st.DataObject, level: float) -> None:
        k = data.draw(st.integers(0, n - 1))
        assert upper_share(k, n, level) == pytest.approx(beta.ppf(1 - level, k + 1, n - k), rel=1e-6)

    @given(n=st.integers(1, 3_000), data=st.data())
    def test_interval_of_wilson(self, n: int, data: st.DataObject) -> None:
        k = data.draw(st.integers(0, n))
        expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert wilson(k, n)[1:] == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)

    @given(only_first=st.integers(0, 150), only_second=st.integers(0, 150))
    def test_mcnemar(self, only_first: int, only_second: int) -> None:
        first = [True] * only_first + [False] * only_second + [True]
        second = [False] * only_first + [True] * only_second + [True]
        split = only_first + only_second
        expected = binomtest(only_first, split).pvalue if split else 1.0
        assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_known_allowances_of_500_prompts() -> None:
    assert binomial_cdf(18, 500, 0.05) <= 0.1 < binomial_cdf(19, 500, 0.05)
    assert binomial_cdf(5, 500, 0.02) <= 0.1 < binomial_cdf(6, 500, 0.02)
    assert least_prompts(0.01, 0.1) == 230


@given(alpha=st.floats(0.001, 0.5), delta=st.floats(0.01, 0.5))
def test_fewest_prompts_are_fewest(alpha: float, delta: float) -> None:
    n = least_prompts(alpha, delta)
    assert binomial_cdf(0, n, alpha) <= delta * (1 + 1e-6)
    assert n == 1 or binomial_cdf(0, n - 1, alpha) > delta * (1 - 1e-6)
    assert smallest_alpha(n, delta) <= alpha * (1 + 1e-6)


def test_paired_difference_of_known_pairs() -> None:
    # 10 pairs, of which 3 differ one way and 1 the other: mean 0.2, standard error 0.2.
    mean, low, high = paired_difference([True] * 3 + [False] * 7, [False] * 3 + [True] + [False] * 6)
    assert (mean, round(low, 3), round(high, 3)) == (0.2, -0.192, 0.592)
    same = paired_difference([True] * 100, [True] * 100)
    assert same.value == 0 and same.low < 0 < same.high


def chances(n: int, up: float, down: float) -> dict[tuple[int, int], float]:
    """Probability of every (lost, gained) of n pairs."""
    return {
        (lost, gained): comb(n, lost)
        * comb(n - lost, gained)
        * up**lost
        * down**gained
        * max(0.0, 1 - up - down) ** (n - lost - gained)
        for lost in range(n + 1)
        for gained in range(n + 1 - lost)
    }


@pytest.mark.parametrize(
    ("alpha", "differ"), [(0.05, 0.05), (0.05, 0.2), (0.05, 0.5), (0.05, 1.0), (0.2, 0.21), (0.2, 0.4), (0.2, 1.0)]
)
def test_a_paired_promise_breaks_no_more_often_than_told(alpha: float, differ: float) -> None:
    """All outcomes of 24 pairs whose mean loss is α, the worst that "α or more" can be, whatever share differs."""
    outcomes = chances(24, (differ + alpha) / 2, (differ - alpha) / 2)
    assert sum(outcomes.values()) == pytest.approx(1)
    assert (
        sum(chance for (lost, gained), chance in outcomes.items() if paired_loss_p(lost, gained, 24, alpha, 0.1) <= 0.1)
        <= 0.1
    )


def test_a_paired_p_value_is_near_the_exact_tail() -> None:
    """Close to the normal test of so many pairs, and never far below it."""
    # Mean −10 / 1,300 against +0.02, standard error about 0.0135.
    assert 0.02 < paired_loss_p(150, 160, 1300, 0.02, 0.1) < 0.05
    assert paired_loss_p(170, 150, 1300, 0.02, 0.1) > 0.1


@given(n=st.integers(30, 200), lost=st.integers(0, 20), gained=st.integers(0, 20))
def test_a_paired_p_value_falls_with_what_is_gained(n: int, lost: int, gained: int) -> None:
    lost, gained = min(lost, n // 3), min(gained, n // 3)
    assert paired_loss_p(lost + 1, gained, n, 0.1, 0.1) >= paired_loss_p(lost, gained, n, 0.1, 0.1) - 1e-9


@given(alpha=st.floats(0.01, 0.5), delta=st.floats(0.01, 0.5))
def test_fewest_pairs_are_fewest(alpha: float, delta: float) -> None:
    n = least_paired_prompts(alpha, delta)
    assert paired_loss_p(0, 0, n, alpha, delta) <= delta
    assert least_paired_prompts(alpha, delta) >= least_prompts(alpha, delta)


@given(n=st.integers(20, 400), data=st.data(), level=st.floats(0.02, 0.3))
def test_upper_loss_is_where_the_test_of_pairs_no_longer_rejects(n: int, data: st.DataObject, level: float) -> None:
    lost, gained = data.draw(st.integers(0, n // 4)), data.draw(st.integers(0, n // 4))
    upper = upper_loss(lost, gained, n, level)
    assert upper > (lost - gained) / n
    assert upper <= upper_share(lost, n, level)
    if not gained:
        assert upper == upper_share(lost, n, level)
    elif upper < upper_share(lost, n, level):
        assert paired_loss_p(lost, gained, n, upper, level) <= level
        assert paired_loss_p(lost, gained, n, 0.98 * upper, level) > level or upper < 0.01


def test_a_prompt_that_is_gained_makes_up_for_one_that_is_lost() -> None:
    found = [upper_loss(lost, lost - net, 300, 0.1) for net in (0, 5) for lost in (5, 20, 60)]
    assert found[:3] == sorted(found[:3]), "where more change, less is known of what is lost"
    assert all(few < many for few, many in zip(found[:3], found[3:], strict=True))
