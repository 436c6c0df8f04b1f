"""Double entry: book a transaction whose entries sum to zero, and read balances off the entries.

To be called inside an open write transaction (`Ledger.transaction()`), so that what the
caller stores and what it books become durable together or not at all:

    post(connection, tenant, kind, reference, lines, at, corrects=None, note=None) -> int

    post(connection, "acme", "statement", "2026-11", [
        Line(Account.RECEIVABLE, Decimal("12.50"), "USD"),
        Line(Account.REVENUE, Decimal("-12.50"), "USD"),
    ], at=period_end)

* An amount is positive for a debit and negative for a credit, with at most 12 decimals and no upper limit.
* The lines sum to zero in every currency, or `UnbalancedError` says by how much they do not.
* (tenant, kind, reference) is booked once: again with the same lines, `post` returns the id of the first transaction;
  with others it raises `ConflictError`.
* Nothing booked is ever changed. A correction is a transaction of its own that names in `corrects` the id of the
  one it corrects; `reversal(lines)` turns lines around.
* The transaction is linked into the tenant's hash chain before `post` returns.

Balances are projections: sums over entries, never stored. Knows no usage and no prices.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, func, insert, select

from polar_billing.errors import AmountError, ConflictError, QueryError, UnbalancedError
from polar_billing.ledger import chain
from polar_billing.ledger.schema import entry_table, transaction_table
from polar_billing.values.money import STORED_SCALE, from_scaled, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from decimal import Decimal

    from sqlalchemy import Row


_UNIT: Final = 10**STORED_SCALE
_INT64_MAX: Final = 2**63 - 1


class Account(StrEnum):
    """The accounts of a tenant's books; a debit raises assets and costs, a credit raises the others."""

    RECEIVABLE = "receivable"
    """Asset: what the tenant owes on statements."""
    CASH = "cash"
    """Asset: what the tenant paid."""
    CREDITS = "credits"
    """Liability: prepaid and granted credits not used yet."""
    REVENUE = "revenue"
    """Income: charges of statements."""
    EXPIRED_CREDITS = "expired_credits"
    """Income: credits that ran out unused."""
    ROUNDING = "rounding"
    """Income: residue lines of statements."""
    GRANTS = "grants"
    """Cost: credits given without payment."""
    SERVICE_CREDITS = "service_credits"
    """Cost: credits for promises missed."""
    DISCOUNTS = "discounts"
    """Cost: what discounts took off."""
    HELD = "held"
    """Memorandum: money reserved for requests under way."""
    HOLDS = "holds"
    """Memorandum: the other side of `HELD`."""


@dataclass(frozen=True)
class Line:
    """One entry of a transaction."""

    account: Account
    amount: Decimal
    """Positive for a debit, negative for a credit. Unit: currency units."""
    currency: str
    """ISO 4217 code."""


def post(
    connection: Connection,
    tenant: str,
    kind: str,
    reference: str,
    lines: Sequence[Line],
    at: datetime,
    *,
    corrects: int | None = None,
    note: str | None = None,
) -> int:
    """Book one transaction, once; see the top of this module.

    Args:
        connection: An open write transaction of the ledger.
        tenant: Whose books.
        kind: Why: statement, payment, grant, hold, …
        reference: The caller's idempotency key within tenant and kind.
        lines: At least two; they sum to zero in every currency. Lines of 0 are allowed.
        at: When it takes effect: service or statement time; the time of booking is noted beside it.
        corrects: The id of a transaction of the same tenant that this one corrects.
        note: Text for people.

    Returns:
        The id of the transaction, the first one's where it was booked before.

    Raises:
        AmountError: An amount is not finite or has more than 12 decimals.
        UnbalancedError: The lines do not sum to zero.
        ConflictError: The reference is booked with other content.
        QueryError: `corrects` names no transaction of this tenant.
    """
    amounts = _checked(lines)
    chain.lock_heads(connection, [tenant])  # on PostgreSQL: no one else books for this tenant now
    values = {"corrects": corrects, "note": note, "effective_at": at}
    column = transaction_table.c
    same = (column.tenant == tenant, column.kind == kind, column.reference == reference)
    if (booked := connection.execute(select(transaction_table).where(*same)).one_or_none()) is not None:
        return _booked_before(connection, booked, values, lines, amounts)
    if corrects is not None:
        query = select(column.id).where(column.id == corrects, column.tenant == tenant)
        if connection.execute(query).first() is None:
            raise QueryError(
                f"transaction {corrects} of tenant {tenant!r} does not exist, so it cannot be corrected.",
                hint="Name the id that post returned for this tenant.",
            )
    identity = {"tenant": tenant, "kind": kind, "reference": reference, "booked_at": datetime.now(UTC)}
    added = insert(transaction_table).values(**identity, **values).returning(transaction_table.c.id)
    number: int = connection.execute(added).scalar_one()
    connection.execute(insert(entry_table), _entries(number, tenant, lines, amounts))
    chain.link(connection, transaction_table, number)
    return number


