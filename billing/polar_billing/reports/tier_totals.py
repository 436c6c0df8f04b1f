"""Adds up and rates the usage of a report by tenant and tier, a million requests in seconds.

Requests that are alike in everything that prices depend on are added up first, and their sums rated: a charge is
exactly a quantity times a price, so the result is the same as rating one by one. If a request may cost more than a
receipt holds, which leaves only that request unrated, they are rated one by one. Knows no output format.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from operator import gt
from typing import TYPE_CHECKING, Final, TypeVar

from polar_billing.prices.rating import Counts, Rating, always_within_receipt, rate_counts, rate_of
from polar_billing.reports.totals import LayerVisits, UsageTotals, accumulate
from polar_billing.values.canonical import EPOCH, to_microseconds
from polar_sdk.show.progress import silent, through
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection
    from polar_billing.ledger.rollups import RawUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.totals import Rater
    from polar_sdk.show.progress import Progress

T = TypeVar("T")
Key = tuple[str, str | None]
"""Tenant and tier."""
_MAX_WAITING: Final = 20_000
"""Different visits of alike requests that wait to be added up."""
_NO_VISITS: Final = "[]"


@dataclass(kw_only=True)
class _Alike(UsageTotals):
    """Requests with one tenant, tier, model, program, outcome and book, and one price in force; not yet rated."""

    served: datetime
    """When one of them was."""
    flops_most: int = 0
    """Maximum of one request, drafts included."""
    tokens_input_most: int = 0
    tokens_output_most: int = 0
    layers: LayerVisits = field(default_factory=LayerVisits)
    with_visits: int = 0
    waiting: dict[tuple[str, str | None, str], int] = field(default_factory=dict)
    """Visits per layer, as stored → requests whose visits are not in `layers` yet."""

    def add_waiting(self) -> None:
        """Add up the visits that wait."""
        for (prefill, filled, decode), requests in self.waiting.items():
            if (prefill, decode) != (_NO_VISITS, _NO_VISITS):
                self.with_visits += requests
                parts = (prefill, filled or _NO_VISITS, decode)
                self.layers.add(*([visits * requests for visits in _visits(part)] for part in parts))
        self.waiting.clear()

    def counts(self, book: PriceBook) -> Counts:
        """The quantities that the prices of a book look at."""
        flops = self.flops + self.flops_drafts * book.charge_drafts
        return Counts(self.requests, flops, self.tokens_input, self.tokens_output)


_Group = tuple[str, str | None, str, str, str, str, str | None, int]
"""Tenant, tier, model, program, outcome, hash of the receipt's book, why it is unrated, and the place among changes."""


def totals_by_tier(
    ledger: Ledger, selection: Selection, rater: Rater, progress: Progress = silent
) -> dict[Key, UsageTotals]:
    """The sums of each tenant and tier."""
    if selection.tags:
        return _one_by_one(ledger, selection, rater, progress)
    totals: dict[Key, UsageTotals] = {}
    usage = shown(ledger.raw_usage(selection), ledger, selection, progress, "requests")
    for key, alike in _grouped(usage, rater).items():
        book = rater.book_of_receipt(key[5])
        if book is None:
            continue
        rating = _rate(key, alike, book)
        if rating is None:
            return _one_by_one(ledger, selection, rater, progress)
        rater.used[book.content_hash] = book
        _add(totals.setdefault(key[:2], UsageTotals()), key, alike, rating)
    for tier in totals.values():
        tier.latencies_ns.sort()  # tenants and tiers together are then merged, not sorted anew
    return totals


def shown(usage: Iterable[T], ledger: Ledger, selection: Selection, progress: Progress, stage: str) -> Iterable[T]:
    """Usage that was selected, with the progress of reading it, if anybody looks."""
    return usage if progress is silent else through(progress, stage, usage, ledger.count(selection))


def _one_by_one(ledger: Ledger, selection: Selection, rater: Rater, progress: Progress) -> dict[Key, UsageTotals]:
    usage = shown(ledger.read(selection), ledger, selection, progress, "requests, one by one")
    return accumulate(usage, rater, lambda stored: (stored.record.tenant, stored.record.tier))


