"""Checks chains, link by link and row by row, up to the first that was changed. Knows no money."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import String, and_, cast, exists, func, select

from polar_billing.ledger.chain import Head, Link, digest_of, hash_of, raw_rows
from polar_billing.ledger.schema import CHAINED, link_table, pruned_table, subject_of, usage_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Connection

    from polar_billing.ledger.schema import Chained

    Rows = dict[tuple[str, str], list[tuple[str, tuple[Any, ...]]]]
    """Subject and key → the row with its parts."""


_LINKS_BATCH: Final = 500
_USAGE: Final = subject_of(usage_table)


@dataclass(frozen=True)
class Finding:
    """Something that was changed after it was written."""

    tenant: str
    """Empty for what belongs to no tenant."""
    number: int | None
    """In the tenant's chain; None for what has no place in it."""
    what: str

    def __str__(self) -> str:
        where = f"tenant {self.tenant!r}" if self.tenant else "price books and other rows of no tenant"
        return f"{where}{'' if self.number is None else f', number {self.number}'}: {self.what}"


class ChainCheck:
    """A check of the chain of one tenant, whose cells are checked already (`proof.column_types`).

    Without `rows`, the row of each link is not looked at. `on_links` hears now and then how many links were walked.
    """

    def __init__(
        self,
        connection: Connection,
        tenant: str,
        on_links: Callable[[int], None] = lambda _: None,
        *,
        rows: bool = True,
    ) -> None:
        self.connection, self.tenant, self._on_links = connection, tenant, on_links
        self._chained: Mapping[str, Chained] = CHAINED if rows else {}
        self.links = 0
        """Links that are as they were written."""

    def first_fault(self, head: Head, after: Head | None = None) -> Finding | None:
        """Walk up to the first bad number, or to the stored head; from the first link, or from a good one."""
        last = after or Head()
        for links in self._pages(after):
            rows: Rows = {}
            for subject, chained in self._chained.items():
                keys = [chained.key_of(link.key) for link in links if link.subject == subject]
                stored = raw_rows(self.connection, chained, [key for key in keys if key is not None])
                rows |= {(subject, key): parts for key, parts in stored.items()}
            for link in links:
                what = _wrong_link(link, last) or self._wrong_row(link, rows)
                if what is not None:
                    return Finding(self.tenant, min(link.number, last.number + 1), what)
                last = Head(link.number, link.hash)
                self.links += 1
            rows.clear()  # before the next are read
            self._on_links(self.links)
        if last.number < head.number:
            what = f"is missing; the head says the chain ends with number {head.number}."
            return Finding(self.tenant, last.number + 1, what)
        if last != head:
            what = f"is the last link, but the head says number {head.number} or another hash."
            return Finding(self.tenant, last.number, what)
        return None

    def _pages(self, after: Head | None) -> Iterator[list[Link]]:
        column = link_table.c
        query = select(link_table).where(column.tenant == self.tenant).order_by(column.number).limit(_LINKS_BATCH)
        last = None if after is None else after.number
        while True:
            page = query if last is None else query.where(column.number > last)
            links = [Link(*row[:4], *map(bytes, row[4:])) for row in self.connection.execute(page)]
            if not links:
                return
            yield links
            last = links[-1].number

    def _wrong_row(self, link: Link, rows: Rows) -> str | None:
        if link.subject not in self._chained:
            what = f"is of a kind that this polar-llm does not know, {link.subject!r}."
            return what if self._chained else None
        stored = rows.get((link.subject, link.key))
        name = f"row {link.key} of polar_{link.subject}"
        if stored is None:
            key = CHAINED[_USAGE].key_of(link.key) if link.subject == _USAGE else None
            pruned = select(pruned_table.c.seq).where(pruned_table.c.seq == key, pruned_table.c.tenant == link.tenant)
            left = None if key is None else self.connection.execute(pruned).first()
            return f"{name} is missing." if left is None else None
        if digest_of(link.subject, stored) != link.digest:
            return f"{name}, or a row that belongs to it, was changed, added or removed."
        if CHAINED[link.subject].tenant_of(stored[0][1]) != link.tenant:
            return f"{name} is of another tenant."
        return None


def _wrong_link(link: Link, last: Head) -> str | None:
    if link.number != last.number + 1:
        return f"is missing or out of order; number {link.number} follows number {last.number}."
    if link.previous != last.hash:
        return "does not follow from the link before it."
    if hash_of(link.tenant, link.number, link.subject, link.key, link.digest, link.previous) != link.hash:
        return "was changed; its hash is not that of its content."
    return None


def unlinked(connection: Connection) -> Iterator[Finding]:
    """Rows of chained tables that no link stands for, and parts that belong to no row."""
    for subject, one in CHAINED.items():
        key = one.table.c[one.key]
        linked = exists().where(link_table.c.subject == subject, link_table.c.key == cast(key, String))
        tenant = one.table.c.tenant if "tenant" in one.table.c else cast("", String)
        query = select(key.label("key"), tenant.label("tenant")).where(~linked).order_by(key).limit(1)
        for row in connection.execute(query):
            number = _place(connection, row.tenant, one, row.key)
            yield Finding(row.tenant, number, f"row {row.key} of {one.table.name} was added; no link stands for it.")
        for part, column in one.parts.items():
            orphan = select(part.c[column]).where(~exists().where(key == part.c[column])).limit(1)
            for named in connection.execute(orphan).scalars():
                what = f"a row of {part.name} belongs to row {named} of {one.table.name}, which is missing."
                yield Finding("", None, what)


def _place(connection: Connection, tenant: str, chained: Chained, key: object) -> int | None:
    """The place of a row without a number: before the number of the next row of its table."""
    if not isinstance(key, int):
        return None
    link = link_table.c
    of_table = and_(link.tenant == tenant, link.subject == chained.subject)
    query = select(link.number, link.key).where(of_table).order_by(link.number)
    with connection.execute(query, execution_options={"yield_per": _LINKS_BATCH}) as links:
        for number, text in links:
            other = chained.key_of(text)  # not left to the database, which fails if a key is not a number any more
            if isinstance(other, int) and other > key:
                return int(number)
    return int(connection.execute(select(func.max(link.number)).where(link.tenant == tenant)).scalar() or 0) + 1
