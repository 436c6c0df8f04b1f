"""A trial: requests sent in one way to a model with a ledger and budgets of its own, and what that ledger says.

The loop is open: requests are sent at their times, whether or not earlier ones are answered. Latency runs from the
moment a request was due, so that neither a slow engine nor a late sender hides how long a caller waits. Tokens, FLOPs
and money are the ledger's; latencies, refusals and answers are the callers'.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from benchmarks.day.arrivals import TENANTS
from polar_billing import ALL_TENANTS, Budget, Budgets, Ledger, Meter, Selection, usage_rows, verify_ledger
from polar_sdk import PolarModel
from polar_sdk.errors import BudgetExceededError, PolarError
from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from benchmarks.day.arrivals import Arrival

FULL_DEPTH: Final = "exact"
"""Tier of every request in a trial at full depth."""
MAX_CALLERS: Final = 256
"""Requests under way at a time, each in a thread of its own; further ones wait, and their latency runs."""


@dataclass(frozen=True)
class Share:
    """Sums of one tier, from the ledger."""

    requests: int
    flops: int
    identity_flops: int
    """FLOPs of the same tokens at full depth."""
    cost: Decimal
    """Unit: the price book's currency."""

    @property
    def saved(self) -> float:
        """Share of full depth's FLOPs that was saved; negative where more was executed."""
        return 1 - self.flops / self.identity_flops if self.identity_flops else 0.0


@dataclass
class Trial:
    """The requests of a trial, first as their callers saw them, then as the ledger has them."""

    ends: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended: answered, refused (by a budget), or the error."""
    latencies: list[float] = field(default_factory=list)
    """Latencies of answered requests. Unit: seconds."""
    answers: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Number of the arrival → tier and a hash of the answer's tokens."""
    failed: set[str] = field(default_factory=set)
    """Request ids that ended by an error: their records may be in the ledger or not."""
    tiers: dict[str, Share] = field(default_factory=dict)
    links: int = 0
    """Links of the ledger's hash chains, all verified."""
    faults: list[str] = field(default_factory=list)
    """Faults of the ledger: unsound, a request lost, doubled or never sent, a hold left."""

    @property
    def total(self) -> Share:
        """Sums of all tiers."""
        shares = self.tiers.values()
        return Share(
            sum(share.requests for share in shares),
            sum(share.flops for share in shares),
            sum(share.identity_flops for share in shares),
            sum((share.cost for share in shares), Decimal(0)),
        )


def compute_needed(model: PolarModel, arrivals: Iterable[Arrival]) -> dict[str, Decimal]:
    """The maximum compute that each tenant's requests can take at full depth. Unit: CU."""
    needed: Counter[str] = Counter()
    for arrival in arrivals:
        prompt = model.count_tokens(arrival.prompt)
        needed[arrival.tenant] += model.cost(prompt=prompt, output=arrival.max_tokens).total
    return {tenant: Decimal(flops) / FLOPS_PER_COMPUTE_UNIT for tenant, flops in needed.items()}


@contextmanager
def metered(model: PolarModel, path: Path, needed: Mapping[str, Decimal]) -> Iterator[PolarModel]:
    """The same weights with a new ledger, in which each tenant has a budget: its share of `needed`.

    No starts of prompts are kept: the second trial of a day would find those of the first.
    """
    limits = model.scheduler.limits
    model.scheduler.limits = replace(limits, prefix_share=0)
    try:
        with Meter(f"sqlite:///{path}", durability="spool") as meter:
            budgets = Budgets(meter.ledger)
            for sender in TENANTS:
                if limit := needed.get(sender.tenant):
                    budgets.set(Budget(sender.tenant, round(limit * Decimal(str(sender.budget)), 9)))
            yield PolarModel(model.loaded, policy=model.policy, router=model.router, sink=meter)
    finally:
        model.scheduler.limits = limits


