"""Compute a statement from one state of the ledger: this period's charges, late usage of earlier ones, credits.

    draft_statement(ledger, tenant, period)    the statement as of now; books nothing
    issue_statement(ledger, tenant, period)    the statement, permanently (in `statements.issue`)

A statement takes usage and audits up to a sequence number each. What is stored later is late, and becomes correction
lines on the next statement: the total of the earlier period with it, minus the total without.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING

from polar_billing.statements.books import book_for, charging_book
from polar_billing.statements.charges import Charges, charges_of
from polar_billing.statements.issued import LateUsage, read_statements
from polar_billing.statements.lines import bounds, phases_of
from polar_billing.statements.period_usage import (
    SeqRange,
    count_audits,
    count_requests,
    last_audit,
    last_seq,
    read_usage,
)
from polar_billing.statements.retention import KeptUsage, check_kept, pruned_of
from polar_billing.statements.statement import (
    Statement,
    agreement_by_tier,
    credits_left,
    pay_with_credits,
    rounded_lines,
    statement_id,
    usage_by_tier,
)
from polar_billing.values.money import EXACT_SCALE, exact_difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.issued import IssuedStatement
    from polar_billing.statements.lines import ExactLine, PeriodUsage
    from polar_billing.values.periods import Period


@dataclass(frozen=True)
class Basis:
    """All that a statement is computed from, together with the tenant's earlier statements."""

    tenant: str
    period: Period
    book: PriceBook
    seq_until: int
    """Usage up to this sequence number, included, is on it."""
    audits_until: int = 0
    """Audits up to this one, included, settle what plans promise on agreement."""

    @property
    def id(self) -> str:
        """The statement's id."""
        return statement_id(self.tenant, self.period, self.book.currency)


def draft_statement(
    ledger: Ledger,
    tenant: str,
    period: Period,
    *,
    book: PriceBook | None = None,
) -> Statement:
    """Say what a statement would say now; stores and books nothing.

    Args:
        ledger: Where the usage is.
        tenant: Whose statement; no other tenant's usage is read.
        period: Half-open; needs both ends.
        book: Charge by this book; by default the one in force for the tenant (see `books`).

    Raises:
        PeriodError: The period has no beginning or no end, or some of its usage was deleted by retention.
        QueryError: The ledger knows nothing of the tenant.
        PriceBookError: It is not clear which book to charge by.
        StoreError: The ledger cannot be read.
    """
    with ledger.snapshot() as connection:
        check_kept(connection, tenant, period)
        seqs = SeqRange(last_seq(connection, tenant))
        chosen = book or book_for(connection, tenant, period, seqs)
        basis = Basis(tenant, period, chosen, seqs.until, last_audit(connection, tenant))
        earlier = read_statements(connection, tenant)
        return compute_statement(connection, basis, earlier, find_late_usage(connection, basis, earlier))


def find_late_usage(connection: Connection, basis: Basis, earlier: Sequence[IssuedStatement]) -> tuple[LateUsage, ...]:
    """Find usage and audits of earlier statements' periods that are not on any statement yet."""
    charged = {issued.statement.id: (issued.seq_until, issued.audits_until) for issued in earlier}
    for issued in earlier:
        for late in issued.late:
            charged[late.statement] = (late.seqs.until, late.audits.until)
    found = []
    for issued in earlier:
        statement = issued.statement
        if statement.currency != basis.book.currency or statement.id == basis.id:
            continue
        seq, audit = charged[statement.id]
        seqs, audits = SeqRange(basis.seq_until, after=seq), SeqRange(basis.audits_until, after=audit)
        if count_requests(connection, statement, seqs) or count_audits(connection, statement, audits):
            found.append(LateUsage(statement.id, seqs, audits))
    return tuple(found)


def compute_statement(
    connection: Connection, basis: Basis, earlier: Sequence[IssuedStatement], late: tuple[LateUsage, ...]
) -> Statement:
    """Compute a statement; the same arguments and usage give the same statement, to the byte.

    `late` is usage of the periods of earlier statements, which are given in order.
    """
    tenant, period, book = basis.tenant, basis.period, basis.book
    usage, charges = _charges(connection, basis, KeptUsage())
    by_id = {issued.statement.id: issued.statement for issued in earlier}
    corrections = [_correction(connection, by_id[late_usage.statement], late_usage) for late_usage in late]
    correction_lines = (line for correction in corrections for line in correction.lines)
    unrated = Counter(charges.unrated)
    for correction in corrections:
        unrated.update(correction.unrated)
    lines, rounding, total = rounded_lines([*charges.lines, *correction_lines], book)
    credits_, due = pay_with_credits(total, tenant, period, book, credits_left(by_id.values()))
    since, until = bounds(period)
    return Statement(
        id=basis.id,
        tenant=tenant,
        since=since,
        until=until,
        zone=period.zone,
        currency=book.currency,
        decimals=book.statement_decimals,
        price_book=book.id,
        price_book_hash=book.content_hash,
        requests=sum(use.counts.requests for use in usage.uses),
        requests_late=sum(count_requests(connection, by_id[one.statement], one.seqs) for one in late),
        unrated=dict(sorted(unrated.items())),
        usage=usage_by_tier(usage),
        agreement=agreement_by_tier(usage),
        unsettled=charges.unsettled,
        lines=lines,
        rounding=rounding,
        total=total,
        credits=credits_,
        due=due,
    )


def _charges(connection: Connection, basis: Basis, pruned: KeptUsage) -> tuple[PeriodUsage, Charges]:
    phases = phases_of(basis.book, basis.tenant, basis.period)
    seqs, audits = SeqRange(basis.seq_until), SeqRange(basis.audits_until)
    usage = pruned.together_with(read_usage(connection, basis.tenant, phases, seqs, audits, basis.book), phases)
    return usage, charges_of(basis.book, basis.period, phases, usage)


def _correction(connection: Connection, statement: Statement, late: LateUsage) -> Charges:
    """Rate an earlier period with its late usage and audits, less the same without them; by that statement's book."""
    book, pruned = charging_book(connection, statement), pruned_of(connection, statement)  # charged already, all of it
    basis = Basis(statement.tenant, statement.period, book, late.seqs.until, late.audits.until)
    _, after = _charges(connection, basis, pruned)
    without = replace(basis, seq_until=late.seqs.after, audits_until=late.audits.after)
    _, before = _charges(connection, without, pruned)
    unrated = {reason: count - before.unrated.get(reason, 0) for reason, count in after.unrated.items()}
    lines = (replace(line, corrects=statement.id) for line in _difference(after.lines, before.lines))
    return Charges(tuple(lines), {reason: count for reason, count in unrated.items() if count})


def _difference(after: Sequence[ExactLine], before: Sequence[ExactLine]) -> Iterator[ExactLine]:
    """Lines that turn one rating of a period into another; lines that are equal in both are left out."""
    old = {line.key: line for line in before}
    for line in after:
        former = old.pop(line.key, None)
        if former is None:
            yield line
        elif (line.exact, line.quantity) != (former.exact, former.quantity):
            yield replace(line, exact=line.exact - former.exact, quantity=_minus(line.quantity, former.quantity))
    for line in old.values():
        yield replace(line, exact=-line.exact, quantity=_minus(None, line.quantity))


def _minus(quantity: Decimal | None, former: Decimal | None) -> Decimal | None:
    """A difference of quantities, exact whatever the decimal context of the thread."""
    if quantity is None and former is None:
        return None
    return exact_difference(quantity or Decimal(0), former or Decimal(0), EXACT_SCALE)
