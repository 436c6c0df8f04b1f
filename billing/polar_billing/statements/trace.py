"""From a line of a statement to the usage it is about, and from a request to the lines that charge it.

Nothing is stored for this: a line says tier, outcome and time, its statement says up to which number usage was
taken, and usage does not change. So a trace is a query in either direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, and_, false, or_, select

from polar_billing.errors import QueryError
from polar_billing.ledger.schema import usage_table
from polar_billing.statements.facts import Numbers, within
from polar_billing.statements.lines import USAGE_KINDS, windows_of
from polar_billing.statements.make import wanted_again
from polar_billing.statements.store import find_statement, read_statements

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.statement import Statement, StatementLine
    from polar_billing.statements.store import IssuedStatement
    from polar_billing.values.periods import Period


def usage_of_line(ledger: Ledger, issued: IssuedStatement, line: StatementLine) -> list[int]:
    """The numbers (`seq`) of the usage that a line is about, rising.

    A discount, minimum, fee or service credit is about all usage of its part of the period, a service credit about
    its tier's; a correction about the late usage only.

    Raises:
        QueryError: The line is not one of this statement.
    """
    if line not in issued.statement.lines:
        raise QueryError(f"line {line.number} is not one of statement {issued.statement.id!r}.", hint="Read it again.")
    with ledger.snapshot() as connection:
        query = select(usage_table.c.seq).where(*_conditions(connection, issued, line)).order_by(usage_table.c.seq)
        return list(connection.execute(query).scalars())


def lines_of_usage(ledger: Ledger, tenant: str, seq: int) -> list[tuple[IssuedStatement, StatementLine]]:
    """The usage lines on issued statements that a request is on; none where it is unrated or not charged yet.

    Raises:
        QueryError: The tenant has no usage of this number.
    """
    usage = usage_table.c
    with ledger.snapshot() as connection:
        served = connection.execute(select(usage.started_at).where(usage.tenant == tenant, usage.seq == seq)).scalar()
        if served is None:
            raise QueryError(f"tenant {tenant!r} has no usage {seq}.", hint="`polar usage --requests` lists them.")
        return [
            (issued, line)
            for issued in read_statements(connection, tenant)
            for line in issued.statement.lines
            if line.kind in USAGE_KINDS and line.since <= served < line.until and _is_on(connection, issued, line, seq)
        ]


def _is_on(connection: Connection, issued: IssuedStatement, line: StatementLine, seq: int) -> bool:
    query = select(usage_table.c.seq).where(usage_table.c.seq == seq, *_conditions(connection, issued, line))
    return connection.execute(query).first() is not None


def _conditions(connection: Connection, issued: IssuedStatement, line: StatementLine) -> list[ColumnElement[bool]]:
    """What is true of the usage of a line."""
    statement, numbers = issued.statement, Numbers(issued.seq_until)
    for late in issued.late:
        if late.statement == line.corrects:
            numbers = late.numbers
    usage = usage_table.c
    conditions = within(statement.tenant, line.since, line.until, numbers)
    if line.kind == "usage" or line.tier is not None:
        conditions.append(usage.tier == line.tier if line.tier is not None else usage.tier.is_(None))
    if line.outcome is not None:
        conditions.append(usage.outcome == line.outcome)
    else:
        book, period = _book_of(connection, statement, line)
        conditions.append(usage.outcome.not_in(sorted(book.free_outcomes)))
        conditions.append(_has_a_price(book, statement.tenant, period))
    return conditions


def _book_of(connection: Connection, statement: Statement, line: StatementLine) -> tuple[PriceBook, Period]:
    """The book and period that a line was rated in: for late usage those of the statement it corrects."""
    if line.corrects is not None and (corrected := find_statement(connection, statement.tenant, line.corrects)):
        statement = corrected.statement
    return wanted_again(connection, statement, 0).book, statement.period


def _has_a_price(book: PriceBook, tenant: str, period: Period) -> ColumnElement[bool]:
    """True of usage that is not unrated."""
    usage = usage_table.c
    priced = []
    for stretch in (one for window in windows_of(book, tenant, period) for one in window.stretches):
        if stretch.entry is not None:
            by_hand = usage.tier.is_(None) if stretch.entry.untiered is not None else false()
            tier = or_(usage.tier.in_(sorted(stretch.entry.tiers)), by_hand)
            priced.append(and_(usage.started_at >= stretch.since, usage.started_at < stretch.until, tier))
    return or_(false(), *priced)