def _grouped(usage: Iterable[RawUsage], rater: Rater) -> dict[_Group, _Alike]:
    groups: dict[_Group, _Alike] = {}
    changes: list[int] | None = None
    completed = Outcome.COMPLETED.value
    for request in usage:
        # One unpacking, and no attribute of `request`: this loop runs a million times.
        tenant, tier, model, program, outcome, book, unrated, at, prefill, filled, decode, *counted = request
        if changes is None:  # once usage was read: what is stored meanwhile may bring in a book
            changes = [to_microseconds(moment) for moment in rater.changes()]
        key = (tenant, tier, model, program, outcome, book, unrated, bisect_right(changes, at))
        alike = groups.get(key)
        if alike is None:
            alike = groups[key] = _Alike(served=EPOCH + timedelta(microseconds=at))
        visits = (prefill, filled, decode)
        waiting = alike.waiting
        waiting[visits] = waiting.get(visits, 0) + 1
        if len(waiting) > _MAX_WAITING:
            alike.add_waiting()
        latency = _count(alike, counted)
        if outcome == completed:
            alike.latencies_ns.append(latency)
    return groups


def _count(alike: _Alike, counted: list[int]) -> int:
    """Count a request in; returns its latency in nanoseconds."""
    tokens_input, cached, tokens_output, flops, identity_flops, router, answer, *rest = counted
    drafted, accepted, drafts, cost, queue, prefill, decode = rest
    alike.requests += 1
    alike.tokens_input += tokens_input
    alike.tokens_cached += cached
    alike.tokens_output += tokens_output
    alike.flops += flops
    alike.identity_flops += identity_flops
    alike.flops_router += router
    alike.flops_answer += answer
    alike.receipts += cost
    if drafted:
        alike.tokens_drafted += drafted
        alike.tokens_accepted += accepted
        alike.flops_drafts += drafts
        flops += drafts
    if flops > alike.flops_most:  # noqa: PLR1730  (three calls of `max` would take a tenth of the loop's time)
        alike.flops_most = flops
    if tokens_input > alike.tokens_input_most:  # noqa: PLR1730
        alike.tokens_input_most = tokens_input
    if tokens_output > alike.tokens_output_most:  # noqa: PLR1730
        alike.tokens_output_most = tokens_output
    return queue + prefill + decode


def _rate(key: _Group, alike: _Alike, book: PriceBook) -> Rating | None:
    """Rate requests together; None if that is not known to give what rating one by one gives."""
    tenant, tier, _, _, outcome, receipts_book, unrated, _ = key
    charged_by = rate_of(book, tenant, tier, alike.served)
    if book.content_hash == receipts_book:
        if unrated is not None:
            return Rating(book.currency, unrated=unrated)
    elif isinstance(charged_by, str) and book.entry_at(alike.served, tenant) is not None:
        return Rating(book.currency, unrated=charged_by)
    elif not isinstance(charged_by, str) and outcome not in book.free_outcomes:
        most = (alike.flops_most, alike.tokens_input_most, alike.tokens_output_most)
        if any(map(gt, most, always_within_receipt(charged_by.entry))):
            return None
    if isinstance(charged_by, str):  # the reason names the moment, so each request has its own
        return None
    return rate_counts(alike.counts(book), alike.identity_flops, Outcome(outcome), charged_by, book)


def _add(totals: UsageTotals, key: _Group, alike: _Alike, rating: Rating) -> None:
    _, _, model, program, outcome, *_ = key
    alike.add_waiting()
    totals.add_counts(alike)
    totals.outcomes[outcome] += alike.requests
    totals.visits += sum(alike.layers.prefill) + sum(alike.layers.decode)
    totals.latencies_ns += alike.latencies_ns
    if rating.unrated is not None:
        totals.unrated[rating.unrated] += alike.requests
    if alike.with_visits:
        totals.layer_visits[model].add(alike.layers.prefill, alike.layers.filled, alike.layers.decode)
        totals.programs[model, program] += alike.with_visits
    totals.add_amounts(rating, alike.requests, alike.tokens_input + alike.tokens_output)


@lru_cache(maxsize=4096)
def _visits(text: str) -> list[int]:
    visits: list[int] = json.loads(text)
    return visits
