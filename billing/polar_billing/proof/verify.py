"""Verify a ledger from its own database: follow every chain, and recompute everything that can be recomputed.

What it finds: any cell of another type than its column declares; any stored value changed, any row deleted, inserted or
swapped with another, in every chained table and in the chain itself; entries that do not sum to zero; rollups that are
not the sums of their usage. It names the first bad number of each tenant's chain. A row with a cell of another type is
named and not read, so that the rest can be verified (`column_types`).

What it cannot find by itself: a ledger that was rewritten as a whole, all hashes and heads recomputed, or rolled
back as a whole to an earlier state, such as an old backup. For that, keep heads or receipts elsewhere and compare:
`check_head` and `polar_billing.proof.receipts` do.

Everything else that follows from the ledger is recomputed as well: every issued statement, the spending of budgets, and
the state of promises from their audits. Knows no prices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, and_, exists, func, select
from sqlalchemy.exc import DataError

from polar_billing.budgets.discrepancies import wrong_counters, wrong_holds
from polar_billing.budgets.settlement import with_budgets
from polar_billing.errors import StoreDamagedError
from polar_billing.ledger.audits import wrong_standings
from polar_billing.ledger.chain import Head
from polar_billing.ledger.retention import pruned_totals
from polar_billing.ledger.rollups import (
    joined_sum,
    merge,
    misfiled_rollups,
    split_sum,
    stored_rollups,
    sum_up,
    usage_shares,
)
from polar_billing.ledger.schema import (
    entry_table,
    head_table,
    link_table,
    price_book_table,
    receipt_table,
    rollup_table,
    statement_table,
    usage_table,
)
from polar_billing.proof.chain_check import ChainCheck, Finding, unlinked
from polar_billing.proof.column_types import well_typed
from polar_billing.statements.issued import read_statements
from polar_billing.statements.tracing import recheck_in
from polar_sdk.errors import PolarError
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger

_ROWS_BATCH: Final = 1_000
_LINKS: Final = "links of chains"
_SUMS: Final = "what follows from them"
MALFORMED: Final = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, PolarError, DataError)
"""Errors raised by stored values of the declared type that were changed into something they cannot mean."""


@dataclass
class Verification:
    """The result of verifying a ledger."""

    links: int = 0
    """Links walked."""
    heads: dict[str, Head] = field(default_factory=dict)
    """The end of each chain, as stored; worth keeping elsewhere."""
    findings: list[Finding] = field(default_factory=list)
    """The first of each chain, and all that was found outside the chains."""

    @property
    def sound(self) -> bool:
        """True if nothing was found."""
        return not self.findings


def verify_ledger(ledger: Ledger, tenant: str | None = None) -> Verification:
    """Walk the chains of one state of a ledger, and recompute what follows from it; see the top of this module.

    Args:
        ledger: What to verify.
        tenant: Only this tenant's chain; None for the whole ledger, unlinked rows, sums and statements included.

    Raises:
        StoreError: The ledger cannot be read.
    """
    with ledger.snapshot() as connection:
        return verify_in(connection, tenant)


def verify_in(connection: Connection, tenant: str | None = None, on_progress: Progress = silent) -> Verification:
    """As `verify_ledger`, in a transaction that sees one state of the ledger; says how far it is, link by link."""
    verification = Verification()
    with well_typed(connection) as wrong:
        of_all = tenant is None
        cells = (cell for cell in wrong if of_all or cell.tenant in {tenant, ""})
        verification.findings += [Finding(cell.tenant, None, cell.what) for cell in cells]
        heads = {row.tenant: Head(row.number, bytes(row.hash)) for row in connection.execute(select(head_table))}
        tenants = set(heads) | set(connection.execute(select(link_table.c.tenant).distinct()).scalars())
        names = sorted(tenants) if tenant is None else [tenant]
        total = sum(heads[name].number for name in names if name in heads)
        for name in names:
            before = verification.links
            chain = ChainCheck(connection, name, partial(_walked, on_progress, before, total))
            fault = chain.first_fault(heads.get(name, Head()))
            verification.findings += [] if fault is None else [fault]
            verification.links += chain.links
            verification.heads[name] = heads.get(name, Head())
        for place, (what, check) in enumerate(_CHECKS.items() if of_all else ()):
            on_progress(_SUMS, place, len(_CHECKS))
            verification.findings += _carried_out(connection, what, check)
    return verification


def _walked(on_progress: Progress, before: int, total: int, links: int) -> None:
    on_progress(_LINKS, before + links, total)


def _carried_out(connection: Connection, what: str, check: Check) -> list[Finding]:
    """The findings of a check; one that stops at what cannot be read is a finding too, and the others go on."""
    findings: list[Finding] = []
    attempt = connection.begin_nested()  # on PostgreSQL a query that fails ends its transaction
    try:
        findings.extend(check(connection))
    except MALFORMED as error:
        findings.append(Finding("", None, f"{what} cannot be verified ({_in_words(error)})."))
    finally:
        attempt.rollback()
    return findings


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def check_head(connection: Connection, tenant: str, kept: Head) -> Finding | None:
    """Compare a head that was kept elsewhere with the chain: finds a ledger rewritten or rolled back since."""
    where = and_(link_table.c.tenant == tenant, link_table.c.number == kept.number)
    stored = connection.execute(select(link_table.c.hash).where(where)).scalar()
    if stored is None:
        return Finding(tenant, kept.number, "is missing, though a head kept elsewhere knows it.")
    if bytes(stored) != kept.hash:
        return Finding(tenant, kept.number, "has a different hash from the head kept elsewhere.")
    return None


def _without_book(connection: Connection) -> Iterator[Finding]:
    """Receipts by a price book that the ledger does not hold."""
    receipt = receipt_table.c
    held = exists().where(price_book_table.c.hash == receipt.price_book_hash)
    for digest in connection.execute(select(receipt.price_book_hash).where(~held).limit(1)).scalars():
        yield Finding("", None, f"receipts name price book {digest}, which is missing.")


def _unbalanced(connection: Connection) -> Iterator[Finding]:
    """Transactions whose entries do not sum to zero."""
    entry = entry_table.c
    parts = (*split_sum(entry.whole), *split_sum(entry.rest))
    query = select(entry.transaction_id, func.min(entry.tenant).label("tenant"), entry.currency, *parts)
    query = query.group_by(entry.transaction_id, entry.currency)
    with connection.execute(query, execution_options={"yield_per": _ROWS_BATCH}) as rows:
        for transaction, tenant, currency, *sums in rows:
            if joined_sum(*sums[:2]) * 10**12 + joined_sum(*sums[2:]):
                yield Finding(tenant, None, f"transaction {transaction} does not sum to zero in {currency}.")


def _wrong_rollups(connection: Connection) -> Iterator[Finding]:
    """Sums by hour that are not those of the usage they stand for, or stored under another id."""
    tenants = set(connection.execute(select(usage_table.c.tenant).distinct()).scalars())
    tenants |= set(connection.execute(select(rollup_table.c.tenant).distinct()).scalars())
    for tenant in sorted(tenants):
        for key in islice(misfiled_rollups(connection, tenant), 1):
            yield Finding(
                tenant, None, f"the rollup of hour {key[1]} since 1970 is stored under another id than its own."
            )
        stored = stored_rollups(connection, rollup_table.c.tenant == tenant)
        try:
            usage = sum_up(usage_shares(connection, usage_table.c.tenant == tenant))
            computed = merge(usage, *pruned_totals(connection, tenant))
            wrong = sorted(key for key in stored.keys() | computed.keys() if stored.get(key) != computed.get(key))
        except MALFORMED as error:
            yield Finding(tenant, None, f"its usage cannot be added up ({_in_words(error)}).")
            continue
        if wrong:
            yield Finding(tenant, None, f"the rollup of hour {wrong[0][1]} since 1970 is not the sum of its usage.")


def _wrong_statements(connection: Connection) -> Iterator[Finding]:
    """One finding per difference between an issued statement and what follows from the ledger."""
    tenants = connection.execute(select(statement_table.c.tenant).distinct().order_by(statement_table.c.tenant))
    for tenant in tenants.scalars().all():
        try:
            for issued in read_statements(connection, tenant):
                for difference in recheck_in(connection, issued):
                    yield Finding(tenant, None, difference)
        except StoreDamagedError as error:
            yield Finding(tenant, None, str(error))
        except MALFORMED as error:
            yield Finding(tenant, None, f"its statements cannot be rebuilt ({_in_words(error)}).")


def _wrong_budgets(connection: Connection) -> Iterator[Finding]:
    """Settled holds, and counters of budgets, that differ from the usage that they stand for."""
    for hold in wrong_holds(connection, None):
        yield Finding(hold.tenant, None, str(hold))
    for tenant in sorted(with_budgets(connection)):
        for difference in wrong_counters(connection, tenant):
            yield Finding(tenant, None, str(difference))


def _wrong_standings(connection: Connection) -> Iterator[Finding]:
    """Promises whose standings do not follow from their audits."""
    for difference in wrong_standings(connection):
        yield Finding("", None, difference)


Check = Callable[[Connection], Iterator[Finding]]

_CHECKS: Final[Mapping[str, Check]] = {
    "links of rows": unlinked,
    "price books of receipts": _without_book,
    "sums of transactions": _unbalanced,
    "sums by hour": _wrong_rollups,
    "issued statements": _wrong_statements,
    "holds and counters of budgets": _wrong_budgets,
    "standings of promises": _wrong_standings,
}
