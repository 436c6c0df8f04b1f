"""Verify a ledger from its own database: walk every chain, and recompute what can be recomputed.

What it finds: any cell of another type than its column declares; any stored value changed, any row deleted, inserted or
swapped with another, in every chained table and in the chain itself; entries that do not sum to zero; rollups that are
not the sums of their usage. It names the first bad number of each tenant's chain. A row with a cell of another type is
named and not read, so that the rest can be verified (`polar_billing.proof.cells`).

What it cannot find by itself: a ledger that was rewritten as a whole, all hashes and heads recomputed, or rolled
back as a whole to an earlier state, such as an old backup. For that, keep heads or receipts elsewhere and compare:
`check_head` and `polar_billing.proof.receipts` do.

Whatever else follows from the ledger is recomputed as well: every issued statement, and what budgets count as spent.
Knows no prices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, String, and_, cast, exists, func, select
from sqlalchemy.exc import DataError

from polar_billing.budgets.audit import wrong_counters, wrong_holds
from polar_billing.budgets.settlement import with_budgets
from polar_billing.errors import StoreDamagedError
from polar_billing.ledger.chain import FIRST_PREVIOUS, Head, Link, digest_of, hash_of, raw_rows
from polar_billing.ledger.retention import pruned_totals
from polar_billing.ledger.rollups import merge, misfiled_rollups, raw_usage, stored_rollups, sum_up
from polar_billing.ledger.schema import (
    CHAINED,
    entry_table,
    head_table,
    link_table,
    price_book_table,
    pruned_table,
    receipt_table,
    rollup_table,
    statement_table,
    usage_table,
)
from polar_billing.proof.cells import well_typed
from polar_billing.statements.audit import recheck_in
from polar_billing.statements.store import read_statements
from polar_sdk.errors import PolarError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Select

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.schema import Chained


_LINKS_BATCH: Final = 500
_MILLION: Final = 10**6
"""Sums of a column are taken of its millions and of the rest, of which neither leaves 64 bits."""
MALFORMED: Final = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, PolarError, DataError)
"""What is raised by stored values of the declared type that were changed into something they cannot mean."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written."""

    tenant: str
    """Empty for what belongs to no tenant."""
    number: int | None
    """In the tenant's chain; None for what has no place in it."""
    what: str

    def __str__(self) -> str:
        where = f"tenant {self.tenant!r}" if self.tenant else "price books and other rows of no tenant"
        return f"{where}{'' if self.number is None else f', number {self.number}'}: {self.what}"


@dataclass
class Verification:
    """What a walk over a ledger found."""

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


def verify_in(connection: Connection, tenant: str | None = None) -> Verification:
    """As `verify_ledger`, in a transaction that sees one state of the ledger."""
    verification = Verification()
    with well_typed(connection) as wrong:
        of_all = tenant is None
        cells = (cell for cell in wrong if of_all or cell.tenant in {tenant, ""})
        verification.findings += [Finding(cell.tenant, None, cell.what) for cell in cells]
        heads = {row.tenant: Head(row.number, bytes(row.hash)) for row in connection.execute(select(head_table))}
        tenants = set(heads) | set(connection.execute(select(link_table.c.tenant).distinct()).scalars())
        for name in sorted(tenants) if tenant is None else [tenant]:
            finding = _walk(connection, name, heads.get(name, Head()), verification)
            verification.findings += [] if finding is None else [finding]
            verification.heads[name] = heads.get(name, Head())
        for what, check in _CHECKS.items() if of_all else ():
            verification.findings += _carried_out(connection, what, check)
    return verification


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


def wrong_link_after(connection: Connection, start: Link) -> Finding | None:
    """The first bad link of a chain after one that is good; its rows are not looked at."""
    last = Head(start.number, start.hash)
    for links in _pages(connection, start.tenant, after=start.number):
        for link in links:
            if (what := _wrong_link(link, last)) is not None:
                return Finding(start.tenant, last.number + 1, what)
            last = Head(link.number, link.hash)
    stored = connection.execute(select(head_table).where(head_table.c.tenant == start.tenant)).one_or_none()
    if stored is None or Head(stored.number, bytes(stored.hash)) != last:
        return Finding(start.tenant, last.number, "is the last link, but the head says otherwise.")
    return None


def _walk(connection: Connection, tenant: str, head: Head, verification: Verification) -> Finding | None:
    """Walk one chain up to its first bad number."""
    last = Head()
    for links in _pages(connection, tenant):
        rows = _rows_of(connection, links)
        for link in links:
            what = _wrong_link(link, last) or _wrong_row(connection, link, rows)
            if what is not None:
                return Finding(tenant, min(link.number, last.number + 1), what)
            last = Head(link.number, link.hash)
            verification.links += 1
    if last.number < head.number:
        return Finding(tenant, last.number + 1, f"is missing; the head says the chain ends with number {head.number}.")
    if last != head:
        return Finding(
            tenant, last.number, f"is the last link, but the head says number {head.number} or another hash."
        )
    return None


def _pages(connection: Connection, tenant: str, after: int | None = None) -> Iterator[list[Link]]:
    query = select(link_table).where(link_table.c.tenant == tenant).order_by(link_table.c.number).limit(_LINKS_BATCH)
    last = after
    while True:
        page = query if last is None else query.where(link_table.c.number > last)
        links = [Link(*row[:4], *map(bytes, row[4:])) for row in connection.execute(page)]
        if not links:
            return
        yield links
        last = links[-1].number


