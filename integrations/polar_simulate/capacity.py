"""How many requests this machine answers per second at full depth, measured before a simulation; and the load it gets.

The day is accelerated so far that its busiest moment brings a stated share of that. Knows no ledger that stays.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from polar_sdk import PolarModel
from polar_sdk.errors import InvalidRequestError
from polar_simulate.day import DAY, PEAK_TO_MEAN, Day
from polar_simulate.trial import FULL_DEPTH, compute_needed, metered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polar_simulate.day import Arrival
    from polar_simulate.prompt_file import FilePrompt

CALLERS: Final = 32
"""Requests at a time while capacity is measured: as many as the engine runs together."""
STEADY: Final = 128
"""Requests that are timed, while all callers are busy; as many as there are callers go before them, and after."""
_SEED: Final = -1
"""Of the prompts, which are on no simulated day."""


@dataclass(frozen=True)
class Speed:
    """How fast the day runs."""

    factor: float
    """How many times as fast as the clock."""
    requests: int
    """Of the day."""
    capacity: float | None
    """Measured at full depth, all callers busy; None where the factor was given. Unit: requests/s."""

    @property
    def peak(self) -> float:
        """Arrivals in the busiest moment. Unit: requests/s."""
        return self.requests / self.seconds * PEAK_TO_MEAN

    @property
    def seconds(self) -> float:
        """Length of the accelerated day."""
        return DAY / self.factor

    @classmethod
    def given(cls, factor: float, requests: int) -> Speed:
        """A factor of the caller's.

        Raises:
            InvalidRequestError: It is no number above 0.
        """
        if not 0 < factor < math.inf:
            raise InvalidRequestError(f"the factor {factor} is out of range; use a number above 0.")
        return cls(factor, requests, None)

    @classmethod
    def of_load(cls, load: float, requests: int, capacity: float) -> Speed:
        """A load in the busiest moment, as a share of the capacity at full depth."""
        return cls(load * capacity / PEAK_TO_MEAN * DAY / requests, requests, capacity)


def check_load(load: float) -> None:
    """Refuse a load that is no share of a capacity.

    Raises:
        InvalidRequestError: It is not above 0, or more than ten times what the machine can do.
    """
    if not 0 < load <= 10:
        raise InvalidRequestError(
            f"the load {load} is out of range; use a share of full depth's capacity, such as 0.7."
        )


@contextmanager
def unshared_starts(model: PolarModel) -> Iterator[None]:
    """Keep no starts of prompts: the second trial of a day would find those of the first."""
    limits = model.scheduler.limits
    model.scheduler.limits = replace(limits, prefix_share=0)
    try:
        yield
    finally:
        model.scheduler.limits = limits


def warm_up(model: PolarModel, prompts: Sequence[FilePrompt] = ()) -> None:
    """Answer some messages on every tier, unmetered, so that the first trial does not pay for what is done once."""
    unmetered = PolarModel(model.loaded, policy=model.policy, router=model.router, ledger=None)
    arrivals = Day(CALLERS, _SEED, prompts).arrivals
    for tiers in ([arrival.tier for arrival in arrivals], [FULL_DEPTH] * (CALLERS // 2)):
        asked = list(zip(arrivals, tiers, strict=False))
        unmetered.generate_batch(
            [arrival.prompt for arrival, _ in asked],
            each=[{"compute": tier, "max_tokens": arrival.max_tokens} for arrival, tier in asked],
        )


def measure_capacity(
    model: PolarModel, prompts: Sequence[FilePrompt] = (), progress: Callable[[int, int], None] = lambda _, __: None
) -> float:
    """Answer messages of the scenario at full depth, `CALLERS` at a time, metered and within budgets as in a trial.

    Args:
        model: What answers.
        prompts: The user's own, where the days have them.
        progress: Called with the requests done and their total.

    Returns:
        Answers while all callers were busy. Unit: requests/s.
    """
    total = STEADY + 2 * CALLERS
    arrivals = Day(total, _SEED, prompts).arrivals
    ended: list[float] = []
    lock = threading.Lock()

    def ask(model: PolarModel, arrival: Arrival) -> None:
        model.generate(
            arrival.prompt, compute=FULL_DEPTH, tenant=f"{arrival.tenant}-capacity", max_tokens=arrival.max_tokens
        )
        with lock:
            ended.append(time.monotonic())
            progress(len(ended), total)

    with tempfile.TemporaryDirectory(prefix="polar-capacity-") as folder:
        needed = {f"{tenant}-capacity": compute for tenant, compute in compute_needed(model, arrivals).items()}
        with (
            metered(model, Path(folder) / "capacity.sqlite3", needed) as (metered_model, _),
            ThreadPoolExecutor(CALLERS, thread_name_prefix="polar-caller") as pool,
        ):
            for answered in [pool.submit(ask, metered_model, arrival) for arrival in arrivals]:
                answered.result()
    ended.sort()
    return STEADY / max(ended[CALLERS + STEADY - 1] - ended[CALLERS - 1], 1e-9)
