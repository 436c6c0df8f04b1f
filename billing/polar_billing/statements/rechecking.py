"""Make issued statements again from raw usage and the book of their hash, and say what differs.

For `polar verify`: `recheck` names every difference between what the ledger says was owed and what the usage comes
to; an empty list is the proof that each line follows, with residue 0. Where retention has deleted usage of a
statement (`rests_on_hashes`), its sums and bookings are checked, and the hash chain stands for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from polar_billing.ledger.books import read_book
from polar_billing.ledger.postings import transaction_lines
from polar_billing.ledger.schema import prune_table, statement_table, transaction_table
from polar_billing.statements.booking import STATEMENT, statement_lines
from polar_billing.statements.make import late_usage, make_statement, wanted_again
from polar_billing.statements.statement import statement_id
from polar_billing.statements.store import read_statements
from polar_billing.values.money import exact_sum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Row

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.statements.statement import Statement
    from polar_billing.statements.store import IssuedStatement


def recheck(ledger: Ledger, issued: IssuedStatement) -> list[str]:
    """Every difference between an issued statement and what follows from the ledger; see `recheck_in`."""
    with ledger.snapshot() as connection:
        return recheck_in(connection, issued)


def recheck_in(connection: Connection, issued: IssuedStatement) -> list[str]:
    """Every difference between an issued statement and what follows from the ledger.

    Args:
        connection: Any transaction of the ledger.
        issued: As `read_statements` gave it.

    Returns:
        One line per difference, empty where there is none.
    """
    return [f"statement {issued.statement.id}: {told}" for told in _differences(connection, issued)]


def rests_on_hashes(connection: Connection, issued: IssuedStatement) -> bool:
    """True where usage that the statement is about may have been deleted by retention."""
    since = min([issued.statement.since, *(line.since for line in issued.statement.lines)])
    query = select(prune_table.c.id).where(
        prune_table.c.tenant == issued.statement.tenant, prune_table.c.before > since
    )
    return connection.execute(query.limit(1)).first() is not None


def _differences(connection: Connection, issued: IssuedStatement) -> Iterator[str]:
    statement = issued.statement
    yield from _columns(connection, issued)
    yield from _sums(statement)
    yield from _booking(connection, statement)
    book = read_book(connection, statement.price_book_hash)
    if book is None:
        yield f"price book {statement.price_book_hash} is not in the ledger"
    elif book.content_hash != statement.price_book_hash:
        yield f"price book {statement.price_book_hash} has other content than its hash says"
    elif not rests_on_hashes(connection, issued):
        yield from _remade(connection, issued)


def _columns(connection: Connection, issued: IssuedStatement) -> Iterator[str]:
    """Hold the columns that rows are found by to the document."""
    query = select(statement_table).where(statement_table.c.number == issued.number)
    row: Row[Any] | None = connection.execute(query).one_or_none()
    if row is None:
        yield f"row {issued.number} is not in the ledger"
        return
    statement = issued.statement
    for name in ("tenant", "since", "until", "currency", "id", "price_book_hash", "document"):
        if getattr(row, name) != getattr(statement, name):
            yield f"column {name} of row {issued.number} differs from the document"
    if statement.id != statement_id(statement.tenant, statement.period, statement.currency):
        yield "the id does not follow from tenant, period and currency"


def _sums(statement: Statement) -> Iterator[str]:
    decimals = statement.decimals
    lines = exact_sum((line.amount for line in statement.lines), decimals)
    if exact_sum((lines, statement.rounding), decimals) != statement.total:
        yield f"lines {lines} and rounding {statement.rounding} do not sum to the total {statement.total}"
    paid = exact_sum((use.used for use in statement.credits), decimals)
    if exact_sum((statement.due, paid), decimals) != statement.total:
        yield f"credits {paid} and due {statement.due} do not sum to the total {statement.total}"
    for use in statement.credits:
        if exact_sum((use.used, use.expired, use.after), decimals) != use.before:
            yield f"credit {use.id} does not add up"


def _booking(connection: Connection, statement: Statement) -> Iterator[str]:
    booked = transaction_table.c
    query = select(booked.id).where(
        booked.tenant == statement.tenant, booked.kind == STATEMENT, booked.reference == statement.id
    )
    number: int | None = connection.execute(query).scalar()
    if number is None:
        yield "it is not booked"
    elif transaction_lines(connection, statement.tenant, number) != statement_lines(statement):
        yield f"transaction {number} books other amounts"


def _remade(connection: Connection, issued: IssuedStatement) -> Iterator[str]:
    statement = issued.statement
    earlier = read_statements(connection, statement.tenant, before=issued.number)
    known = {one.statement.id for one in earlier}
    unknown = [late.statement for late in issued.late if late.statement not in known]
    if unknown:
        yield f"it corrects statement {unknown[0]}, which was not issued before it"
        return
    wanted = wanted_again(connection, statement, issued.seq_until)
    if late_usage(connection, wanted, earlier) != issued.late:
        yield "it leaves late usage of earlier statements out, or charges it twice"
    again = make_statement(connection, wanted, earlier, issued.late)
    if again.document != statement.document:
        yield from _compare(statement, again)


def _compare(stored: Statement, again: Statement) -> Iterator[str]:
    """Name the fields, and of the lines the first that differs."""
    for name in type(stored).model_fields:
        one, other = getattr(stored, name), getattr(again, name)
        if one == other:
            continue
        if name != "lines":
            yield f"{name} is {one}, and the usage makes it {other}"
            continue
        for place in range(max(len(one), len(other))):
            old, new = (lines[place] if place < len(lines) else None for lines in (one, other))
            if old != new:
                yield f"line {place + 1} is {_told(old)}, and the usage makes it {_told(new)}"
                break


def _told(line: object) -> str:
    return "missing" if line is None else str(line)
