"""The tiered pricing report: what each tenant used and owes per tier, and what it would have been otherwise.

The usage of the period is added up and summarised; further questions (promises, other prices and mixes, hardware,
energy) are answered from that, and from one more pass over the usage if single requests matter. This module only
combines the results; `usage_tables`, `csv` and `html` render it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from polar_billing.ledger.records import ALL_TENANTS, AllTenants, Selection
from polar_billing.metering.spool import recover_abandoned
from polar_billing.reports import Part
from polar_billing.reports.drift import PromiseDrift, promises_of
from polar_billing.reports.energy import EnergyReport, energy_report
from polar_billing.reports.hardware import BusyTime, HardwareReport, hardware_report
from polar_billing.reports.mix import MixBasis
from polar_billing.reports.promises import PromiseReport, PromiseWatch
from polar_billing.reports.summary import Figures, TenantReport, TierReport, summarise, tenants_of
from polar_billing.reports.tier_totals import shown, totals_by_tier
from polar_billing.reports.totals import Rater
from polar_billing.reports.what_if import Charged, TokenPricing, UsageByBook, WhatIf, token_pricing, what_if
from polar_billing.statements.issue import credit_notes, issued_statements
from polar_sdk.show.progress import silent
from polar_sdk.usage import DISPUTED_TAG

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.reports.energy import EnergyBasis
    from polar_billing.reports.hardware import Hardware
    from polar_billing.reports.mix import Mix, Savings
    from polar_billing.reports.summary import Summary
    from polar_billing.values.periods import Period
    from polar_sdk.show.progress import Progress


@dataclass(frozen=True)
class Questions:
    """Questions that a report answers besides what was charged."""

    books: tuple[PriceBook, ...] = ()
    """Other price books."""
    mixes: tuple[Mix, ...] = ()
    """Other mixes of tiers."""
    savings: Callable[[str], Savings | None] = lambda _: None
    """From the fingerprint of a model to what its tiers were measured to save; None if nothing was."""
    hardware: Hardware | None = None
    energy: EnergyBasis | None = None
    promises: Mapping[str, int] = field(default_factory=dict)
    """Tier → promised 95th percentile of latency, for tiers whose plan says nothing, or instead of it. Unit: ms."""


class PriceBookUsed(Part):
    """A book that rated something in the report."""

    id: str
    content_hash: str


class Report(Part):
    """The usage and charges of one period."""

    format: str = "polar-report-1"
    generated_at: datetime
    ledger: str
    period: str
    since: datetime | None
    until: datetime | None
    """Not part of the period."""
    zone: str
    tenant: str | None
    """The one tenant it is about; None for the operator's view of all."""
    rerated: bool
    """True where everything was rated by one named price book instead of those of the receipts."""
    price_books: tuple[PriceBookUsed, ...]
    currency: str | None
    """None if nothing was rated."""
    decimals: int
    tenants: tuple[TenantReport, ...]
    tiers: tuple[TierReport, ...]
    """All tenants together, by tier; the rounding lines are not in any tier."""
    rounding: Decimal
    total: Decimal
    figures: Figures
    disputed: dict[str, int]
    """Claim of an upstream that could not be → requests that were charged by what the server counted itself."""
    pruned: int = 0
    """Requests whose facts retention deleted, by whole hours; no figure but those of statements counts them."""
    token_pricing: tuple[TokenPricing, ...] = ()
    """Compute-based beside per-token prices, for tenants with a per-token reference for all of their requests."""
    promises: tuple[PromiseReport, ...] = ()
    """Promised and served latency by tenant and tier, where the price book or the caller promises one."""
    audited: tuple[PromiseDrift, ...] = ()
    """Promises on answers with all their audits up to now, of whatever period; only in the operator's view of all."""
    hardware: HardwareReport | None = None
    """At a stated price per device-hour."""
    energy: EnergyReport | None = None
    """Measured, or modelled at a stated efficiency."""
    what_if: WhatIf | None = None
    """Other price books and mixes of tiers, and what every figure rests on."""

    @property
    def is_empty(self) -> bool:
        """True if no request falls into the period."""
        return self.figures.requests == 0


