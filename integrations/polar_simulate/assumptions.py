"""What a simulation takes for granted, in sentences that every output carries. Knows no figures of trials."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import psutil
import torch

from polar_simulate.capacity import CALLERS
from polar_simulate.day import DAY, OTHER_BUDGET, PEAK_TO_MEAN, TENANTS
from polar_simulate.messages import MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_billing import PriceBook
    from polar_sdk import PolarModel
    from polar_simulate.capacity import Speed
    from polar_simulate.day import Day

QUIET_LOAD: Final = 0.3
"""Load average per core below which nothing else counts as running."""


def busy_before() -> str | None:
    """What to say where other processes keep the machine busy, asked before the model runs; None where none do."""
    average, cores = psutil.getloadavg()[0], os.cpu_count() or 1
    if average / cores < QUIET_LOAD:
        return None
    return (
        f"The machine was busy before (load average {average:.1f} on {cores} cores): latencies are not what it does "
        f"alone. FLOPs, tokens and money do not depend on it."
    )


def assumptions(model: PolarModel, speed: Speed, day: Day, book: PriceBook, busy: str | None) -> list[str]:
    """The assumptions of a simulation, one sentence or two each."""
    return [
        *_arrivals(speed),
        *_mix(day),
        "Ways: at full depth every request runs on the tier exact; routed, on the tier that it was drawn for. Where "
        "budgets refuse fewer of one way, figures per request cover more; FLOPs saved compares the same tokens.",
        "Latency: from the moment a request was due to the end of its answer, waiting included; of answered requests, "
        "by the nearest rank.",
        *_budgets(day),
        *_prices(book),
        "Starts of prompts are not shared between requests. Answers are greedy. In bfloat16 sums round differently in "
        "other company, so answers differ at full depth as well: the tier exact shows how often.",
        _machine(model),
        *([busy] if busy else []),
    ]


def _arrivals(speed: Speed) -> list[str]:
    if speed.capacity is None:
        why = "as asked for"
    else:
        why = (
            f"{speed.peak / speed.capacity:.0%} of the {speed.capacity:.2f} requests/s that this machine answered at "
            f"full depth, {CALLERS} callers at a time, right before"
        )
    return [
        f"Arrivals: {speed.requests:,} a day, an inhomogeneous Poisson process given its count. The day's curve is "
        f"made up: the busiest moment has {PEAK_TO_MEAN:.2f} times the average. Late answers do not slow arrivals.",
        f"Accelerated: the day of {DAY:,} s takes {speed.seconds:,.0f} s, {speed.factor:,.1f} times as fast. The "
        f"busiest moment brings {speed.peak:.2f} requests/s, {why}.",
    ]


def _mix(day: Day) -> list[str]:
    shares = {name: _percent(counts, day.requests) for name, counts in day.mix.items()}
    drawn = f"Drawn for seed {day.seed}: tenants {shares['tenant']}; tiers {shares['tier']}"
    if day.prompts:
        return [f"Prompts: {len(day.prompts):,} of a file, drawn evenly. {drawn}."]
    tokens = ", ".join(f"{kind} {most}" for kind, most in MAX_TOKENS.items())
    return [
        f"Prompts: made by a generator, to translate or to answer. {drawn}; {shares['kind']}. At most so many tokens "
        f"of answer: {tokens}."
    ]


def _percent(counts: Mapping[str, int], total: int) -> str:
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.items())


def _budgets(day: Day) -> list[str]:
    tight = [sender for sender in TENANTS if sender.budget < 1 and sender.tenant in day.mix["tenant"]]
    named = ", ".join(f"{sender.tenant} {sender.budget:.0%}" for sender in tight)
    less = f"{named}; everybody else {OTHER_BUDGET:.0%}" if named else f"everybody {OTHER_BUDGET:.0%}"
    return [f"Budgets, of what a tenant's requests can take at most at full depth, the same in both ways: {less}."]


def _prices(book: PriceBook) -> list[str]:
    entry = book.entry_at(datetime.now(UTC))
    tiers: Sequence[str] = [f"{tier} {multiplier:f}" for tier, multiplier in entry.tiers.items()] if entry else []
    return [
        f"Money: price book {book.id}, whose tiers multiply its prices: {', '.join(tiers) or 'none'}. At one price "
        f"means without that."
    ]


def _machine(model: PolarModel) -> str:
    layers = "compiled" if model.compiled else "not compiled (`polar models compile` makes them faster)"
    return (
        f"Engine: {model.name}, {model.depth} layers, {layers}, {model.dtype} on {model.device}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores."
    )
