"""From issued statements back to the usage they charge: recheck a whole one, trace a line or a request.

`recheck` recomputes a statement from raw usage and the book of its hash, and names every difference between what the
ledger says was owed and what the usage costs; an empty list proves that each line follows, with residue 0. If retention
has deleted usage of a statement (`rests_on_hashes`), its sums and bookings are checked, and the hash chain proves the
rest. `polar verify` runs this.

Nothing is stored for a trace: a line has tier, outcome and time, its statement has the last sequence number of its
usage, and usage does not change. So a trace is a query in either direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, and_, false, or_, select

from polar_billing.errors import QueryError
from polar_billing.ledger.books import read_book
from polar_billing.ledger.postings import transaction_lines
from polar_billing.ledger.schema import prune_table, statement_table, transaction_table, usage_table
from polar_billing.statements.books import charging_book
from polar_billing.statements.draft import Basis, compute_statement, find_late_usage
from polar_billing.statements.issued import STATEMENT, find_statement, read_statements, statement_lines
from polar_billing.statements.lines import USAGE_KINDS, phases_of
from polar_billing.statements.period_usage import SeqRange, uses_beyond_receipt, within
from polar_billing.statements.statement import statement_id
from polar_billing.values.money import exact_sum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Row

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.issued import IssuedStatement
    from polar_billing.statements.statement import Statement, StatementLine
    from polar_billing.values.periods import Period


def recheck(ledger: Ledger, issued: IssuedStatement) -> list[str]:
    """Every difference between an issued statement and what follows from the ledger, one line each."""
    with ledger.snapshot() as connection:
        return recheck_in(connection, issued)


def recheck_in(connection: Connection, issued: IssuedStatement) -> list[str]:
    """As `recheck`, in a transaction that sees one state of the ledger."""
    return [f"statement {issued.statement.id}: {difference}" for difference in _differences(connection, issued)]


def rests_on_hashes(connection: Connection, issued: IssuedStatement) -> bool:
    """True where usage that the statement is about may have been deleted by retention."""
    tenant = issued.statement.tenant
    # Not by its lines: late usage may have come to none.
    corrected = (find_statement(connection, tenant, late.statement) for late in issued.late)
    since = min([issued.statement.since, *(one.statement.since for one in corrected if one is not None)])
    query = select(prune_table.c.id).where(prune_table.c.tenant == tenant, prune_table.c.before > since)
    return connection.execute(query.limit(1)).first() is not None


def usage_of_line(ledger: Ledger, issued: IssuedStatement, line: StatementLine) -> list[int]:
    """The sequence numbers (`seq`) of the usage that a line is about, rising.

    A discount, minimum or fee is about all usage of its part of the period, a service credit about its tier's, a
    correction about the late usage only.

    Raises:
        QueryError: The line is not on this statement.
    """
    if line not in issued.statement.lines:
        raise QueryError(f"line {line.number} is not on statement {issued.statement.id!r}.", hint="Read it again.")
    with ledger.snapshot() as connection:
        query = select(usage_table.c.seq).where(*conditions_of(connection, issued, line)).order_by(usage_table.c.seq)
        return list(connection.execute(query).scalars())


def lines_of_usage(ledger: Ledger, tenant: str, seq: int) -> list[tuple[IssuedStatement, StatementLine]]:
    """The usage lines of issued statements that charge a request; none where it is unrated or not charged yet.

    Raises:
        QueryError: The tenant has no usage of this sequence number.
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
            if line.kind in USAGE_KINDS
            and line.since <= served < line.until
            and connection.execute(
                select(usage.seq).where(usage.seq == seq, *conditions_of(connection, issued, line))
            ).first()
        ]


def _differences(connection: Connection, issued: IssuedStatement) -> Iterator[str]:
    statement = issued.statement
    yield from _check_columns(connection, issued)
    yield from _check_sums(statement)
    yield from _check_booking(connection, statement)
    book = read_book(connection, statement.price_book_hash)
    if book is None:
        yield f"price book {statement.price_book_hash} is not in the ledger"
    elif book.content_hash != statement.price_book_hash:
        yield f"price book {statement.price_book_hash} does not have the content that its hash stands for"
    elif not rests_on_hashes(connection, issued):
        yield from _check_usage(connection, issued)


