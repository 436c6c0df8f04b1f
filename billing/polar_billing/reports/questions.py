"""The questions that a report can be asked besides what was charged, and their answers from one pass over the usage.

What would another price book or another mix of tiers have come to, and what does the hardware cost? The arithmetic is
in `what_if` and `hardware`. Knows no output format.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polar_billing.prices.rating import COMPUTE, rate
from polar_billing.reports.hardware import BusyTime, Hardware, HardwareReport, Work, hardware_report
from polar_billing.reports.promises import PromiseWatch
from polar_billing.reports.what_if import (
    MixBasis,
    Scenario,
    WhatIf,
    assumptions_of,
    book_scenario,
    check_mixes,
    hardware_assumptions,
    mixed_scenario,
)
from polar_billing.values.money import to_scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from decimal import Decimal

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection, StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.energy import EnergyBasis
    from polar_billing.reports.figures import Figures
    from polar_billing.reports.mix import Mix, Savings
    from polar_billing.reports.report import Report
    from polar_billing.reports.totals import Rater


def _nothing_measured(_: str) -> Savings | None:
    return None


@dataclass(frozen=True)
class Questions:
    """What to work out besides what was charged."""

    books: tuple[PriceBook, ...] = ()
    """Other price books."""
    mixes: tuple[Mix, ...] = ()
    """Other mixes of tiers."""
    savings: Callable[[str], Savings | None] = _nothing_measured
    """From the fingerprint of a model to what its tiers were measured to save; None where nothing was."""
    hardware: Hardware | None = None
    energy: EnergyBasis | None = None
    promises: Mapping[str, int] = field(default_factory=dict)
    """Tier → promised 95th percentile of latency, for tiers whose plan says nothing, or instead of it. Unit: ms."""

    @property
    def what_if(self) -> bool:
        """Whether anything is asked but whether promises were kept."""
        return bool(self.books or self.mixes or self.hardware)


@dataclass
class _Collected:
    """What one pass over the usage brings in."""

    bases: list[tuple[PriceBook | None, MixBasis]]
    """For each book, None for those of the receipts."""
    exact: list[defaultdict[str, int]]
    """For each other book: by tenant, in units of 10^-30."""
    rated: list[defaultdict[str, int]]
    """For each other book: number of rated requests, by tenant."""
    unrated: list[int]
    busy: BusyTime = field(default_factory=BusyTime)


def answer(ledger: Ledger, selection: Selection, report: Report, rater: Rater, questions: Questions) -> Report:
    """Add the answers to a report.

    Args:
        ledger: Where the usage is.
        selection: Which usage; that of the report.
        report: What was charged.
        rater: Rates what was charged.
        questions: What to work out.

    Raises:
        QueryError: A tier was not measured or has no price, or no throughput is known.
    """
    promises = PromiseWatch(questions.promises)
    watched = promises.needed(rater.used.values())
    if report.is_empty or not (questions.what_if or watched):
        return report
    collected = _collect(ledger, selection, rater, questions, promises if watched else None)
    answered = {
        "hardware": _hardware(report, collected.busy, questions.hardware),
        "promises": promises.report(_charges(report), report.decimals),
    }
    report = report.model_copy(update=answered)
    if not questions.what_if:
        return report
    models = set().union(*(basis.models for _, basis in collected.bases))
    savings = check_mixes(questions.mixes, models, questions.savings) if questions.mixes else {}
    said = assumptions_of(report, questions.mixes, savings, questions.books)
    said += [] if report.hardware is None else hardware_assumptions(report.hardware, report.currency)
    scenarios = tuple(_scenarios(report, collected, questions, savings)) if report.currency is not None else ()
    return report.model_copy(update={"what_if": WhatIf(scenarios=scenarios, assumptions=tuple(said))})


def _charges(report: Report) -> dict[tuple[str, str], Decimal | None]:
    """By tenant and tier."""
    tiers = ((tenant.tenant, tier) for tenant in report.tenants for tier in tenant.tiers)
    return {(tenant, tier.tier): tier.figures.charge for tenant, tier in tiers if tier.tier is not None}


def _collect(
    ledger: Ledger, selection: Selection, rater: Rater, questions: Questions, promises: PromiseWatch | None
) -> _Collected:
    def by(book: PriceBook) -> Callable[[StoredUsage], PriceBook | None]:
        return lambda _: book

    books = questions.books
    bases = [(None, MixBasis(rater.book_of)), *((book, MixBasis(by(book))) for book in books)]
    collected = _Collected(
        bases=bases if questions.mixes else [],
        exact=[defaultdict(int) for _ in books],
        rated=[defaultdict(int) for _ in books],
        unrated=[0] * len(books),
    )
    for stored in ledger.read(selection):
        book = rater.book_of(stored)
        if book is None:
            continue
        if promises is not None:
            promises.add(stored, book)
        for _, basis in collected.bases:
            basis.add(stored)
        if questions.hardware is not None and questions.hardware.tokens_per_second is None:
            collected.busy.add(stored.record)
        for place, other in enumerate(books):
            _rate(collected, place, stored, other)
    return collected


def _rate(collected: _Collected, place: int, stored: StoredUsage, book: PriceBook) -> None:
    rating = rate(stored.record, book, counterfactuals=False)
    tenant = stored.record.tenant
    if rating.unrated is not None:
        collected.unrated[place] += 1
    else:
        collected.exact[place][tenant] += sum(line.exact for line in rating.lines)
        collected.rated[place][tenant] += 1


def _hardware(report: Report, busy: BusyTime, hardware: Hardware | None) -> HardwareReport | None:
    if hardware is None:
        return None

    def work(tenant: str | None, tier: str | None, figures: Figures) -> Work:
        flops = to_scaled(figures.compute_units, COMPUTE.decimals)
        return Work(tenant=tenant, tier=tier, flops=flops, charge=figures.charge)

    return hardware_report(
        hardware,
        busy,
        report.figures.tokens_input + report.figures.tokens_output,
        work(None, None, report.figures),
        [work(None, tier.tier, tier.figures) for tier in report.tiers],
        [work(tenant.tenant, None, tenant.figures) for tenant in report.tenants],
        report.decimals,
    )


def _scenarios(report: Report, collected: _Collected, questions: Questions, savings: Savings) -> Iterator[Scenario]:
    for place, other in enumerate(questions.books):
        exact, rated = collected.exact[place], collected.rated[place]
        amounts = {tenant: (exact[tenant], rated[tenant]) for tenant in rated}
        yield book_scenario(report, other, amounts, collected.unrated[place])
    for mix in questions.mixes:
        for book, basis in collected.bases:
            currency = report.currency if book is None else book.currency
            decimals = report.decimals if book is None else book.statement_decimals
            assert currency is not None  # or there are no scenarios
            yield mixed_scenario(basis, mix, savings, report, book, currency, decimals)