def _wrong_link(link: Link, last: Head) -> str | None:
    if link.number != last.number + 1:
        return f"is missing or out of order; number {link.number} follows number {last.number}."
    if link.previous != (last.hash if last.number else FIRST_PREVIOUS):
        return "does not follow from the link before it."
    if hash_of(link.tenant, link.number, link.subject, link.key, link.digest, link.previous) != link.hash:
        return "was changed; its hash is not that of its content."
    return None


Rows = dict[tuple[str, str], list[tuple[str, tuple[Any, ...]]]]


def _rows_of(connection: Connection, links: Sequence[Link]) -> Rows:
    """The rows that links stand for, by subject and key."""
    rows_by_link: Rows = {}
    for subject, chained in CHAINED.items():
        keys = [key for link in links if link.subject == subject and (key := chained.key_of(link.key)) is not None]
        for key, rows in raw_rows(connection, chained, keys).items():
            rows_by_link[subject, key] = rows
    return rows_by_link


def _wrong_row(connection: Connection, link: Link, rows: Rows) -> str | None:
    if link.subject not in CHAINED:
        return f"is of a kind that this polar-llm does not know, {link.subject!r}."
    stored = rows.get((link.subject, link.key))
    name = f"row {link.key} of polar_{link.subject}"
    if stored is None:
        return None if _was_pruned(connection, link) else f"{name} is missing."
    if digest_of(link.subject, stored) != link.digest:
        return f"{name}, or a row that belongs to it, was changed, added or removed."
    if CHAINED[link.subject].tenant_of(stored[0][1]) != link.tenant:
        return f"{name} is of another tenant."
    return None


def _was_pruned(connection: Connection, link: Link) -> bool:
    if link.subject != "usage" or (key := CHAINED["usage"].key_of(link.key)) is None:
        return False
    pruned = pruned_table.c
    query = select(pruned.seq).where(pruned.seq == key, pruned.tenant == link.tenant)
    return connection.execute(query).first() is not None


def _unlinked(connection: Connection) -> Iterator[Finding]:
    """Rows of chained tables that no link stands for, and parts that belong to no row."""
    for subject, chained in CHAINED.items():
        key = chained.table.c[chained.key]
        linked = exists().where(link_table.c.subject == subject, link_table.c.key == cast(key, String))
        for row in connection.execute(_plain_keys(chained, key).where(~linked).order_by(key).limit(1)):
            number = _place(connection, row.tenant, subject, row.key)
            yield Finding(
                row.tenant, number, f"row {row.key} of {chained.table.name} was added; no link stands for it."
            )
        for part, column in chained.parts.items():
            orphan = select(part.c[column]).where(~exists().where(key == part.c[column])).limit(1)
            for named in connection.execute(orphan).scalars():
                yield Finding(
                    "", None, f"a row of {part.name} belongs to row {named} of {chained.table.name}, which is missing."
                )


def _plain_keys(chained: Chained, key: Any) -> Select[Any]:
    tenant = chained.table.c.tenant if "tenant" in chained.table.c else cast("", String)
    return select(key.label("key"), tenant.label("tenant"))


def _place(connection: Connection, tenant: str, subject: str, key: object) -> int | None:
    """Where a row without a number belongs: before the number of the next row of its table."""
    if not isinstance(key, int):
        return None
    link, chained = link_table.c, CHAINED[subject]
    query = select(link.number, link.key).where(link.tenant == tenant, link.subject == subject).order_by(link.number)
    with connection.execute(query, execution_options={"yield_per": _LINKS_BATCH}) as links:
        for number, text in links:
            other = chained.key_of(text)  # not left to the database, which fails if a key is not a number any more
            if isinstance(other, int) and other > key:
                return int(number)
    return int(connection.execute(select(func.max(link.number)).where(link.tenant == tenant)).scalar() or 0) + 1


def _without_book(connection: Connection) -> Iterator[Finding]:
    """Receipts by a price book that the ledger does not hold."""
    receipt = receipt_table.c
    held = exists().where(price_book_table.c.hash == receipt.price_book_hash)
    for digest in connection.execute(select(receipt.price_book_hash).where(~held).limit(1)).scalars():
        yield Finding("", None, f"receipts name price book {digest}, which is missing.")


def _unbalanced(connection: Connection) -> Iterator[Finding]:
    """Transactions whose entries do not sum to zero."""
    entry = entry_table.c
    parts = (entry.whole // _MILLION, entry.whole % _MILLION, entry.rest // _MILLION, entry.rest % _MILLION)
    query = select(entry.transaction_id, func.min(entry.tenant).label("tenant"), entry.currency, *map(func.sum, parts))
    for transaction, tenant, currency, *sums in connection.execute(
        query.group_by(entry.transaction_id, entry.currency)
    ):
        whole_millions, whole, rest_millions, rest = map(int, sums)
        if (whole_millions * _MILLION + whole) * 10**12 + rest_millions * _MILLION + rest:
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
            usage = sum_up(raw_usage(connection, usage_table.c.tenant == tenant))
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


Check = Callable[[Connection], Iterator[Finding]]

_CHECKS: Final[Mapping[str, Check]] = {
    "links of rows": _unlinked,
    "price books of receipts": _without_book,
    "sums of transactions": _unbalanced,
    "sums by hour": _wrong_rollups,
    "issued statements": _wrong_statements,
    "holds and counters of budgets": _wrong_budgets,
}