def _check_columns(connection: Connection, issued: IssuedStatement) -> Iterator[str]:
    """Check the columns that rows are looked up by against the document."""
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


def _check_sums(statement: Statement) -> Iterator[str]:
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


def _check_booking(connection: Connection, statement: Statement) -> Iterator[str]:
    booked = transaction_table.c
    query = select(booked.id).where(
        booked.tenant == statement.tenant, booked.kind == STATEMENT, booked.reference == statement.id
    )
    transaction: int | None = connection.execute(query).scalar()
    if transaction is None:
        yield "it is not booked"
    elif transaction_lines(connection, statement.tenant, transaction) != statement_lines(statement):
        yield f"transaction {transaction} books other amounts"


def _check_usage(connection: Connection, issued: IssuedStatement) -> Iterator[str]:
    """Compute the statement again from its usage."""
    statement = issued.statement
    earlier = read_statements(connection, statement.tenant, before=issued.number)
    known = {former.statement.id for former in earlier}
    unknown = [late.statement for late in issued.late if late.statement not in known]
    if unknown:
        yield f"it corrects statement {unknown[0]}, which was not issued before it"
        return
    book = charging_book(connection, statement)
    basis = Basis(statement.tenant, statement.period, book, issued.seq_until, issued.audits_until)
    if find_late_usage(connection, basis, earlier) != issued.late:
        yield "it leaves out late usage of earlier statements, or charges it twice"
    recomputed = compute_statement(connection, basis, earlier, issued.late)
    if recomputed.document != statement.document:
        yield from _compare(statement, recomputed)


def _compare(stored: Statement, recomputed: Statement) -> Iterator[str]:
    """Name the fields that differ, and of the lines the first one."""
    for name in type(stored).model_fields:
        old, new = getattr(stored, name), getattr(recomputed, name)
        if old == new:
            continue
        if name != "lines":
            yield f"{name} is {old}, and the usage makes it {new}"
            continue
        for index in range(max(len(old), len(new))):
            old_line, new_line = (lines[index] if index < len(lines) else None for lines in (old, new))
            if old_line != new_line:
                yield f"line {index + 1} is {old_line or 'missing'}, and the usage makes it {new_line or 'missing'}"
                break


def conditions_of(connection: Connection, issued: IssuedStatement, line: StatementLine) -> list[ColumnElement[bool]]:
    """The conditions that select the usage of a line; see `usage_of_line`."""
    statement, seqs = issued.statement, SeqRange(issued.seq_until)
    for late in issued.late:
        if late.statement == line.corrects:
            seqs = late.seqs
    usage = usage_table.c
    conditions = within(statement.tenant, line.since, line.until, seqs)
    if line.kind == "usage" or line.tier is not None:
        conditions.append(usage.tier == line.tier if line.tier is not None else usage.tier.is_(None))
    if line.outcome is not None:
        conditions.append(usage.outcome == line.outcome)
    else:
        book, period = rated_in(connection, statement, line)
        conditions.append(usage.outcome.not_in(sorted(book.free_outcomes)))
        conditions += _is_rated(connection, book, statement.tenant, period, seqs)
    return conditions


def rated_in(connection: Connection, statement: Statement, line: StatementLine) -> tuple[PriceBook, Period]:
    """The book and period that a line was rated in: for late usage those of the statement it corrects."""
    if line.corrects is not None and (corrected := find_statement(connection, statement.tenant, line.corrects)):
        statement = corrected.statement
    return charging_book(connection, statement), statement.period


def _is_rated(
    connection: Connection, book: PriceBook, tenant: str, period: Period, seqs: SeqRange
) -> list[ColumnElement[bool]]:
    """True of usage that is not unrated."""
    usage = usage_table.c
    priced: list[ColumnElement[bool]] = []
    beyond: list[int] = []
    for stretch in (stretch for phase in phases_of(book, tenant, period) for stretch in phase.stretches):
        if stretch.entry is not None:
            by_hand = usage.tier.is_(None) if stretch.entry.untiered is not None else false()
            tier = or_(usage.tier.in_(sorted(stretch.entry.tiers)), by_hand)
            priced.append(and_(usage.started_at >= stretch.since, usage.started_at < stretch.until, tier))
            beyond += uses_beyond_receipt(connection, tenant, stretch, seqs, book)
    return [or_(false(), *priced), *([usage.seq.not_in(beyond)] if beyond else [])]
