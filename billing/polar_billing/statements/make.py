"""Make a statement from one state of the ledger: this period's charges, late usage of earlier ones, credits.

    draft_statement(ledger, tenant, period)    what a statement would say now; books nothing
    issue_statement(ledger, tenant, period)    the statement, once and for ever (in `statements.issue`)

A statement takes usage up to a number; what is stored later is late, and becomes correction lines on the next
statement: what the earlier period comes to with it, less what it came to without.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from polar_billing.errors import PeriodError, StoreDamagedError
from polar_billing.ledger.books import read_book
from polar_billing.ledger.schema import prune_table
from polar_billing.statements.books import book_for
from polar_billing.statements.charges import Charges, charges_of
from polar_billing.statements.credits import left_after, pay
from polar_billing.statements.facts import Numbers, count_requests, facts_of, last_number
from polar_billing.statements.lines import Agreement, bounds, windows_of
from polar_billing.statements.statement import Statement, printed, statement_id, usage_by_tier
from polar_billing.statements.store import Late, read_statements
from polar_billing.values.money import EXACT_SCALE, from_scaled, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from decimal import Decimal

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.lines import ExactLine, Facts
    from polar_billing.statements.store import IssuedStatement
    from polar_billing.values.periods import Period


@dataclass(frozen=True)
class Wanted:
    """Which statement to make."""

    tenant: str
    period: Period
    book: PriceBook
    seq_until: int
    agreement: Mapping[str, Agreement] = field(default_factory=dict)


def draft_statement(
    ledger: Ledger,
    tenant: str,
    period: Period,
    *,
    book: PriceBook | None = None,
    agreement: Mapping[str, Agreement] | None = None,
) -> Statement:
    """Say what a statement would say now; stores and books nothing.

    Args:
        ledger: Where the usage is.
        tenant: Whose statement; no other tenant's usage is read.
        period: Half-open; needs both ends.
        book: Charge by this book; by default the one in force for the tenant (see `books`).
        agreement: How many answers of a tier agreed with full depth, where that was measured and a plan promises it.

    Raises:
        PeriodError: The period has no beginning or no end, or some of its usage was deleted by retention.
        QueryError: The ledger knows nothing of the tenant.
        PriceBookError: It is not clear which book to charge by.
        StoreError: The ledger cannot be read.
    """
    with ledger.snapshot() as connection:
        check_kept(connection, tenant, period)
        numbers = Numbers(last_number(connection, tenant))
        chosen = book or book_for(connection, tenant, period, numbers)
        wanted = Wanted(tenant, period, chosen, numbers.until, agreement or {})
        earlier = read_statements(connection, tenant)
        return make_statement(connection, wanted, earlier, late_usage(connection, wanted, earlier))


def check_kept(connection: Connection, tenant: str, period: Period) -> None:
    """Refuse a period of which retention has deleted usage: a statement over it would be short of that.

    Raises:
        PeriodError: Some was deleted.
    """
    since, _ = bounds(period)
    pruned = prune_table.c
    query = select(func.max(pruned.before)).where(pruned.tenant == tenant, pruned.before > since, pruned.requests > 0)
    before: datetime | None = connection.execute(query).scalar()
    if before is not None:
        raise PeriodError(
            f"usage of tenant {tenant!r} served before {before.isoformat()} was pruned, and period {period.label} "
            "needs it.",
            hint="Issue statements before you prune.",
        )


def late_usage(connection: Connection, wanted: Wanted, earlier: Sequence[IssuedStatement]) -> tuple[Late, ...]:
    """Find usage of earlier statements' periods that is on no statement yet."""
    charged = {one.statement.id: one.seq_until for one in earlier}
    for one in earlier:
        for late in one.late:
            charged[late.statement] = late.numbers.until
    found = []
    for one in earlier:
        statement = one.statement
        if statement.currency != wanted.book.currency or statement.id == _id(wanted):
            continue
        numbers = Numbers(wanted.seq_until, after=charged[statement.id])
        if count_requests(connection, wanted.tenant, statement.since, statement.until, numbers):
            found.append(Late(statement.id, numbers))
    return tuple(found)


