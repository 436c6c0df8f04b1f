"""The requests of a simulated day: when they come, from which tenant, on which tier, with which message.

Arrivals are an inhomogeneous Poisson process with the rate of `CURVE`, given their number: as many independent times
with the curve's density. Tenants, tiers and kinds of messages are drawn by `TENANTS`. The curve and the mix are made
up; `docs/results.md` states them. Knows no model and no money.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final, TypeVar

from benchmarks.day.messages import Kind, Use, make_message

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")
DAY: Final = 86_400
"""Length of a day. Unit: seconds."""
CURVE: Final = (
    *(0.35, 0.25, 0.20, 0.18, 0.20, 0.30, 0.50, 0.80, 1.05, 1.20, 1.25, 1.25),
    *(1.35, 1.30, 1.20, 1.20, 1.20, 1.25, 1.35, 1.40, 1.40, 1.20, 0.90, 0.60),
)
"""Relative rate of arrivals at each full hour, with straight lines between: a quiet night, a lunch hour, an evening."""
PEAK: Final = max(CURVE)
PEAK_TO_MEAN: Final = PEAK * len(CURVE) / math.fsum(CURVE)
"""The rate in the busiest moment over that of the day; the lines between the hours begin and end the day alike."""


@dataclass(frozen=True)
class Sender:
    """A tenant of the service: what it sends, how much of it, and on which tiers."""

    tenant: str
    use: Use
    share: float
    """Share of all requests."""
    kinds: Mapping[Kind, float]
    tiers: Mapping[str, float]
    budget: float
    """Budget over the maximum that its requests can take at full depth; under 1, some are refused."""


TENANTS: Final = (
    Sender(
        tenant="lingo",
        use="translate",
        share=0.4,
        kinds={"phrase": 0.70, "idiom": 0.25, "message": 0.05},
        tiers={"economy": 0.8, "standard": 0.2},
        budget=2.0,
    ),
    Sender(
        tenant="courier",
        use="chat",
        share=0.3,
        kinds={"phrase": 0.40, "idiom": 0.05, "message": 0.55},
        tiers={"economy": 0.3, "standard": 0.7},
        budget=2.0,
    ),
    Sender(
        tenant="helpdesk",
        use="chat",
        share=0.2,
        kinds={"phrase": 0.15, "idiom": 0.05, "message": 0.80},
        tiers={"premium": 0.75, "exact": 0.25},
        budget=2.0,
    ),
    Sender(
        tenant="starter",
        use="translate",
        share=0.1,
        kinds={"phrase": 0.50, "idiom": 0.50, "message": 0.0},
        tiers={"economy": 1.0},
        budget=0.6,
    ),
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the day."""

    number: int
    """From 0, in the order of arrival."""
    second: float
    """Second of the day."""
    tenant: str
    tier: str
    prompt: str
    max_tokens: int


def arrivals_of(requests: int, seed: int) -> list[Arrival]:
    """All requests of a day in order; everything about them follows from the seed."""
    contents = Random(f"{seed} contents")
    times = enumerate(arrival_times(requests, Random(f"{seed} times")))
    return [_arrival(number, second, contents) for number, second in times]


def _arrival(number: int, second: float, random: Random) -> Arrival:
    sender = random.choices(TENANTS, [sender.share for sender in TENANTS])[0]
    tier = _drawn(sender.tiers, random)
    kind = _drawn(sender.kinds, random)
    message = make_message(kind, sender.use, random)
    return Arrival(number, second, sender.tenant, tier, message.prompt, message.max_tokens)


def rate_at(second: float) -> float:
    """The curve at a moment of the day."""
    hour, between = divmod(second * len(CURVE) / DAY, 1)
    now, later = (CURVE[(int(hour) + step) % len(CURVE)] for step in (0, 1))
    return now + between * (later - now)


def arrival_times(count: int, random: Random) -> list[float]:
    """Times of arrival in order, by rejection: a moment is kept with its rate over the highest. Unit: seconds."""
    times: list[float] = []
    while len(times) < count:
        second = random.uniform(0, DAY)
        if random.uniform(0, PEAK) < rate_at(second):
            times.append(second)
    return sorted(times)


def _drawn(weights: Mapping[T, float], random: Random) -> T:
    return random.choices(list(weights), list(weights.values()))[0]
