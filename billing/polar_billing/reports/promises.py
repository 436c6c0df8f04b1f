"""Latency against what a tier promises: percentiles, misses and the resulting service credit.

A promise is the 95th percentile of completed requests, in the terms of the tenant's plan or named by the caller. The
statement decides per plan and period whether it was kept, and only the statement gives credits; here it is evaluated
over the whole report. Knows no output format.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Final, NamedTuple

from polar_billing.errors import QueryError
from polar_billing.reports import Part
from polar_billing.reports.summary import percentile
from polar_billing.values.money import quotient, to_scaled
from polar_sdk.reading import shown
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.summary import Summary

_MAX_MISSES: Final = 10
_MAX_MS: Final = 10**7
_PERCENT: Final = 100 * 10**6


class Miss(Part):
    """One completed request that took longer than promised."""

    request_id: str
    latency_ns: int


class PromiseReport(Part):
    """One tier of one tenant beside its promise."""

    tenant: str
    tier: str
    source: str
    """The plan, or the caller, in words."""
    latency_ms_p95_max: int
    """Promised 95th percentile. Unit: milliseconds."""
    requests: int
    """Completed."""
    latency_ns_p50: int
    latency_ns_p95: int
    latency_ns_p99: int
    kept: bool
    """Whether the 95th percentile is within the promise."""
    missed: int
    """Requests that took longer."""
    slowest: tuple[Miss, ...]
    """The slowest of those, the slowest first."""
    credit_percent: Decimal | None
    """Share of the tier's charges that the plan gives back; None without a plan."""
    credit: Decimal | None
    """Credit on the tier's charge in this report; None if nothing is given back."""


class _Promise(NamedTuple):
    tenant: str
    tier: str
    source: str
    latency_ms: int
    credit_percent: Decimal | None


@dataclass
class _Kept:
    latencies_ns: list[int] = field(default_factory=list)
    missed: int = 0
    slowest: list[tuple[int, str]] = field(default_factory=list)


class PromiseWatch:
    """Collects latencies beside promises; those named (tier → milliseconds) go before what plans promise."""

    def __init__(self, named: Mapping[str, int]) -> None:
        self._named = dict(named)
        self._kept: dict[_Promise, _Kept] = {}

    def needed(self, books: Iterable[PriceBook]) -> bool:
        """Whether anything is promised at all."""
        terms = (terms for book in books for plan in book.plans.values() for terms in plan.terms)
        return bool(self._named) or any(terms_.promises for terms_ in terms)

    def add(self, stored: StoredUsage, book: PriceBook) -> None:
        """Take in one request."""
        record = stored.record
        if record.outcome is not Outcome.COMPLETED or record.tier is None:
            return
        promise = self._promise(book, record.tenant, record.tier, record.started_at)
        if promise is None:
            return
        latency = record.queue_ns + record.prefill_ns + record.decode_ns
        kept = self._kept.setdefault(promise, _Kept())
        kept.latencies_ns.append(latency)
        if latency > promise.latency_ms * 10**6:
            kept.missed += 1
            (heapq.heappush if len(kept.slowest) < _MAX_MISSES else heapq.heappushpop)(
                kept.slowest, (latency, record.request_id)
            )

    def _promise(self, book: PriceBook, tenant: str, tier: str, moment: datetime) -> _Promise | None:
        if tier in self._named:
            return _Promise(tenant, tier, "named for this report", self._named[tier], None)
        plan, terms = book.terms_at(moment, tenant)
        promised = None if terms is None else terms.promises.get(tier)
        if promised is None or promised.latency_ms_p95_max is None:
            return None
        source = f"plan {plan} of {book.id}"
        return _Promise(tenant, tier, source, promised.latency_ms_p95_max, promised.credit_percent)

    def report(self, summary: Summary) -> tuple[PromiseReport, ...]:
        """Say what was promised and kept, beside what was charged."""
        charges = {(each.tenant, tier.tier): tier.figures.charge for each in summary.tenants for tier in each.tiers}
        promises = sorted(self._kept.items(), key=lambda item: str(item[0]))
        return tuple(
            _report(promise, kept, charges.get((promise.tenant, promise.tier)), summary.decimals)
            for promise, kept in promises
        )


def _report(promise: _Promise, kept: _Kept, charge: Decimal | None, decimals: int) -> PromiseReport:
    ordered = sorted(kept.latencies_ns)
    p50, p95, p99 = (percentile(ordered, percent) or 0 for percent in (50, 95, 99))
    held = p95 <= promise.latency_ms * 10**6
    percent = promise.credit_percent
    credit = None
    if not held and charge is not None and percent is not None:
        credit = quotient(to_scaled(charge, decimals) * to_scaled(percent, 6), _PERCENT, decimals)
    return PromiseReport(
        tenant=promise.tenant,
        tier=promise.tier,
        source=promise.source,
        latency_ms_p95_max=promise.latency_ms,
        requests=len(ordered),
        latency_ns_p50=p50,
        latency_ns_p95=p95,
        latency_ns_p99=p99,
        kept=held,
        missed=kept.missed,
        slowest=tuple(
            Miss(request_id=request_id, latency_ns=latency)
            for latency, request_id in sorted(kept.slowest, key=lambda miss: (-miss[0], miss[1]))
        ),
        credit_percent=percent,
        credit=credit,
    )


def read_promises(texts: Iterable[str]) -> dict[str, int]:
    """Read promises such as `economy=2000`: tier → 95th percentile in milliseconds.

    Raises:
        QueryError: One is not that, or a tier is named twice.
    """
    promises: dict[str, int] = {}
    for text in texts:
        tier, _, latency = (part.strip() for part in text.partition("="))
        if not (tier and latency.isdecimal() and len(latency) < 9 and 0 < int(latency) <= _MAX_MS):
            raise QueryError(
                f"promise {shown(text)} is not TIER=MILLISECONDS, 1 to {_MAX_MS:,}.", hint="Write it like economy=2000."
            )
        if tier in promises:
            raise QueryError(f"tier {shown(tier)} is promised two latencies.", hint="Name one.")
        promises[tier] = int(latency)
    return promises
