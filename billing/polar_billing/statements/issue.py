"""Issue statements and credit notes: store, chain and book each of them once, permanently.

A credit note credits money on an issued statement, which itself is not changed.

Usage is read outside the write transaction, so that metering continues meanwhile. That is safe because a statement
takes usage up to a sequence number that was fixed while nobody else stored usage of the tenant, and such usage never
changes; if another statement of the tenant is issued in between, usage is read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, insert, select

from polar_billing.errors import AmountError, ConflictError, CurrencyMixError, PeriodError, QueryError
from polar_billing.ledger import chain
from polar_billing.ledger.append import store_books
from polar_billing.ledger.records import AllTenants
from polar_billing.ledger.schema import NO_TENANT, credit_note_table, statement_table, transaction_table
from polar_billing.statements.books import book_for
from polar_billing.statements.draft import Basis, compute_statement, find_late_usage
from polar_billing.statements.issued import (
    STATEMENT,
    book_credit_note,
    book_statement,
    find_statement,
    read_statements,
    store_statement,
)
from polar_billing.statements.lines import bounds
from polar_billing.statements.period_usage import SeqRange, last_audit, last_seq
from polar_billing.statements.retention import check_kept
from polar_billing.statements.statement import credits_left
from polar_billing.values.money import exact_difference, exact_sum, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import ColumnElement, Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.issued import IssuedStatement
    from polar_billing.statements.statement import Statement
    from polar_billing.values.periods import Period


_ZONES_APART: Final = timedelta(hours=26)
"""The longest time between the same border in two time zones."""


def issue_statement(
    ledger: Ledger,
    tenant: str,
    period: Period,
    *,
    book: PriceBook | None = None,
    now: datetime | None = None,
) -> IssuedStatement:
    """Issue the statement of a tenant and period, or return the one that was issued.

    Args:
        ledger: Where the usage is.
        tenant: Whose statement.
        period: Half-open; it must be over, and overlap no other statement of this tenant and currency.
        book: Charge by this book; by default the one in force for the tenant.
        now: Statement time; by default the current time.

    Returns:
        The statement as stored. Issued again, it is still the first one, whatever was stored since.

    Raises:
        PeriodError: The period is not over, has no end, overlaps an issued statement's, leaves a gap to one in another
            time zone, or some of its usage was deleted by retention.
        CurrencyMixError: The tenant's earlier statements are in another currency.
        QueryError: The ledger knows nothing of the tenant.
        PriceBookError: It is not clear which book to charge by.
        StoreError: It could not be stored; then nothing was stored or booked.
    """
    moment = now or datetime.now(UTC)
    if (until := bounds(period)[1]) > moment:
        raise PeriodError(
            f"period {period.label} ends at {until.isoformat()}, which is in the future.",
            hint="Issue it once the period is over; until then make a draft.",
        )
    while True:
        with ledger.transaction() as connection:
            chain.lock_heads(connection, [tenant])  # no usage or audit of this tenant is on its way now
            seqs, audits_until = SeqRange(last_seq(connection, tenant)), last_audit(connection, tenant)
        with ledger.snapshot() as connection:
            earlier = read_statements(connection, tenant)
            if (issued := _issued(earlier, period, book)) is not None:
                return issued
            check_kept(connection, tenant, period)
            chosen = book or book_for(connection, tenant, period, seqs)
            basis = Basis(tenant, period, chosen, seqs.until, audits_until)
            _check_fits(basis, earlier)
            late = find_late_usage(connection, basis, earlier)
            statement = compute_statement(connection, basis, earlier, late)
        with ledger.transaction() as connection:
            chain.lock_heads(connection, [NO_TENANT, tenant])
            check_kept(connection, tenant, period)  # usage may have been pruned since
            if len(read_statements(connection, tenant)) == len(earlier):  # else another one came first
                store_books(connection, {chosen.content_hash: chosen})
                stored = store_statement(connection, statement, seqs.until, audits_until, late, moment)
                book_statement(connection, statement, chosen, credits_left(issued.statement for issued in earlier))
                return stored


def issued_statements(ledger: Ledger, tenant: str | AllTenants) -> list[IssuedStatement]:
    """A tenant's statements, or those of `ALL_TENANTS`, in the order they were issued."""
    with ledger.snapshot() as connection:
        return read_statements(connection, tenant)


def _issued(earlier: Sequence[IssuedStatement], period: Period, book: PriceBook | None) -> IssuedStatement | None:
    """The statement of a period if it was issued; where a book was named, in its currency."""
    for issued in earlier:
        statement = issued.statement
        same_currency = book is None or book.currency == statement.currency
        if (statement.since, statement.until) == bounds(period) and same_currency:
            return issued
    return None


