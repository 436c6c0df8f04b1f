"""A statement: what a tenant owes for a period, as one frozen value with a canonical text.

`sum(line.amount) + rounding == total`, and `total - sum(credit.used) == due`, to the last digit. The text depends on
nothing but the usage, the book and what was issued before: not on the order in which usage was stored, nor on when
the statement is made. Knows no database.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, PlainSerializer

from polar_billing.prices.entries import tier_order
from polar_billing.prices.rating import COMPUTE, Counts
from polar_billing.statements.lines import ExactLine, Kind, bounds
from polar_billing.values.money import plain, round_lines
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.lines import Facts


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
    """None for programs named by hand, and for lines that are about no single tier."""
    item: str
    quantity: Figure | None
    unit: str | None
    unit_price: Figure | None
    """The tier's multiplier included. Unit: currency units per `unit`."""
    amount: Amount
    """Rounded once, half to even."""
    since: datetime
    until: datetime
    """The part of the period the line is about, itself excluded."""
    outcome: str | None = None
    """The one outcome it is about, where that is free."""
    note: str | None = None
    corrects: str | None = None
    """For late usage: the statement of the period in which it was served."""


class TierUsage(_Part):
    """What was served in the period, by tier; unrated requests included, late usage of earlier periods not."""

    tier: str | None
    requests: int
    compute_units: Figure
    """Executed. Unit: CU."""
    tokens_input: int
    tokens_output: int


class CreditUse(_Part):
    """What became of one prepaid credit on a statement: `before == used + expired + after`."""

    id: str
    before: Amount
    used: Amount
    expired: Amount
    after: Amount


class Statement(_Part):
    """What a tenant owes for a period."""

    format: str = "polar-statement-1"
    id: str
    tenant: str
    since: datetime
    until: datetime
    """Not part of the period."""
    zone: str
    """IANA name; the period's ends are told in it."""
    currency: str
    decimals: int
    price_book: str
    price_book_hash: str
    requests: int
    """Served in the period and on this statement, unrated ones included; without late usage of earlier ones."""
    requests_late: int
    """Late usage of earlier statements' periods, charged here."""
    unrated: dict[str, int]
    """Reason → requests without a price; they are in no amount."""
    usage: tuple[TierUsage, ...]
    agreement: dict[str, tuple[int, int]]
    """Tier → answers that agreed with full depth, and answers compared; as told by who issued it."""
    lines: tuple[StatementLine, ...]
    rounding: Amount
    """What the rounded lines miss of the rounded sum; a line of its own on paper."""
    total: Amount
    """Charges before prepaid credits."""
    credits: tuple[CreditUse, ...]
    due: Amount
    """What is left to pay; negative where the tenant is owed."""

    @property
    def period(self) -> Period:
        """Its period."""
        return Period(self.since, self.until, self.zone)

    @property
    def document(self) -> str:
        """The whole statement as canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def usage_by_tier(facts: Facts) -> tuple[TierUsage, ...]:
    """Sum a period's usage up by tier."""
    counts: dict[str | None, Counts] = {}
    for use in facts.uses:
        counts[use.tier] = counts.get(use.tier, Counts()) + use.counts
    return tuple(
        TierUsage(
            tier=tier,
            requests=counted.requests,
            compute_units=COMPUTE.quantity(counted.flops),
            tokens_input=counted.tokens_input,
            tokens_output=counted.tokens_output,
        )
        for tier, counted in sorted(counts.items(), key=lambda one: tier_order(one[0]))
    )


def statement_id(tenant: str, period: Period, currency: str) -> str:
    """The id of the one statement of a tenant, period and currency."""
    since, until = bounds(period)
    text = json.dumps([tenant, since.isoformat(), until.isoformat(), currency])
    return f"st-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def printed(lines: Sequence[ExactLine], book: PriceBook) -> tuple[tuple[StatementLine, ...], Decimal, Decimal]:
    """Round lines once each.

    Returns:
        The lines, the residue and the total; the first two sum to the third.
    """
    rounded = round_lines([line.exact for line in lines], book.statement_decimals)
    made = tuple(
        StatementLine(
            number=number,
            kind=line.kind,
            tier=line.tier,
            item=line.item,
            quantity=line.quantity,
            unit=line.unit,
            unit_price=line.unit_price,
            amount=amount,
            since=line.since,
            until=line.until,
            outcome=line.outcome,
            note=line.note,
            corrects=line.corrects,
        )
        for number, (line, amount) in enumerate(zip(lines, rounded.amounts, strict=True), start=1)
    )
    return made, rounded.residue, rounded.total
