"""Issued statements in the ledger: rows of `polar_statement` and back, and the double entries that book them.

Knows how a statement, a prepaid credit and a credit note are stored and booked, not how amounts are computed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import insert, select

from polar_billing.errors import StoreDamagedError
from polar_billing.ledger import chain
from polar_billing.ledger.postings import Account, Line, post
from polar_billing.ledger.records import AllTenants
from polar_billing.ledger.schema import statement_table
from polar_billing.statements.period_usage import SeqRange
from polar_billing.statements.statement import Statement
from polar_billing.values.money import from_scaled, to_scaled

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from sqlalchemy import Connection, Row

    from polar_billing.prices.book import PriceBook

STATEMENT: Final = "statement"
"""Kind of the transaction that books a statement; its reference is the statement's id."""

_ACCOUNTS: Final = {"discount": Account.DISCOUNTS, "service credit": Account.SERVICE_CREDITS}
"""By kind of line; every other kind counts as revenue."""


@dataclass(frozen=True)
class LateUsage:
    """Usage and audits of an earlier statement's period that were stored after that statement was issued."""

    statement: str
    """Id of the earlier statement."""
    seqs: SeqRange
    """Sequence numbers of the usage."""
    audits: SeqRange
    """Those of the audits."""

    @property
    def row(self) -> list[str | int]:
        """The row that the ledger stores of it."""
        return [self.statement, self.seqs.after, self.seqs.until, self.audits.after, self.audits.until]


@dataclass(frozen=True)
class IssuedStatement:
    """A statement as the ledger holds it."""

    number: int
    """Rises with every statement issued."""
    statement: Statement
    seq_until: int
    """Usage up to this sequence number, included, is on it."""
    audits_until: int
    """Audits up to this one, included, settle its promises."""
    late: tuple[LateUsage, ...]
    issued_at: datetime
    """Statement time, UTC."""


def store_statement(
    connection: Connection,
    statement: Statement,
    seq_until: int,
    audits_until: int,
    late: tuple[LateUsage, ...],
    issued_at: datetime,
) -> IssuedStatement:
    """Store a new statement as a link of its tenant's chain; the caller has checked that there is none."""
    values = {
        "tenant": statement.tenant,
        "since": statement.since,
        "until": statement.until,
        "currency": statement.currency,
        "id": statement.id,
        "price_book_hash": statement.price_book_hash,
        "seq_until": seq_until,
        "audits_until": audits_until,
        "late": json.dumps([usage.row for usage in late]),
        "issued_at": issued_at,
        "document": statement.document,
    }
    added = insert(statement_table).values(values).returning(statement_table.c.number)
    number: int = connection.execute(added).scalar_one()
    chain.link(connection, statement_table, number)
    return IssuedStatement(number, statement, seq_until, audits_until, late, issued_at)


def read_statements(
    connection: Connection, tenant: str | AllTenants, *, before: int | None = None
) -> list[IssuedStatement]:
    """A tenant's statements in the order they were issued; with `before`, only those of a lower number."""
    issued = statement_table.c
    query = select(statement_table).order_by(issued.number)
    if not isinstance(tenant, AllTenants):
        query = query.where(issued.tenant == tenant)
    if before is not None:
        query = query.where(issued.number < before)
    return [_from_row(row) for row in connection.execute(query)]


def find_statement(connection: Connection, tenant: str, statement_id: str) -> IssuedStatement | None:
    """One statement of a tenant; None if it has none of that id."""
    issued = statement_table.c
    query = select(statement_table).where(issued.tenant == tenant, issued.id == statement_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else _from_row(row)


def _from_row(row: Row[Any]) -> IssuedStatement:
    """Read a row; one whose content is not a statement is damaged."""
    try:
        late = tuple(
            LateUsage(name, SeqRange(until, after), SeqRange(audits_until, audits_after))
            for name, after, until, audits_after, audits_until in json.loads(row.late)
        )
        statement = Statement.model_validate_json(row.document)
    except ValueError as error:
        raise StoreDamagedError(
            f"statement {row.id!r} of tenant {row.tenant!r} cannot be read: {str(error).splitlines()[0]}.",
            hint="Run `polar verify`.",
        ) from error
    return IssuedStatement(row.number, statement, row.seq_until, row.audits_until, late, row.issued_at)


def book_statement(
    connection: Connection, statement: Statement, book: PriceBook, earlier_credits: Mapping[str, Decimal]
) -> None:
    """Book what a statement says: what is owed, what credits paid, and what became of credits.

    Credits that no earlier statement touched are booked as received.
    """
    tenant, currency = statement.tenant, statement.currency
    granted = {credit.id: credit for credit in book.credits}
    for use in statement.credits:
        if use.id not in earlier_credits:
            received = _pair(Account.CASH, Account.CREDITS, use.before, currency)
            post(connection, tenant, "credit", use.id, received, granted[use.id].effective_from)
    post(connection, tenant, STATEMENT, statement.id, statement_lines(statement), statement.until)
    for use in statement.credits:
        if use.expired:
            lines = _pair(Account.CREDITS, Account.EXPIRED_CREDITS, use.expired, currency)
            post(connection, tenant, "credit_expiry", use.id, lines, statement.until)


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


def _pair(debit: Account, credit: Account, amount: Decimal, currency: str) -> list[Line]:
    return [Line(debit, amount, currency), Line(credit, amount.copy_negate(), currency)]


def book_credit_note(
    connection: Connection, statement: Statement, reference: str, amount: Decimal, at: datetime, corrects: int
) -> None:
    """Take an amount off what a statement asked for; `corrects` is the transaction that booked it."""
    lines = _pair(Account.REVENUE, Account.RECEIVABLE, amount, statement.currency)
    post(connection, statement.tenant, "credit_note", reference, lines, at, corrects=corrects)
