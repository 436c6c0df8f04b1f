"""Prepaid credits: which of them pay a statement, in which order, and what is left. Pure.

A credit pays a statement whose period it touches: one that ends after the credit begins, and begins before it
expires. The lower priority number goes first, then what expires first. What is left of a credit that expires
within the period is gone after this statement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_billing.statements.lines import bounds
from polar_billing.statements.statement import CreditUse
from polar_billing.values.money import from_scaled, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from decimal import Decimal

    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.statement import Statement
    from polar_billing.values.periods import Period


def left_after(statements: Iterable[Statement]) -> dict[str, Decimal]:
    """What is left of each credit that a tenant's statements, in the order they were issued, have touched."""
    return {use.id: use.after for statement in statements for use in statement.credits}


def pay(
    total: Decimal, tenant: str, period: Period, book: PriceBook, left: Mapping[str, Decimal]
) -> tuple[tuple[CreditUse, ...], Decimal]:
    """Pay a total with the tenant's credits.

    Args:
        total: What the statement comes to; nothing is paid where it is not positive.
        tenant: Whose credits.
        period: The statement's.
        book: Where the credits are.
        left: What is left of credits that earlier statements touched.

    Returns:
        What became of each credit that could pay, and what is due.
    """
    decimals = book.statement_decimals
    owed = to_scaled(total, decimals)
    since, until = bounds(period)
    uses = []
    for credit in sorted((one for one in book.credits if one.tenant == tenant), key=lambda one: one.order):
        before = to_scaled(left.get(credit.id, credit.amount), decimals)
        if credit.effective_from >= until or not before:
            continue
        over = credit.expires_at is not None and credit.expires_at <= until
        usable = credit.expires_at is None or credit.expires_at > since
        used = min(before, max(owed, 0)) if usable else 0
        owed -= used
        expired = before - used if over else 0
        amounts = (from_scaled(units, decimals) for units in (before, used, expired, before - used - expired))
        uses.append(
            CreditUse.model_validate(
                dict(zip(("id", "before", "used", "expired", "after"), (credit.id, *amounts), strict=True))
            )
        )
    return tuple(uses), from_scaled(owed, decimals)
