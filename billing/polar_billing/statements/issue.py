"""Issue statements: store, chain and book them, each once and for ever.

Usage is read outside the write transaction, so that metering goes on meanwhile. That is safe because a statement
takes usage up to a sequence number that was fixed while nobody else stored usage of the tenant, and such usage never
changes; if another statement of the tenant is issued in between, usage is read again.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from polar_billing.errors import CurrencyMixError, PeriodError
from polar_billing.ledger import chain
from polar_billing.ledger.append import store_books
from polar_billing.ledger.schema import NO_TENANT
from polar_billing.statements.books import book_for
from polar_billing.statements.draft import Basis, check_kept, compute_statement, find_late_usage
from polar_billing.statements.issued import book_statement, read_statements, store_statement
from polar_billing.statements.lines import bounds
from polar_billing.statements.period_usage import SeqRange, last_seq
from polar_billing.statements.statement import credits_left

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.issued import IssuedStatement, LateUsage
    from polar_billing.statements.lines import Agreement
    from polar_billing.statements.statement import Statement
    from polar_billing.values.periods import Period


def issue_statement(
    ledger: Ledger,
    tenant: str,
    period: Period,
    *,
    book: PriceBook | None = None,
    agreement: Mapping[str, Agreement] | None = None,
    now: datetime | None = None,
) -> IssuedStatement:
    """Issue the statement of a tenant and period, or return the one that was issued.

    Args:
        ledger: Where the usage is.
        tenant: Whose statement.
        period: Half-open; it must be over, and overlap no other statement of this tenant and currency.
        book: Charge by this book; by default the one in force for the tenant.
        agreement: As for `draft_statement`.
        now: Statement time; by default the current time.

    Returns:
        The statement as stored. Issued again, it is still the first one, whatever was stored since.

    Raises:
        PeriodError: The period is not over, has no end, overlaps an issued statement's, or some of its usage was
            deleted by retention.
        CurrencyMixError: The tenant's earlier statements are in another currency.
        QueryError: The ledger knows nothing of the tenant.
        PriceBookError: It is not clear which book to charge by.
        StoreError: It could not be stored; then nothing was stored or booked.
    """
    moment = now or datetime.now(UTC)
    _check_over(period, moment)
    while True:
        with ledger.transaction() as connection:
            chain.lock_heads(connection, [tenant])  # no usage of this tenant is on its way now
            seqs = SeqRange(last_seq(connection, tenant))
        with ledger.snapshot() as connection:
            earlier = read_statements(connection, tenant)
            if (issued := _issued(earlier, period, book)) is not None:
                return issued
            check_kept(connection, tenant, period)
            chosen = book or book_for(connection, tenant, period, seqs)
            basis = Basis(tenant, period, chosen, seqs.until, agreement or {})
            _check_fits(basis, earlier)
            late = find_late_usage(connection, basis, earlier)
            statement = compute_statement(connection, basis, earlier, late)
        stored = _store(ledger, basis, statement, late, earlier, moment)
        if stored is not None:
            return stored


def issued_statements(ledger: Ledger, tenant: str) -> list[IssuedStatement]:
    """A tenant's statements, in the order they were issued."""
    with ledger.snapshot() as connection:
        return read_statements(connection, tenant)


def _store(
    ledger: Ledger,
    basis: Basis,
    statement: Statement,
    late: tuple[LateUsage, ...],
    earlier: Sequence[IssuedStatement],
    moment: datetime,
) -> IssuedStatement | None:
    """Store and book it; None if another statement of the tenant came first."""
    with ledger.transaction() as connection:
        chain.lock_heads(connection, [NO_TENANT, basis.tenant])
        if len(read_statements(connection, basis.tenant)) != len(earlier):
            return None
        store_books(connection, {basis.book.content_hash: basis.book})
        stored = store_statement(connection, statement, basis.seq_until, late, moment)
        touched = credits_left(issued.statement for issued in earlier)
        book_statement(connection, statement, basis.book, touched)
    return stored


def _issued(earlier: Sequence[IssuedStatement], period: Period, book: PriceBook | None) -> IssuedStatement | None:
    """The statement of a period if it was issued; where a book was named, in its currency."""
    since, until = bounds(period)
    for issued in earlier:
        statement = issued.statement
        same_currency = book is None or book.currency == statement.currency
        if (statement.since, statement.until) == (since, until) and same_currency:
            return issued
    return None


def _check_over(period: Period, moment: datetime) -> None:
    _, until = bounds(period)
    if until > moment:
        raise PeriodError(
            f"period {period.label} ends at {until.isoformat()}, which is still to come.",
            hint="Issue it once the period is over; until then make a draft.",
        )


def _check_fits(basis: Basis, earlier: Sequence[IssuedStatement]) -> None:
    since, until = bounds(basis.period)
    for issued in earlier:
        statement = issued.statement
        if statement.currency != basis.book.currency:
            raise CurrencyMixError(
                f"tenant {basis.tenant!r} has statements in {statement.currency}, and price book "
                f"{basis.book.id!r} is in {basis.book.currency}.",
                hint=f"Name a book in {statement.currency} with --book FILE.",
            )
        if statement.since < until and since < statement.until:
            raise PeriodError(
                f"period {basis.period.label} overlaps statement {statement.id!r} over {statement.period.label}.",
                hint="Begin where that one ends; usage that is missing from it becomes late usage.",
            )
