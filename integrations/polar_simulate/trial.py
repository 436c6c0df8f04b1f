"""One trial: a day served in one way, with a ledger and budgets of its own, and what came of it.

Knows no other trial.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from polar_billing import Budget, Budgets, Meter
from polar_sdk import PolarModel
from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT
from polar_simulate.audit import audit
from polar_simulate.day import OTHER_BUDGET, TENANTS
from polar_simulate.load import Load
from polar_simulate.tally import Sent, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from polar_billing import PriceBook
    from polar_simulate.audit import Audit, Share
    from polar_simulate.day import Arrival

FULL_DEPTH: Final = "exact"
"""The tier of every request where all run at full depth."""
PERCENTS: Final = (50, 95, 99)
_BUDGET_DECIMALS: Final = 9


@dataclass(frozen=True)
class Trial:
    """What came of one day served in one way."""

    seed: int
    arrivals: int
    """Of the day; more than were sent where Ctrl-C ended it."""
    tally: Tally
    audit: Audit
    seconds: float
    book: PriceBook
    """By which its requests were charged."""
    ledger: Path
    interrupted: bool

    @property
    def faults(self) -> list[str]:
        """What is amiss in its ledger."""
        return [f"{self.ledger.name}: {fault}" for fault in self.audit.faults]

    def as_json(self) -> dict[str, Any]:
        """All of its figures; latencies in seconds, money as exact decimal text."""
        tally, found = self.tally, self.audit
        return {
            "seed": self.seed,
            "arrivals": self.arrivals,
            "interrupted": self.interrupted,
            "sent": tally.sent,
            "ends": dict(tally.ends),
            "refused_by_tenant": dict(tally.refused_by_tenant),
            "errors": dict(tally.errors),
            "seconds": self.seconds,
            "sent_late_seconds_max": tally.latest,
            **_share_json(found.figures),
            "by_tier": {tier: _share_json(share) for tier, share in found.by_tier.items()},
            "currency": self.book.currency,
            "price_book": self.book.id,
            "ledger": str(self.ledger),
            "records_stored": found.figures.requests,
            "links_verified": found.links,
            "faults": list(found.faults),
        }


def _share_json(share: Share) -> dict[str, Any]:
    amounts = ("cost", "cost_one_price", "cost_per_1000", "cost_one_price_per_1000")
    return {
        "requests": share.requests,
        "tokens_input": share.tokens_input,
        "tokens_output": share.tokens_output,
        "flops": share.flops,
        "identity_flops": share.identity_flops,
        "saved": share.saved,
        **{name: None if (amount := getattr(share, name)) is None else f"{amount:f}" for name in amounts},
        "latency_seconds": {f"p{percent}": share.latency(percent) for percent in PERCENTS},
    }


def compute_needed(model: PolarModel, arrivals: Iterable[Arrival]) -> dict[str, Decimal]:
    """What each tenant's requests can take at most at full depth. Unit: CU."""
    needed: Counter[str] = Counter()
    for arrival in arrivals:
        prompt = model.count_tokens(arrival.prompt)
        needed[arrival.tenant] += model.cost(prompt=prompt, output=arrival.max_tokens).total
    return {tenant: Decimal(flops) / FLOPS_PER_COMPUTE_UNIT for tenant, flops in needed.items()}


@contextmanager
def metered(model: PolarModel, path: Path, needed: Mapping[str, Decimal]) -> Iterator[tuple[PolarModel, Meter]]:
    """The same weights with a new ledger, in which each tenant has a budget: its share of what it needs."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    shutil.rmtree(path.with_name(f"{path.name}.spool"), ignore_errors=True)  # of a run that was killed
    shares = {sender.tenant: sender.budget for sender in TENANTS}
    with Meter(f"sqlite:///{path}", durability="spool") as meter:
        budgets = Budgets(meter.ledger)
        for tenant, compute in needed.items():
            limit = compute * Decimal(str(shares.get(tenant, OTHER_BUDGET)))
            budgets.set(Budget(tenant, round(limit, _BUDGET_DECIMALS)))
        yield PolarModel(model.loaded, policy=model.policy, router=model.router, sink=meter), meter


def run_trial(
    model: PolarModel,
    arrivals: Sequence[Arrival],
    path: Path,
    *,
    seed: int,
    tier: str | None,
    factor: float,
    needed: Mapping[str, Decimal],
    progress: Callable[[int], None] = lambda _: None,
) -> Trial:
    """Serve a day, then verify its ledger and compare it with what was sent.

    Args:
        model: What answers; its own sink is not used.
        arrivals: Of the day.
        path: SQLite file of the trial's ledger; one that is there is replaced.
        seed: Of the day.
        tier: Of all requests; None = each has its own.
        factor: How many times as fast as the clock the day runs.
        needed: See `compute_needed`.
        progress: Called with the number of requests that have ended.

    Returns:
        The trial; where Ctrl-C ended it, with `interrupted` and what there was.
    """
    tally = Tally()

    def note(one: Sent) -> None:
        tally.add(one)
        progress(tally.sent)

    with metered(model, path, needed) as (metered_model, meter):
        load = Load(metered_model, tier=tier, prefix=f"seed-{seed}", on_end=note)
        begun, interrupted = time.monotonic(), False
        try:
            load.run((arrival.second / factor, arrival) for arrival in arrivals)
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.monotonic() - begun
        book = meter.price_book
    return Trial(
        seed=seed,
        arrivals=len(arrivals),
        tally=tally,
        audit=audit(path, tally, load.id_of, book),
        seconds=seconds,
        book=book,
        ledger=path,
        interrupted=interrupted,
    )