def build_report(
    ledger: Ledger,
    selection: Selection | None = None,
    *,
    prices: PriceBook | None = None,
    currency: str | None = None,
    questions: Questions | None = None,
    now: datetime | None = None,
    progress: Progress = silent,
) -> Report:
    """Build the report of a period, of what ended processes left in the spool as well.

    Args:
        ledger: Where the usage is.
        selection: Which usage; by default the operator's view of all tenants and all time.
        prices: Rate by this book instead of the one each receipt was made by.
        currency: Leave out what is rated in another currency.
        questions: What to work out besides what was charged.
        now: When the report says it was made; by default the current time.
        progress: Hears how much of the usage is read, each time that it is.

    Raises:
        CurrencyMixError: The usage is rated in several currencies and none was chosen.
        QueryError: A question has no answer: a tier was not measured, or no throughput is known.
        StoreError: The ledger cannot be read.
    """
    selection = Selection(ALL_TENANTS) if selection is None else selection
    questions = Questions() if questions is None else questions
    recover_abandoned(ledger)
    rater = Rater(ledger.price_books, instead=prices, currency=currency)
    groups = totals_by_tier(ledger, selection, rater, progress)
    tenants = tenants_of(groups, rater.decimals)
    period = selection.period
    if not (prices or selection.tier):  # else it is not about what is owed
        tenants = [tenant.model_copy(update=_issued(ledger, tenant.tenant, period)) for tenant in tenants]
    summary = summarise(tenants, groups, rater.currency, rater.decimals)
    return Report(
        generated_at=now or datetime.now(UTC),
        ledger=ledger.location,
        period=period.label,
        since=period.since,
        until=period.until,
        zone=period.zone,
        tenant=None if isinstance(selection.tenant, AllTenants) else selection.tenant,
        rerated=prices is not None,
        price_books=tuple(
            PriceBookUsed(id=book.id, content_hash=digest) for digest, book in sorted(rater.used.items())
        ),
        disputed=dict(sorted(ledger.tag_values(selection, DISPUTED_TAG).items())),
        pruned=ledger.count_pruned(selection),
        token_pricing=token_pricing(summary),
        audited=_audited(ledger, selection),
        **summary._asdict(),
        **(_answers(ledger, selection, rater, summary, questions, progress) if summary.figures.requests else {}),
    )


def _issued(ledger: Ledger, tenant: str, period: Period) -> dict[str, Any]:
    """A tenant's statements that were issued over a period or parts of it, with their credit notes."""
    issued = (one.statement for one in issued_statements(ledger, tenant))
    statements = [statement for statement in issued if statement.period.overlaps(period)]
    within = {statement.id: statement for statement in statements if statement.period.is_within(period)}
    notes = credit_notes(ledger, tenant) if within else []
    return {
        "statements_cut": tuple(f"{one.id} over {one.period.label}" for one in statements if one.id not in within),
        "statements": tuple(within.values()),
        "credit_notes": tuple(note for note in notes if note.statement in within),
    }


def _audited(ledger: Ledger, selection: Selection) -> tuple[PromiseDrift, ...]:
    if not isinstance(selection.tenant, AllTenants):
        return ()
    with ledger.snapshot() as connection:
        promises = promises_of(connection, {})
    return tuple(one for one in promises if selection.tier in {None, one.tier})


def _answers(
    ledger: Ledger, selection: Selection, rater: Rater, summary: Summary, questions: Questions, progress: Progress
) -> dict[str, Any]:
    """The fields of a report that answer questions."""
    promises, busy = PromiseWatch(questions.promises), BusyTime()
    bases = [MixBasis(book) for book in (None, *questions.books)] if questions.mixes else []
    watching: list[Callable[[StoredUsage, PriceBook], None]] = [basis.add for basis in bases]
    if promises.needed(rater.used.values()):
        watching.append(promises.add)
    hardware = questions.hardware
    if hardware is not None and hardware.tokens_per_second is None:
        watching.append(lambda stored, _: busy.add(stored.record))
    usage = shown(ledger.read(selection), ledger, selection, progress, "single requests") if watching else ()
    for stored in usage:
        if (book := rater.book_of(stored)) is not None:
            for watch in watching:
                watch(stored, book)
    answers: dict[str, Any] = {"promises": promises.report(summary)}
    device = None if hardware is None else hardware_report(hardware, busy, summary)
    if questions.books or questions.mixes or device is not None:
        charged_by = ", ".join(book.id for _, book in sorted(rater.used.items()))
        others = [
            UsageByBook(book, totals_by_tier(ledger, selection, rater.under(book), progress))
            for book in questions.books
        ]
        charged = Charged(summary, charged_by, device)
        answers |= {"hardware": device, "what_if": what_if(charged, others, questions.mixes, bases, questions.savings)}
    if questions.energy is not None:
        answers["energy"] = energy_report(questions.energy, summary, selection.period)
    return answers
