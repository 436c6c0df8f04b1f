"""The double-entry bookings of statements, prepaid credits and credit notes.

Knows accounts, not how amounts are worked out.
"""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from polar_billing.ledger.postings import Account, Line, post
from polar_billing.values.money import from_scaled, to_scaled

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from sqlalchemy import Connection

    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.statement import CreditUse, Statement


STATEMENT: Final = "statement"
"""Kind of the transaction that books a statement; its reference is the statement's id."""

_ACCOUNTS: Final = {"discount": Account.DISCOUNTS, "service credit": Account.SERVICE_CREDITS}
"""By kind of line; every other kind counts as revenue."""


def book_statement(
    connection: Connection, statement: Statement, book: PriceBook, earlier_credits: Mapping[str, Decimal]
) -> None:
    """Book what a statement says: what is owed, what credits paid, and what became of credits.

    Args:
        connection: The write transaction in which the statement is stored.
        statement: The statement.
        book: Its book, which has the credits.
        earlier_credits: Credits that earlier statements touched; the others are booked as received.
    """
    granted = {credit.id: credit for credit in book.credits}
    for use in statement.credits:
        if use.id not in earlier_credits:
            _book_credit(connection, statement, use, granted[use.id].effective_from)
    post(connection, statement.tenant, STATEMENT, statement.id, statement_lines(statement), statement.until)
    for use in statement.credits:
        if use.expired:
            _book_expiry(connection, statement, use)


def statement_lines(statement: Statement) -> list[Line]:
    """Debits and credits of a statement; they sum to zero because its lines sum to its total."""
    decimals = statement.decimals
    sums: defaultdict[Account, int] = defaultdict(int)
    sums[Account.RECEIVABLE] = to_scaled(statement.due, decimals)
    sums[Account.CREDITS] = sum(to_scaled(use.used, decimals) for use in statement.credits)
    for line in statement.lines:
        sums[_ACCOUNTS.get(line.kind, Account.REVENUE)] -= to_scaled(line.amount, decimals)
    sums[Account.ROUNDING] = -to_scaled(statement.rounding, decimals)
    lines = [Line(account, from_scaled(units, decimals), statement.currency) for account, units in sums.items()]
    always = (Account.RECEIVABLE, Account.REVENUE)
    lines += [Line(Account.REVENUE, Decimal(0), statement.currency)] if Account.REVENUE not in sums else []
    return [line for line in lines if line.amount or line.account in always]


def _book_credit(connection: Connection, statement: Statement, use: CreditUse, at: datetime) -> None:
    lines = [
        Line(Account.CASH, use.before, statement.currency),
        Line(Account.CREDITS, use.before.copy_negate(), statement.currency),
    ]
    post(connection, statement.tenant, "credit", use.id, lines, at)


def _book_expiry(connection: Connection, statement: Statement, use: CreditUse) -> None:
    lines = [
        Line(Account.CREDITS, use.expired, statement.currency),
        Line(Account.EXPIRED_CREDITS, use.expired.copy_negate(), statement.currency),
    ]
    post(connection, statement.tenant, "credit_expiry", use.id, lines, statement.until)


def book_credit_note(
    connection: Connection, statement: Statement, reference: str, amount: Decimal, at: datetime, corrects: int
) -> None:
    """Take an amount off what a statement asked for.

    Args:
        connection: The write transaction in which the note is stored.
        statement: The statement.
        reference: The note's idempotency key within the tenant.
        amount: Positive.
        at: When it takes effect.
        corrects: The transaction that booked the statement.
    """
    lines = [
        Line(Account.REVENUE, amount, statement.currency),
        Line(Account.RECEIVABLE, amount.copy_negate(), statement.currency),
    ]
    post(connection, statement.tenant, "credit_note", reference, lines, at, corrects=corrects)
