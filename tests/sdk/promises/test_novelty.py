"""The detector of unusual prompts: silent while prompts are like those of the calibration, quick where they are not."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from polar_sdk.promises.novelty import Likeness, Novelty, Usual, Usualness, beginning, largest_share

if TYPE_CHECKING:
    from collections.abc import Callable

CENTRES = 6


def usual_prompt(dice: random.Random) -> Likeness:
    """Of six kinds, two of them rare, with lengths and distances of their own."""
    centre = dice.choices(range(CENTRES), (30, 30, 20, 15, 4, 1))[0]
    return Likeness(int(dice.lognormvariate(4 + centre / 3, 0.4)), dice.gammavariate(4, 0.1), centre)


def detector(seed: int, n: int = 300) -> Novelty:
    """Calibrated on prompts of that seed."""
    dice = random.Random(seed)
    return Novelty(Usual.of([usual_prompt(dice) for _ in range(n)], CENTRES))


FLOODS: dict[str, Callable[[random.Random], Likeness]] = {
    "one kind": lambda dice: usual_prompt(dice)._replace(centre=4),
    "longer than all": lambda dice: usual_prompt(dice)._replace(tokens=9_000),
    "shorter than all": lambda dice: usual_prompt(dice)._replace(tokens=2),
    "far from all": lambda dice: usual_prompt(dice)._replace(distance=5.0),
}


class TestAlarms:
    def test_usual_prompts_hardly_ever_raise_one(self) -> None:
        alarms = suspicions = 0
        for seed in range(30):
            novelty, dice = detector(seed), random.Random(-seed - 1)
            found = {novelty.observe(usual_prompt(dice)) for _ in range(700)}
            alarms += Usualness.UNUSUAL in found
            suspicions += len(found) > 1
        assert alarms <= 3
        assert suspicions <= 10

    @pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
    def test_a_flood_raises_one_and_its_end_takes_it_back(self, flood: Callable[[random.Random], Likeness]) -> None:
        novelty, dice = detector(1), random.Random(2)
        for _ in range(1000):
            novelty.observe(usual_prompt(dice))
        assert Usualness.UNUSUAL in [novelty.observe(flood(dice)) for _ in range(60)]
        assert [novelty.observe(usual_prompt(dice)) for _ in range(600)][-1] is Usualness.USUAL

    @pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
    def test_prompts_that_cannot_lose_raise_none_and_take_one_back(
        self, flood: Callable[[random.Random], Likeness]
    ) -> None:
        novelty, dice = detector(1), random.Random(2)
        assert {novelty.observe(flood(dice)._replace(harmless=True)) for _ in range(300)} == {Usualness.USUAL}
        assert Usualness.UNUSUAL in [novelty.observe(flood(dice)) for _ in range(300)]
        assert [novelty.observe(flood(dice)._replace(harmless=True)) for _ in range(600)][-1] is Usualness.USUAL

    def test_suspicion_comes_no_later_than_the_alarm(self) -> None:
        novelty, dice = detector(1), random.Random(2)
        found = [novelty.observe(FLOODS["one kind"](dice)) for _ in range(60)]
        order = [*Usualness]
        assert [order.index(each) for each in found] == sorted(order.index(each) for each in found)
        assert novelty.evidence > 3


PROMPTS = st.builds(
    Likeness, st.integers(1, 4000), st.floats(0, 100, allow_subnormal=False), st.integers(0, CENTRES - 1)
)


class TestUsual:
    @given(prompts=st.lists(PROMPTS, min_size=1, max_size=60), other=PROMPTS)
    def test_every_prompt_has_its_regions(self, prompts: list[Likeness], other: Likeness) -> None:
        usual = Usual.of(prompts, CENTRES)
        counted = [0] * len(usual.counts)
        for prompt in prompts:
            for region in usual.regions(prompt):
                counted[region] += 1
        assert tuple(counted[: CENTRES + len(usual.within) + 2]) == usual.counts[: CENTRES + len(usual.within) + 2]
        assert all(0 <= region < len(usual.counts) for region in usual.regions(other))

    def test_far_prompts_are_in_the_regions_of_the_far(self) -> None:
        usual = Usual.of([Likeness(10, place / 100, 0) for place in range(100)], 1)
        assert len(usual.regions(Likeness(10, 0.1, 0))) == 2
        assert len(usual.regions(Likeness(10, 0.99, 0))) == 4
        assert usual.beyond == (20, 5)


@given(n=st.integers(1, 2000), data=st.data(), level=st.floats(1e-6, 0.2))
def test_the_largest_share_is_that_of_clopper_and_pearson(n: int, data: st.DataObject, level: float) -> None:
    count = data.draw(st.integers(0, n - 1))
    assert largest_share(count, n, level) == pytest.approx(beta.ppf(1 - level, count + 1, n - count), rel=1e-6)


def test_what_begins_adds_up_to_all() -> None:
    assert sum(map(beginning, range(1, 2**16))) == pytest.approx(1 - 1 / 17)


@pytest.mark.parametrize(("delta", "suspicion"), [(0.0, 0.2), (0.3, 0.2), (0.05, 1.0)])
def test_limits_that_are_none(delta: float, suspicion: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        Novelty(detector(1).usual, delta, suspicion)
