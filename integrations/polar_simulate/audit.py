"""What the ledger of a trial says: figures of tokens, FLOPs and money by tier, and whether anything is amiss.

Reads a ledger whose meter is closed. Knows no engine and no load but its tally.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from polar_billing import ALL_TENANTS, Budgets, Ledger, Selection, usage_rows, verify_ledger
from polar_billing.reports.figures import percentile
from polar_sdk.usage import FLOPS_PER_COMPUTE_UNIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from polar_billing import PriceBook, UsageRow
    from polar_simulate.tally import Tally

_THOUSAND: Final = 1_000
_SHOWN: Final = 3
"""Ids that a fault names."""


@dataclass(frozen=True)
class Share:
    """Figures of some of a trial's requests, those of the ledger but for the latencies."""

    requests: int
    """Records stored, those of cancelled requests included."""
    tokens_input: int
    tokens_output: int
    flops: int
    identity_flops: int
    """Of the same tokens at full depth."""
    cost: Decimal | None
    """None where a use has no price. Unit: the book's currency."""
    cost_one_price: Decimal | None
    """The same, had every tier the multiplier 1: what compute costs. Unit: the book's currency."""
    latencies: Sequence[float] = field(repr=False, default=())
    """Of the answered requests, ascending. Unit: seconds."""

    @property
    def saved(self) -> float:
        """Share of full depth's FLOPs; negative where more was executed."""
        return 1 - self.flops / self.identity_flops if self.identity_flops else 0.0

    @property
    def flops_per_request(self) -> float | None:
        """Unit: FLOPs."""
        return self.flops / self.requests if self.requests else None

    @property
    def cost_per_1000(self) -> Decimal | None:
        """Unit: currency per 1,000 requests."""
        return self._per_1000(self.cost)

    @property
    def cost_one_price_per_1000(self) -> Decimal | None:
        """Unit: currency per 1,000 requests."""
        return self._per_1000(self.cost_one_price)

    def latency(self, percent: int) -> float | None:
        """A percentile by the nearest rank; None where nothing was answered. Unit: seconds."""
        return percentile(self.latencies, percent)

    def _per_1000(self, amount: Decimal | None) -> Decimal | None:
        return amount * _THOUSAND / self.requests if amount is not None and self.requests else None


@dataclass(frozen=True)
class Audit:
    """What a ledger says after a trial."""

    figures: Share
    by_tier: dict[str, Share]
    links: int
    """Of the ledger's hash chains, all of them walked."""
    faults: tuple[str, ...]
    """What is amiss: a ledger that is unsound, a request that was lost, doubled or never sent, a hold that is left."""


def audit(path: Path, tally: Tally, id_of: Callable[[int], str], book: PriceBook) -> Audit:
    """Verify a ledger, compare it with what was sent, and take its figures.

    Args:
        path: SQLite file of the ledger.
        tally: What the load saw.
        id_of: From the number of an arrival to its request id.
        book: By which its uses were charged.

    Raises:
        StoreError: The ledger cannot be read.
    """
    with Ledger(f"sqlite:///{path}") as ledger:
        verification = verify_ledger(ledger)
        faults = [*map(str, verification.findings), *_miscounted(ledger, tally, id_of), *_held(ledger)]
        rows = usage_rows(ledger, Selection(ALL_TENANTS), by=("tenant", "tier"))
    tiers = list(dict.fromkeys(row.group["tier"] or "" for row in rows))
    by_tier = {
        tier: _share([row for row in rows if row.group["tier"] == tier], book, sorted(tally.latencies.get(tier, ())))
        for tier in tiers
    }
    every = sorted(latency for latencies in tally.latencies.values() for latency in latencies)
    return Audit(_share(rows, book, every), by_tier, verification.links, tuple(faults))


def _miscounted(ledger: Ledger, tally: Tally, id_of: Callable[[int], str]) -> Iterable[str]:
    """What the ledger has too few or too many of."""
    stored = Counter(usage.record.request_id for usage in ledger.read(Selection(ALL_TENANTS)))
    admitted, failed = (set(map(id_of, numbers)) for numbers in (tally.admitted, tally.failed))
    for what, ids in (
        ("answered, but not in the ledger", admitted - set(stored)),
        ("in the ledger more than once", {one for one, times in stored.items() if times > 1}),
        ("in the ledger, but never admitted", set(stored) - admitted - failed),
    ):
        if ids:
            more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
            yield f"{len(ids)} requests are {what}: {', '.join(sorted(ids)[:_SHOWN])}{more}."


def _held(ledger: Ledger) -> Iterable[str]:
    """Holds that are left when every request has ended."""
    held = Budgets(ledger).holds(ALL_TENANTS)
    return [f"{len(held)} holds are left, though every request has ended."] if held else []


def _share(rows: Sequence[UsageRow], book: PriceBook, latencies: Sequence[float]) -> Share:
    saved = sum((row.compute_units_saved for row in rows), Decimal(0))
    flops = sum(row.flops for row in rows)
    costs = [row.cost for row in rows if not row.unrated]
    plain = [_at_one_price(row, book) for row in rows]
    return Share(
        requests=sum(row.requests for row in rows),
        tokens_input=sum(row.tokens_input for row in rows),
        tokens_output=sum(row.tokens_output for row in rows),
        flops=flops,
        identity_flops=flops + int(saved * FLOPS_PER_COMPUTE_UNIT),
        cost=_total(costs, len(rows)),
        cost_one_price=_total(plain, len(rows)),
        latencies=latencies,
    )


def _total(amounts: Sequence[Decimal | None], rows: int) -> Decimal | None:
    """The sum; None where one of them is unknown."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known, Decimal(0)) if len(known) == rows else None


def _at_one_price(row: UsageRow, book: PriceBook) -> Decimal | None:
    """The cost of a row without its tier's multiplier, which multiplies every price of an entry."""
    entry = book.entry_at(datetime.now(UTC), row.group["tenant"])
    multiplier = None if entry is None else entry.multiplier(row.group["tier"])
    return row.cost / multiplier if row.cost is not None and multiplier else None