def _check_fits(basis: Basis, earlier: Sequence[IssuedStatement]) -> None:
    since, until = bounds(basis.period)
    statements = [issued.statement for issued in earlier]
    for statement in statements:
        if statement.currency != basis.book.currency:
            raise CurrencyMixError(
                f"tenant {basis.tenant!r} has statements in {statement.currency}, and price book "
                f"{basis.book.id!r} is in {basis.book.currency}.",
                hint=f"Name a book in {statement.currency} with --book FILE.",
            )
        if statement.period.overlaps(basis.period):
            raise PeriodError(
                f"period {basis.period.label} overlaps statement {statement.id!r} over {statement.period.label}.",
                hint="Begin where that one ends; usage that is missing from it becomes late usage.",
            )
        begins, ends = min(until, statement.until), max(since, statement.since)
        is_open = not any(other.since < ends and begins < other.until for other in statements)
        if statement.zone != basis.period.zone and begins < ends <= begins + _ZONES_APART and is_open:
            raise PeriodError(
                f"period {basis.period.label} leaves a gap of {ends - begins} to statement {statement.id!r} over "
                f"{statement.period.label}, in another time zone; usage of that time would be on no statement.",
                hint=f"Close it: --since {min(since, begins).isoformat()} --until {max(until, ends).isoformat()}.",
            )


@dataclass(frozen=True)
class CreditNote:
    """An amount taken off one statement."""

    number: int
    statement: str
    """Its id."""
    reference: str
    amount: Decimal
    """Positive; in the statement's currency and decimals."""
    reason: str
    issued_at: datetime


def credit_note(
    ledger: Ledger,
    tenant: str,
    statement_id: str,
    amount: Decimal,
    *,
    reason: str,
    reference: str,
    now: datetime | None = None,
) -> CreditNote:
    """Take an amount off an issued statement, once per reference.

    Args:
        ledger: Where the statement is.
        tenant: Whose.
        statement_id: Its id.
        amount: Positive, with at most the statement's decimals; together with earlier notes at most its total.
        reason: For people.
        reference: The caller's idempotency key within the tenant.
        now: Statement time of the note; by default the current time.

    Raises:
        QueryError: The tenant has no such statement.
        AmountError: The amount is not finite, not positive, too fine or more than is left of the statement.
        ConflictError: The reference was used with other content.
        StoreError: It could not be stored; then nothing was stored or booked.
    """
    with ledger.transaction() as connection:
        chain.lock_heads(connection, [tenant])
        issued = find_statement(connection, tenant, statement_id)
        if issued is None:
            raise QueryError(
                f"tenant {tenant!r} has no statement {statement_id!r}.",
                hint="`polar statement --tenant NAME` lists them.",
            )
        note = credit_note_table.c
        for stored in _notes(connection, note.tenant == tenant, note.reference == reference):
            if (stored.statement, stored.amount, stored.reason) != (statement_id, amount, reason):
                raise ConflictError(
                    f"credit note {reference!r} of tenant {tenant!r} exists with other content.",
                    hint="Give every note its own reference.",
                )
            return stored
        _check_amount(amount, issued, _notes(connection, note.tenant == tenant, note.statement == issued.number))
        moment, booked = now or datetime.now(UTC), transaction_table.c
        booking = select(booked.id).where(
            booked.tenant == tenant, booked.kind == STATEMENT, booked.reference == statement_id
        )
        transaction: int = connection.execute(booking).scalar_one()
        book_credit_note(connection, issued.statement, reference, amount, moment, transaction)
        values = {"tenant": tenant, "statement": issued.number, "reference": reference, "amount": f"{amount:f}"}
        values |= {"reason": reason, "issued_at": moment}
        added = insert(credit_note_table).values(values).returning(note.number)
        number: int = connection.execute(added).scalar_one()
        chain.link(connection, credit_note_table, number)
        return CreditNote(number, statement_id, reference, amount, reason, moment)


def credit_notes(ledger: Ledger, tenant: str | AllTenants) -> list[CreditNote]:
    """The credit notes on a tenant's statements, or on those of `ALL_TENANTS`, in the order they were issued."""
    own = () if isinstance(tenant, AllTenants) else (credit_note_table.c.tenant == tenant,)
    with ledger.snapshot() as connection:
        return _notes(connection, *own)


def due_after(statement: Statement, notes: Iterable[CreditNote]) -> Decimal:
    """The amount left to pay of a statement, its credit notes taken off; negative where money is owed to the tenant."""
    credited = exact_sum((note.amount for note in notes), statement.decimals)
    return exact_difference(statement.due, credited, statement.decimals)


def _check_amount(amount: Decimal, issued: IssuedStatement, earlier: list[CreditNote]) -> None:
    statement = issued.statement
    if to_scaled(amount, statement.decimals) <= 0:
        raise AmountError(f"a credit note of {amount} credits nothing.", hint="Give a positive amount.")
    taken = exact_sum((amount, *(note.amount for note in earlier)), statement.decimals)
    if taken > statement.total:
        raise AmountError(
            f"credit notes of {taken} {statement.currency} exceed statement {statement.id!r}, whose total is "
            f"{statement.total}.",
            hint="Give at most what is left of it.",
        )


def _notes(connection: Connection, *conditions: ColumnElement[bool]) -> list[CreditNote]:
    note, statement = credit_note_table.c, statement_table.c
    columns = (note.number, statement.id, note.reference, note.amount, note.reason, note.issued_at)
    own = and_(statement.number == note.statement, statement.tenant == note.tenant)
    query = select(*columns).join(statement_table, own).where(*conditions).order_by(note.number)
    return [CreditNote(*row[:3], Decimal(row.amount), *row[4:]) for row in connection.execute(query)]
