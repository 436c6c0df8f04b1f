"""The simulated day: its Poisson process, its mix, its messages; all of it from the seed."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from polar_simulate.day import CURVE, DAY, PEAK, PEAK_TO_MEAN, TENANTS, Day, arrival_times, rate_at
from polar_simulate.messages import KINDS, MAX_TOKENS, make_message
from polar_simulate.prompt_file import FilePrompt

SIGMAS = 6
"""One seed in a billion is further from its expectation."""
STEPS = 96
HOUR = DAY // 24


def integral(until: float) -> float:
    """Of the curve from midnight on, by the trapezium rule, which is exact for straight lines between its corners."""
    corners = [*(hour * HOUR for hour in range(int(until // HOUR) + 1)), until]
    return math.fsum((later - now) * (rate_at(now) + rate_at(later)) / 2 for now, later in pairwise(corners))


WHOLE = integral(DAY)


class TestTimes:
    @given(st.integers(0, 2**32))
    def test_every_quarter_of_the_day_has_as_many_as_a_poisson_process(self, seed: int) -> None:
        """Given their total, the counts of a Poisson process are binomial."""
        total = 400
        times = arrival_times(total, Random(seed))
        assert times == sorted(times)
        assert 0 <= times[0] <= times[-1] <= DAY
        for start in range(0, DAY, DAY // 4):
            share = (integral(start + DAY // 4) - integral(start)) / WHOLE
            count = sum(start <= time < start + DAY // 4 for time in times)
            assert abs(count - total * share) <= SIGMAS * math.sqrt(total * share * (1 - share))

    @given(st.integers(0, 2**32))
    def test_rescaled_by_the_curve_they_are_even(self, seed: int) -> None:
        """The largest distance from an even distribution, times √n, exceeds 3 in one of 30 million seeds."""
        even = [integral(time) / WHOLE for time in arrival_times(300, Random(seed))]
        furthest = max(max(place / 300 - time, time - (place - 1) / 300) for place, time in enumerate(even, 1))
        assert furthest * math.sqrt(300) < 3

    def test_the_curve(self) -> None:
        assert rate_at(0) == CURVE[0]
        assert rate_at(1.5 * HOUR) == (CURVE[1] + CURVE[2]) / 2
        assert rate_at(23.5 * HOUR) == (CURVE[23] + CURVE[0]) / 2
        assert math.isclose(PEAK / (WHOLE / DAY), PEAK_TO_MEAN)


class TestDay:
    @given(st.integers(0, 1000))
    def test_the_seed_says_everything(self, seed: int) -> None:
        day, again, other = (Day(40, one).arrivals for one in (seed, seed, seed + 1))
        assert day == again
        assert day != other
        assert [arrival.number for arrival in day] == list(range(40))

    def test_tenants_tiers_and_kinds_come_as_often_as_stated(self) -> None:
        assert math.isclose(sum(sender.share for sender in TENANTS), 1)
        total = 5_000
        arrivals = Day(total).arrivals
        pairs = Counter((arrival.tenant, arrival.tier) for arrival in arrivals)
        kinds = Counter((arrival.tenant, arrival.kind) for arrival in arrivals)
        for sender in TENANTS:
            for drawn, weights in ((pairs, sender.tiers), (kinds, sender.kinds)):
                assert math.isclose(sum(weights.values()), 1)
                for name, weight in weights.items():
                    share = sender.share * weight
                    bound = SIGMAS * math.sqrt(total * share * (1 - share))
                    assert abs(drawn[sender.tenant, name] - total * share) <= bound

    def test_the_mix_is_what_was_drawn(self) -> None:
        day = Day(100, seed=3)
        assert {name: sum(counts.values()) for name, counts in day.mix.items()} == dict.fromkeys(day.mix, 100)
        assert day.mix["tier"] == Counter(arrival.tier for arrival in day.arrivals)

    def test_prompts_of_a_file_go_before_what_is_drawn(self) -> None:
        own = [FilePrompt(prompt="one", tenant="mine", tier="exact", max_tokens=3), FilePrompt(prompt="two")]
        arrivals = Day(50, prompts=own).arrivals
        assert {arrival.prompt for arrival in arrivals} == {"one", "two"}
        for arrival in arrivals:
            assert arrival.kind == "file"
            if arrival.prompt == "one":
                assert (arrival.tenant, arrival.tier, arrival.max_tokens) == ("mine", "exact", 3)
            else:
                assert arrival.tenant in {sender.tenant for sender in TENANTS}


class TestMessages:
    def test_they_are_whole_and_differ(self) -> None:
        for kind in KINDS:
            for use in ("translate", "chat"):
                random = Random(f"{kind} {use}")
                made = [make_message(kind, use, random) for _ in range(300)]
                assert all(message.prompt and "{" not in message.prompt for message in made)
                assert {message.max_tokens for message in made} == {MAX_TOKENS[kind]}
                assert len({message.prompt for message in made}) > 50

    def test_kinds_differ_in_length(self) -> None:
        random = Random(0)
        words = {
            kind: sum(len(make_message(kind, "chat", random).prompt.split()) for _ in range(200)) for kind in KINDS
        }
        assert words["message"] > 3 * words["idiom"]
        assert words["idiom"] > words["phrase"]