def make_statement(
    connection: Connection, wanted: Wanted, earlier: Sequence[IssuedStatement], late: tuple[Late, ...]
) -> Statement:
    """Make a statement; the same arguments and usage make the same statement, to the byte.

    Args:
        connection: Any transaction of the ledger.
        wanted: Which.
        earlier: The tenant's statements issued before, in order.
        late: What of their periods to charge here.
    """
    tenant, period, book = wanted.tenant, wanted.period, wanted.book
    facts, charges = _charges(connection, wanted)
    by_id = {one.statement.id: one.statement for one in earlier}
    corrections = [_correction(connection, by_id[one.statement], one.numbers) for one in late]
    lines, rounding, total = printed([*charges.lines, *(line for one in corrections for line in one.lines)], book)
    credits_, due = pay(total, tenant, period, book, left_after(by_id.values()))
    since, until = bounds(period)
    return Statement(
        id=_id(wanted),
        tenant=tenant,
        since=since,
        until=until,
        zone=period.zone,
        currency=book.currency,
        decimals=book.statement_decimals,
        price_book=book.id,
        price_book_hash=book.content_hash,
        requests=sum(use.counts.requests for use in facts.uses),
        requests_late=sum(_late_requests(connection, by_id[one.statement], one.numbers) for one in late),
        unrated=_added(charges.unrated, *(one.unrated for one in corrections)),
        usage=usage_by_tier(facts),
        agreement={tier: (told.agreed, told.compared) for tier, told in sorted(wanted.agreement.items())},
        lines=lines,
        rounding=rounding,
        total=total,
        credits=credits_,
        due=due,
    )


def _charges(connection: Connection, wanted: Wanted) -> tuple[Facts, Charges]:
    windows = windows_of(wanted.book, wanted.tenant, wanted.period)
    numbers = Numbers(wanted.seq_until)
    facts = facts_of(connection, wanted.tenant, windows, numbers, wanted.agreement)
    return facts, charges_of(wanted.book, wanted.period, windows, facts)


def _correction(connection: Connection, statement: Statement, numbers: Numbers) -> Charges:
    """What an earlier period comes to with its late usage, less what it came to without; by that statement's book."""
    wanted = wanted_again(connection, statement, numbers.until)
    _, after = _charges(connection, wanted)
    _, before = _charges(connection, replace(wanted, seq_until=numbers.after))
    unrated = {reason: number - before.unrated.get(reason, 0) for reason, number in after.unrated.items()}
    lines = (replace(line, corrects=statement.id) for line in _difference(after.lines, before.lines))
    return Charges(tuple(lines), {reason: number for reason, number in unrated.items() if number})


def wanted_again(connection: Connection, statement: Statement, seq_until: int) -> Wanted:
    """What it takes to make an issued statement's charges again.

    Raises:
        StoreDamagedError: Its price book is gone from the ledger.
    """
    book = read_book(connection, statement.price_book_hash)
    if book is None:
        raise StoreDamagedError(
            f"price book {statement.price_book_hash[:12]} of statement {statement.id!r} is not in the ledger.",
            hint="Run `polar verify`.",
        )
    agreement = {tier: Agreement(*told) for tier, told in statement.agreement.items()}
    return Wanted(statement.tenant, statement.period, book, seq_until, agreement)


def _difference(after: Sequence[ExactLine], before: Sequence[ExactLine]) -> Iterator[ExactLine]:
    """Lines that take one rating of a period to another; lines that are alike in both are in neither."""
    old = {line.key: line for line in before}
    for line in after:
        former = old.pop(line.key, None)
        if former is None:
            yield line
        elif (line.exact, line.quantity) != (former.exact, former.quantity):
            yield replace(line, exact=line.exact - former.exact, quantity=_minus(line.quantity, former.quantity))
    for line in old.values():
        yield replace(line, exact=-line.exact, quantity=_minus(None, line.quantity))


def _minus(one: Decimal | None, other: Decimal | None) -> Decimal | None:
    """A difference of quantities, exact whatever the decimal context of the thread."""
    if one is None and other is None:
        return None
    return from_scaled(to_scaled(one or 0, EXACT_SCALE) - to_scaled(other or 0, EXACT_SCALE), EXACT_SCALE)


def _late_requests(connection: Connection, statement: Statement, numbers: Numbers) -> int:
    return count_requests(connection, statement.tenant, statement.since, statement.until, numbers)


def _added(*counted: Mapping[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for some in counted:
        total.update(some)
    return dict(sorted(total.items()))


def _id(wanted: Wanted) -> str:
    return statement_id(wanted.tenant, wanted.period, wanted.book.currency)
