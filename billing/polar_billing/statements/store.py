"""Issued statements in the ledger: rows of `polar_statement`, and back.

Knows how a statement is stored and looked up, not how it is computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert, select

from polar_billing.errors import StoreDamagedError
from polar_billing.ledger import chain
from polar_billing.ledger.schema import statement_table
from polar_billing.statements.statement import Statement
from polar_billing.statements.usage import SeqRange

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Connection, Row


@dataclass(frozen=True)
class LateUsage:
    """Usage of an earlier statement's period that was stored after that statement was issued."""

    statement: str
    """Id of the earlier statement."""
    seqs: SeqRange
    """Which usage."""


@dataclass(frozen=True)
class IssuedStatement:
    """A statement as the ledger holds it."""

    number: int
    """Rises with every statement issued."""
    statement: Statement
    seq_until: int
    """Usage up to this sequence number, included, is on it."""
    late: tuple[LateUsage, ...]
    issued_at: datetime
    """Statement time, UTC."""

    @property
    def reference(self) -> str:
        """The reference of its bookings."""
        return self.statement.id


def store_statement(
    connection: Connection, statement: Statement, seq_until: int, late: tuple[LateUsage, ...], issued_at: datetime
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
        "late": json.dumps([[usage.statement, usage.seqs.after, usage.seqs.until] for usage in late]),
        "issued_at": issued_at,
        "document": statement.document,
    }
    added = insert(statement_table).values(values).returning(statement_table.c.number)
    number: int = connection.execute(added).scalar_one()
    chain.link(connection, statement_table, number)
    return IssuedStatement(number, statement, seq_until, late, issued_at)


def read_statements(connection: Connection, tenant: str, *, before: int | None = None) -> list[IssuedStatement]:
    """A tenant's statements in the order they were issued; with `before`, only those of a lower number."""
    issued = statement_table.c
    query = select(statement_table).where(issued.tenant == tenant).order_by(issued.number)
    if before is not None:
        query = query.where(issued.number < before)
    return [_from_row(row) for row in connection.execute(query)]


def find_statement(connection: Connection, tenant: str, statement_id: str) -> IssuedStatement | None:
    """One statement of a tenant; None where it has none of that id."""
    issued = statement_table.c
    query = select(statement_table).where(issued.tenant == tenant, issued.id == statement_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else _from_row(row)


def _from_row(row: Row[Any]) -> IssuedStatement:
    """Read a row.

    Raises:
        StoreDamagedError: Its content is not a statement.
    """
    try:
        late = tuple(LateUsage(name, SeqRange(until=until, after=after)) for name, after, until in json.loads(row.late))
        statement = Statement.model_validate_json(row.document)
    except ValueError as error:
        raise StoreDamagedError(
            f"statement {row.id!r} of tenant {row.tenant!r} cannot be read: {str(error).splitlines()[0]}.",
            hint="Run `polar verify`.",
        ) from error
    return IssuedStatement(row.number, statement, row.seq_until, late, row.issued_at)
