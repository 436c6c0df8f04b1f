"""Credit notes: money taken off an issued statement, which itself is not changed. Knows no usage."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert, select

from polar_billing.errors import AmountError, ConflictError, QueryError
from polar_billing.ledger import chain
from polar_billing.ledger.schema import credit_note_table, transaction_table
from polar_billing.statements.issued import STATEMENT, book_credit_note, find_statement
from polar_billing.values.money import exact_sum, to_scaled

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.statements.issued import IssuedStatement


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
        earlier = _notes(connection, issued)
        repeated = _by_reference(connection, tenant, reference)
        if repeated is not None:
            return _same_as_stored(repeated, issued, amount, reason)
        _check_amount(amount, issued, earlier)
        moment = now or datetime.now(UTC)
        book_credit_note(connection, issued.statement, reference, amount, moment, _transaction(connection, issued))
        return _store(connection, issued, reference, amount, reason, moment)


def credit_notes(ledger: Ledger, issued: IssuedStatement) -> list[CreditNote]:
    """The credit notes of a statement, in order."""
    with ledger.snapshot() as connection:
        return _notes(connection, issued)


def _check_amount(amount: Decimal, issued: IssuedStatement, earlier: list[CreditNote]) -> None:
    statement = issued.statement
    if to_scaled(amount, statement.decimals) <= 0:
        raise AmountError(f"a credit note of {amount} takes nothing off.", hint="Give a positive amount.")
    taken = exact_sum((amount, *(note.amount for note in earlier)), statement.decimals)
    if taken > statement.total:
        raise AmountError(
            f"credit notes of {taken} {statement.currency} exceed statement {statement.id!r}, which came to "
            f"{statement.total}.",
            hint="Give at most what is left of it.",
        )


def _store(
    connection: Connection, issued: IssuedStatement, reference: str, amount: Decimal, reason: str, moment: datetime
) -> CreditNote:
    values = {
        "tenant": issued.statement.tenant,
        "statement": issued.number,
        "reference": reference,
        "amount": f"{amount:f}",
        "reason": reason,
        "issued_at": moment,
    }
    added = insert(credit_note_table).values(values).returning(credit_note_table.c.number)
    number: int = connection.execute(added).scalar_one()
    chain.link(connection, credit_note_table, number)
    return CreditNote(number, issued.statement.id, reference, amount, reason, moment)


def _notes(connection: Connection, issued: IssuedStatement) -> list[CreditNote]:
    note = credit_note_table.c
    query = select(credit_note_table).where(note.statement == issued.number, note.tenant == issued.statement.tenant)
    return [_from_row(row, issued.statement.id) for row in connection.execute(query.order_by(note.number))]


def _from_row(row: Row[Any], statement_id: str) -> CreditNote:
    return CreditNote(row.number, statement_id, row.reference, Decimal(row.amount), row.reason, row.issued_at)


def _by_reference(connection: Connection, tenant: str, reference: str) -> Row[Any] | None:
    note = credit_note_table.c
    query = select(credit_note_table).where(note.tenant == tenant, note.reference == reference)
    return connection.execute(query).one_or_none()


def _same_as_stored(row: Row[Any], issued: IssuedStatement, amount: Decimal, reason: str) -> CreditNote:
    if (row.statement, Decimal(row.amount), row.reason) != (issued.number, amount, reason):
        raise ConflictError(
            f"credit note {row.reference!r} of tenant {row.tenant!r} exists with other content.",
            hint="Give every note its own reference.",
        )
    return _from_row(row, issued.statement.id)


def _transaction(connection: Connection, issued: IssuedStatement) -> int:
    booked = transaction_table.c
    query = select(booked.id).where(
        booked.tenant == issued.statement.tenant, booked.kind == STATEMENT, booked.reference == issued.statement.id
    )
    transaction: int = connection.execute(query).scalar_one()
    return transaction