def _checked(lines: Sequence[Line]) -> list[int]:
    """The amounts in units of 10^-12, which balance."""
    if len(lines) < 2:
        raise UnbalancedError(f"a transaction of {len(lines)} line(s) cannot balance.", hint="Give at least two lines.")
    amounts = [to_scaled(line.amount, STORED_SCALE) for line in lines]
    sums: defaultdict[str, int] = defaultdict(int)
    for line, amount in zip(lines, amounts, strict=True):
        if abs(amount) // _UNIT > _INT64_MAX:
            raise AmountError(f"amount {line.amount} does not fit in 64 bits.", hint="Split it into several lines.")
        sums[line.currency] += amount
    for currency, rest in sums.items():
        if rest:
            raise UnbalancedError(
                f"the lines of a transaction sum to {from_scaled(rest, STORED_SCALE):f} {currency}, not 0.",
                hint="Match every debit with credits of the same sum.",
            )
    return amounts


def _entries(number: int, tenant: str, lines: Sequence[Line], amounts: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "transaction_id": number,
            "line": place,
            "tenant": tenant,
            "account": str(line.account),
            "currency": line.currency,
            # Both with the sign of the amount.
            "whole": abs(amount) // _UNIT * (1 if amount >= 0 else -1),
            "rest": abs(amount) % _UNIT * (1 if amount >= 0 else -1),
        }
        for place, (line, amount) in enumerate(zip(lines, amounts, strict=True), start=1)
    ]


def _booked_before(
    connection: Connection, booked: Row[Any], values: dict[str, Any], lines: Sequence[Line], amounts: Sequence[int]
) -> int:
    number: int = booked.id
    same = all(getattr(booked, name) == value for name, value in values.items())
    stored = transaction_lines(connection, booked.tenant, number)
    expected = [
        Line(line.account, from_scaled(a, STORED_SCALE), line.currency) for line, a in zip(lines, amounts, strict=True)
    ]
    if not same or stored != expected:
        raise ConflictError(
            f"{booked.kind} {booked.reference!r} of tenant {booked.tenant!r} is booked (transaction {number}) "
            "with other content.",
            hint="Book a correction that names it; the first booking stands.",
        )
    return number


def reversal(lines: Iterable[Line]) -> list[Line]:
    """The lines that reverse a transaction."""
    return [Line(line.account, line.amount.copy_negate(), line.currency) for line in lines]  # `-` would round


def transaction_lines(connection: Connection, tenant: str, number: int) -> list[Line]:
    """The lines of one transaction of a tenant, in order; empty if there is none."""
    entry = entry_table.c
    query = select(entry_table).where(entry.transaction_id == number, entry.tenant == tenant).order_by(entry.line)
    return [
        Line(Account(row.account), from_scaled(row.whole * _UNIT + row.rest, STORED_SCALE), row.currency)
        for row in connection.execute(query)
    ]


def balances(
    connection: Connection, tenant: str, *, until: datetime | None = None
) -> dict[tuple[Account, str], Decimal]:
    """The balance of each account of a tenant, summed over its entries.

    Args:
        connection: Any transaction of the ledger.
        tenant: Whose books.
        until: Count only what takes effect before this moment; None for everything.

    Returns:
        (account, currency) → debits minus credits, exact. Unit: currency units.
    """
    entry, booked = entry_table.c, transaction_table.c
    query = select(entry.account, entry.currency, func.sum(entry.whole), func.sum(entry.rest))
    query = query.where(entry.tenant == tenant).group_by(entry.account, entry.currency)
    if until is not None:
        query = query.join(transaction_table, booked.id == entry.transaction_id).where(booked.effective_at < until)
    return {
        (Account(account), currency): from_scaled(int(whole) * _UNIT + int(rest), STORED_SCALE)
        for account, currency, whole, rest in connection.execute(query)
    }
