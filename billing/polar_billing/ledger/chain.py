"""The hash chain of a tenant: what it covers, how a row becomes a link, and how a link is appended.

For every chained row there is one link: number n of its tenant, the digest of the row (with the rows of other
tables that belong to it), the hash of link n−1, and its own hash over all of that. So no stored value can change,
vanish, appear or trade places unnoticed; `polar_billing.ledger.walk` walks it.

A chain that an older schema began goes on from an *anchor*: a row that says how many links were proved when the ledger
was migrated, and the hash of the last of them. Links before the anchor's are of version 1, the anchor's and all after
it of version 2; a chain without an anchor is of version 2 from its first link. So no link can choose its version.

A row is linked as the last step of the write transaction that inserted it and its parts: `link(connection, table,
key)`, for a table of `schema.CHAINED`. A transaction that also locks rows of its own takes `lock_heads` first, so that
two of them cannot wait for each other. Knows no money and no usage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import func, literal_column, select

from polar_billing.ledger.connection import Among, insert_rows, upsert_rows
from polar_billing.ledger.digests import CURRENT, ChainVersion, digest_of
from polar_billing.ledger.schema import CHAINED, anchor_table, head_table, link_table, subject_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import ColumnElement, Connection, Table

    from polar_billing.ledger.schema import Chained


FIRST_PREVIOUS: Final = bytes(32)
"""What the first link of a chain names as the previous hash."""

ANCHOR: Final = subject_of(anchor_table)
"""What links call an anchor."""

_HEADS: Final = Among(select(head_table).order_by(head_table.c.tenant).with_for_update(), head_table.c.tenant)
_MOVE_HEAD: Final = ("number = excluded.number", "hash = excluded.hash")
_KEYS_BATCH: Final = 500
"""SQLite takes at least 999 parameters in one statement."""


class NewLink(NamedTuple):
    """A row that is about to become a link."""

    tenant: str
    subject: str
    key: str
    digest: bytes


class Link(NamedTuple):
    """A row's place in the chain of its tenant."""

    tenant: str
    number: int
    subject: str
    key: str
    digest: bytes
    previous: bytes
    hash: bytes


class Head(NamedTuple):
    """The end of a tenant's chain; number 0 for a chain without links."""

    number: int = 0
    hash: bytes = FIRST_PREVIOUS


def link(connection: Connection, table: Table, key: int | str, heads: dict[str, Head] | None = None) -> None:
    """Append a stored row, with its parts, to the chain of its tenant.

    Args:
        connection: A write transaction in which the row was inserted.
        table: One of `schema.CHAINED`.
        key: Its primary key.
        heads: As for `append_links`.
    """
    subject = subject_of(table)
    chained = CHAINED[subject]
    rows = raw_rows(connection, chained, [key])[str(key)]
    tenant = chained.tenant_of(rows[0][1])
    append_links(connection, [NewLink(tenant, subject, str(key), digest_of(subject, rows))], heads)


def append_links(
    connection: Connection,
    new: Sequence[NewLink],
    heads: dict[str, Head] | None = None,
    version: ChainVersion = CURRENT,
) -> None:
    """Append rows to the chains of their tenants, in the order given.

    Args:
        connection: A write transaction in which the rows were inserted.
        new: What to append.
        heads: What `lock_heads` returned in this transaction for all their tenants; updated here. None to lock
            them now.
        version: How they are hashed; only a migration to an older schema gives another.
    """
    heads = lock_heads(connection, {link.tenant for link in new}) if heads is None else heads
    ends: dict[str, tuple[int, bytes]] = {link.tenant: heads[link.tenant] for link in new}
    links = []
    for tenant, subject, key, digest in new:
        last, previous = ends[tenant]
        number = last + 1
        own = version.hash_of(tenant, number, subject, key, digest, previous)
        ends[tenant] = (number, own)
        links.append((tenant, number, subject, key, digest, previous, own))
    insert_rows(connection, link_table, links)
    upsert_rows(connection, head_table, [(tenant, *ends[tenant]) for tenant in sorted(ends)], _MOVE_HEAD)
    heads.update((tenant, Head(*end)) for tenant, end in ends.items())


def lock_heads(connection: Connection, tenants: Iterable[str]) -> dict[str, Head]:
    """Read the ends of chains, and keep other writers off them until the transaction ends.

    Chains are locked in the order of their tenants' names, so that two writers cannot wait for each other.
    """
    names = sorted(tenants)
    new = [(tenant, *Head()) for tenant in names]
    on_postgres = connection.dialect.name == "postgresql"  # SQLite's write transaction is alone already
    if on_postgres and len(names) > 1:  # all rows are there before any is locked: else it would not be in that order
        upsert_rows(connection, head_table, new, ())
    rows = _HEADS.run(connection, names).all()
    if on_postgres and not rows:
        upsert_rows(connection, head_table, new, ())
        rows = _HEADS.run(connection, names).all()
    return dict.fromkeys(names, Head()) | {row.tenant: Head(row.number, bytes(row.hash)) for row in rows}


def anchored_at(connection: Connection, tenant: str) -> int | None:
    """The number of the anchor's link in a tenant's chain; None where all links are of version 2.

    Where the link is gone, what the anchor says, so that those who tampered do not choose the version of other links.
    """
    links = select(func.min(link_table.c.number)).where(link_table.c.tenant == tenant, link_table.c.subject == ANCHOR)
    number: int | None = connection.execute(links).scalar()
    if number is not None:
        return number
    anchored: int | None = connection.execute(
        select(anchor_table.c.links).where(anchor_table.c.tenant == tenant).limit(1)
    ).scalar()
    return None if anchored is None else anchored + 1


def raw_rows(
    connection: Connection, chained: Chained, keys: Sequence[int | str]
) -> dict[str, list[tuple[str, tuple[Any, ...]]]]:
    """Read rows with their parts as the database holds them: integers and text, not what they stand for.

    Returns:
        Key as text → the row and then its parts, each with the name of its table; missing rows are missing.
    """
    rows_by_key: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
    for key, values in _read(connection, chained.table, chained.key, keys):
        rows_by_key[str(key)] = [(str(chained.table.name), values)]
    for table, column in chained.parts.items():
        for key, values in _read(connection, table, column, keys):
            if (rows := rows_by_key.get(str(key))) is not None:
                rows.append((str(table.name), values))
    return rows_by_key


def _read(
    connection: Connection, table: Table, column: str, keys: Sequence[int | str]
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The value of `column` and the whole row, for every row where that is one of the keys."""
    quote = connection.dialect.identifier_preparer.quote
    names = table.c.keys()
    columns: list[ColumnElement[Any]] = [literal_column(quote(name)) for name in names]
    query = select(*columns).select_from(table)
    order: list[ColumnElement[Any]] = [literal_column(quote(str(key.name))) for key in table.primary_key.columns]
    place = names.index(column)
    for start in range(0, len(keys), _KEYS_BATCH):
        batch = keys[start : start + _KEYS_BATCH]
        for row in connection.execute(query.where(table.c[column].in_(batch)).order_by(*order)):
            yield row[place], tuple(row)