def run_trial(
    model: PolarModel,
    path: Path,
    arrivals: Iterable[tuple[float, Arrival]],
    needed: Mapping[str, Decimal],
    *,
    tier: str | None = None,
) -> Trial:
    """Send requests, wait for their answers, then verify the ledger and compare it with what was sent.

    Args:
        model: Model that answers; its own sink is not used.
        path: New SQLite file of the trial's ledger.
        arrivals: Requests and when each is due from now on, in order. Unit: seconds.
        needed: Compute that budgets are shares of; see `compute_needed`.
        tier: Tier of all requests; None = each has its own.

    Raises:
        Exception: Something other than a `PolarError` ended a request.
    """
    trial = Trial()
    with metered(model, path, needed) as metered_model:
        _send_all(trial, metered_model, arrivals, tier)
    with Ledger(f"sqlite:///{path}") as ledger:
        audit(trial, ledger)
    return trial


def _send_all(trial: Trial, model: PolarModel, arrivals: Iterable[tuple[float, Arrival]], tier: str | None) -> None:
    begun, lock, stop = time.monotonic(), threading.Lock(), threading.Event()
    bugs: list[BaseException] = []

    def send(due: float, arrival: Arrival) -> None:
        try:
            end, answer = _ask(model, arrival, tier or arrival.tier, stop)
        except BaseException as bug:
            bugs.append(bug)
            stop.set()
            return
        with lock:
            trial.ends[end] += 1
            if answer is not None:
                trial.latencies.append(time.monotonic() - begun - due)
                trial.answers[arrival.number] = answer
            elif end != "refused":
                trial.failed.add(_id(arrival.number))

    pool = ThreadPoolExecutor(MAX_CALLERS, thread_name_prefix="polar-caller")
    try:
        for due, arrival in arrivals:
            if stop.wait(max(0.0, begun + due - time.monotonic())):
                break
            pool.submit(send, due, arrival)
    except BaseException:
        stop.set()  # requests under way are cancelled and recorded
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=stop.is_set())
    if bugs:
        raise bugs[0]


def _ask(model: PolarModel, arrival: Arrival, tier: str, stop: threading.Event) -> tuple[str, tuple[str, int] | None]:
    """Send one request; returns how it ended and the answer, as in `Trial`."""
    try:
        generation = model.generate(
            arrival.prompt,
            compute=tier,
            tenant=arrival.tenant,
            max_tokens=arrival.max_tokens,
            request_id=_id(arrival.number),
            cancel=stop,
        )
    except BudgetExceededError:
        return "refused", None
    except PolarError as error:
        return f"{type(error).__name__}: {error}", None
    return "answered", (tier, hash(generation.token_ids))


def _id(number: int) -> str:
    return f"day-{number}"


def audit(trial: Trial, ledger: Ledger) -> None:
    """Verify a ledger, compare it with what was sent, and take its sums."""
    verification = verify_ledger(ledger)
    trial.links = verification.links
    trial.faults += map(str, verification.findings)
    stored = Counter(usage.record.request_id for usage in ledger.read(Selection(ALL_TENANTS)))
    answered = set(map(_id, trial.answers))
    for fault, ids in (
        ("answered, but not in the ledger", answered - set(stored)),
        ("in the ledger more than once", {one for one, times in stored.items() if times > 1}),
        ("in the ledger, but never admitted", set(stored) - answered - trial.failed),
    ):
        if ids:
            trial.faults.append(f"{len(ids)} requests are {fault}: {', '.join(sorted(ids)[:3])}")
    if held := Budgets(ledger).holds(ALL_TENANTS):
        trial.faults.append(f"{len(held)} holds are left, though every request has ended")
    for row in usage_rows(ledger, Selection(ALL_TENANTS), by=("tier",)):
        saved = int(row.compute_units_saved * FLOPS_PER_COMPUTE_UNIT)
        trial.tiers[row.group["tier"] or ""] = Share(row.requests, row.flops, row.flops + saved, row.cost or Decimal(0))
