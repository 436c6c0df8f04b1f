"""What a report shows beside the charges: the same usage under other price books, and statements already issued.

Other books are applied request by request, as receipts are; what plans add over a period is `statements.repricing`'s.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from polar_billing.money import EXACT_SCALE, exact_sum, from_scaled, round_half_even
from polar_billing.totals import Rater, UsageTotals, accumulate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_billing.periods import Period
    from polar_billing.price_book import PriceBook
    from polar_billing.statements.statement import Statement
    from polar_billing.storage import LedgerStorage, Selection

__all__ = ["OtherCharge", "charges_under", "issued_within", "summed"]


class OtherCharge(BaseModel):
    """The same usage under one other price book."""

    model_config = ConfigDict(frozen=True)

    price_book: str
    content_hash: str
    currency: str
    charge: Decimal | None
    """None where the book has a price for none of it. Unit: `currency`."""
    unrated: int
    """Requests that the book has no price for; they are not in the charge."""


def charges_under(
    ledger: LedgerStorage, selection: Selection, books: Sequence[PriceBook]
) -> dict[str, tuple[OtherCharge, ...]]:
    """What each tenant's usage comes to under each book, in the order of the books."""
    found: dict[str, list[OtherCharge]] = {}
    for book in books:
        rater = Rater({}, instead=book)
        groups = accumulate(ledger.read(selection), rater, lambda stored: stored.record.tenant)
        for tenant, totals in groups.items():
            found.setdefault(tenant, []).append(_charge(book, totals))
    return {tenant: tuple(charges) for tenant, charges in found.items()}


def _charge(book: PriceBook, totals: UsageTotals) -> OtherCharge:
    decimals = book.statement_decimals
    charge = from_scaled(round_half_even(totals.exact, EXACT_SCALE, decimals), decimals)
    return OtherCharge(
        price_book=book.id,
        content_hash=book.content_hash,
        currency=book.currency,
        charge=charge if totals.rated else None,
        unrated=totals.unrated.total(),
    )


def summed(charges: Iterable[tuple[OtherCharge, ...]]) -> tuple[OtherCharge, ...]:
    """Every tenant together, by book."""
    return tuple(_sum(members) for members in zip(*charges, strict=True))


def _sum(members: tuple[OtherCharge, ...]) -> OtherCharge:
    amounts = [one.charge for one in members if one.charge is not None]
    decimals = max((-int(amount.as_tuple().exponent) for amount in amounts), default=0)
    charge = exact_sum(amounts, decimals) if amounts else None
    return members[0].model_copy(update={"charge": charge, "unrated": sum(one.unrated for one in members)})


def issued_within(ledger: LedgerStorage, tenants: Iterable[str], period: Period) -> dict[str, tuple[Statement, ...]]:
    """The statements of tenants whose periods lie within a period, in the order they were issued."""
    from polar_billing.ledger import Ledger
    from polar_billing.statements.issue import issued_statements

    if not isinstance(ledger, Ledger):  # another store keeps no statements
        return {}
    return {
        tenant: tuple(one.statement for one in issued_statements(ledger, tenant) if _lies_in(one.statement, period))
        for tenant in tenants
    }


def _lies_in(statement: Statement, period: Period) -> bool:
    begins = period.since is None or statement.since >= period.since
    return begins and (period.until is None or statement.until <= period.until)
