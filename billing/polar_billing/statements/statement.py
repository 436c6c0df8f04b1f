"""A statement: what a tenant owes for a period, as one frozen value with a canonical text.

`sum(line.amount) + rounding == total`, and `total - sum(credit.used) == due`, to the last digit. The text depends only
on the usage, the book and what was issued before, not on the order in which usage was stored or on when the statement
is computed.

A prepaid credit pays a statement whose period it touches: one that ends after the credit begins, and begins before it
expires. Lower priority numbers are used first, then credits that expire first. What is left of a credit that expires
within the period is lost after this statement. Knows no database.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, PlainSerializer

from polar_billing.prices.entries import tier_order
from polar_billing.prices.rating import COMPUTE, Counts
from polar_billing.statements.lines import ExactLine, Kind, bounds
from polar_billing.values.canonical import canonical_text
from polar_billing.values.money import from_scaled, plain, round_lines, to_scaled
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.lines import Agreement, PeriodUsage


Amount = Annotated[Decimal, PlainSerializer(lambda value: f"{value:f}", when_used="json")]
Figure = Annotated[Decimal, PlainSerializer(plain, when_used="json")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StatementLine(_Part):
    """One line; `quantity × unit_price`, where it has them, is the amount before rounding, exactly."""

    number: int
    """From 1."""
    kind: Kind
    tier: str | None
    """None for programs named by hand, and for lines that are not about a single tier."""
    item: str
    quantity: Figure | None
    unit: str | None
    unit_price: Figure | None
    """The tier's multiplier included. Unit: currency units per `unit`."""
    amount: Amount
    """Rounded once, half to even."""
    since: datetime
    until: datetime
    """End of the part of the period that the line is about, excluded."""
    outcome: str | None = None
    """The one outcome it is about, where that is free."""
    note: str | None = None
    corrects: str | None = None
    """For late usage: the statement of the period in which it was served."""


_SAME: Final = tuple(name for name in StatementLine.model_fields if name not in {"number", "amount"})
"""Fields that a line has before it is rounded as well."""


class TierUsage(_Part):
    """Usage of one tier in the period; includes unrated requests, but not late usage of earlier periods."""

    tier: str | None
    requests: int
    compute_units: Figure
    """Executed. Unit: CU."""
    tokens_input: int
    tokens_output: int


class TierAgreement(_Part):
    """Audited answers of one tier in the period, and those that agreed with full depth."""

    agreed: int
    compared: int
    share: Figure | None
    """Share that agreed, by the weights of the audits, rounded down to 6 decimals; None without an audit."""


class CreditUse(_Part):
    """One prepaid credit on a statement: `before == used + expired + after`."""

    id: str
    before: Amount
    used: Amount
    expired: Amount
    after: Amount


class Statement(_Part):
    """A tenant's charges for a period, and the amount due."""

    format: str = "polar-statement-1"
    id: str
    tenant: str
    since: datetime
    until: datetime
    """Not part of the period."""
    zone: str
    """IANA name of the time zone that the period's ends are shown in."""
    currency: str
    decimals: int
    price_book: str
    price_book_hash: str
    requests: int
    """Served in the period and on this statement; includes unrated requests, but not late usage of earlier periods."""
    requests_late: int
    """Late usage of earlier statements' periods, charged here."""
    unrated: dict[str, int]
    """Reason → requests without a price; they are in no amount."""
    usage: tuple[TierUsage, ...]
    agreement: dict[str, TierAgreement]
    """By tier of which a plan promises it."""
    unsettled: tuple[str, ...]
    """Promises on agreement that too few audits were made of to settle them, in words."""
    lines: tuple[StatementLine, ...]
    rounding: Amount
    """The rounded total less the sum of the rounded lines; a line of its own on paper."""
    total: Amount
    """Charges before prepaid credits."""
    credits: tuple[CreditUse, ...]
    due: Amount
    """Amount left to pay; negative where money is owed to the tenant."""

    @property
    def period(self) -> Period:
        """Its period."""
        return Period(self.since, self.until, self.zone)

    @property
    def document(self) -> str:
        """The whole statement as canonical JSON."""
        return canonical_text(self.model_dump(mode="json"))


def usage_by_tier(usage: PeriodUsage) -> tuple[TierUsage, ...]:
    """Sum a period's usage by tier."""
    counts: dict[str | None, Counts] = {}
    for use in usage.uses:
        counts[use.tier] = counts.get(use.tier, Counts()) + use.counts
    return tuple(
        TierUsage(
            tier=tier,
            requests=counted.requests,
            compute_units=COMPUTE.quantity(counted.flops),
            tokens_input=counted.tokens_input,
            tokens_output=counted.tokens_output,
        )
        for tier, counted in sorted(counts.items(), key=lambda item: tier_order(item[0]))
    )


def agreement_by_tier(usage: PeriodUsage) -> dict[str, TierAgreement]:
    """Sum a period's audits by tier."""
    sums: dict[str, Agreement] = {}
    for (_, tier), agreement in usage.agreement.items():
        sums[tier] = sums[tier] + agreement if tier in sums else agreement
    return {
        tier: TierAgreement(
            agreed=one.agreed,
            compared=one.compared,
            share=from_scaled(one.weight_agreed * 10**6 // one.weight, 6) if one.weight else None,
        )
        for tier, one in sorted(sums.items())
    }


def statement_id(tenant: str, period: Period, currency: str) -> str:
    """The id of the one statement of a tenant, period and currency."""
    since, until = bounds(period)
    text = json.dumps([tenant, since.isoformat(), until.isoformat(), currency])
    return f"st-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def rounded_lines(lines: Sequence[ExactLine], book: PriceBook) -> tuple[tuple[StatementLine, ...], Decimal, Decimal]:
    """Round each line once; returns the lines, the residue and the total, which is the sum of both."""
    rounded = round_lines([line.exact for line in lines], book.statement_decimals)
    statement_lines = tuple(
        StatementLine(number=number, amount=amount, **{name: getattr(line, name) for name in _SAME})
        for number, (line, amount) in enumerate(zip(lines, rounded.amounts, strict=True), start=1)
    )
    return statement_lines, rounded.residue, rounded.total


def credits_left(statements: Iterable[Statement]) -> dict[str, Decimal]:
    """The rest of each credit that a tenant's statements, in the order they were issued, have touched."""
    return {use.id: use.after for statement in statements for use in statement.credits}


def pay_with_credits(
    total: Decimal, tenant: str, period: Period, book: PriceBook, left: Mapping[str, Decimal]
) -> tuple[tuple[CreditUse, ...], Decimal]:
    """Pay a total, if it is positive, with the tenant's credits, of which `left` says what earlier statements left.

    Returns what became of each credit that could pay, and what is due.
    """
    decimals = book.statement_decimals
    owed = to_scaled(total, decimals)
    since, until = bounds(period)
    uses = []
    own = (credit for credit in book.credits if credit.tenant == tenant)
    for credit in sorted(own, key=lambda credit: credit.order):
        before = to_scaled(left.get(credit.id, credit.amount), decimals)
        if credit.effective_from >= until or not before:
            continue
        over = credit.expires_at is not None and credit.expires_at <= until
        usable = credit.expires_at is None or credit.expires_at > since
        used = min(before, max(owed, 0)) if usable else 0
        owed -= used
        expired = before - used if over else 0
        units = {"before": before, "used": used, "expired": expired, "after": before - used - expired}
        amounts = {name: from_scaled(count, decimals) for name, count in units.items()}
        uses.append(CreditUse(id=credit.id, **amounts))
    return tuple(uses), from_scaled(owed, decimals)
