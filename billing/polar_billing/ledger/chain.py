"""The hash chain of a tenant: its rows, their digests, and how a link is appended.

For every chained row there is one link: number n of its tenant, the digest of the row (with the rows of other
tables that belong to it), the hash of link n−1, and its own hash over all of that. So no stored value can change,
vanish, appear or trade places unnoticed; `polar_billing.proof.chain_check` checks it.

A digest is the SHA-256 over lines of JSON: `[1,subject]`, then two lines for the row and for each row of another table
that belongs to it, `[table,[column, …]]` and `[value, …]`, in the order of the columns up to the last value that is not
null. So a column added later, at the end and null in older rows, changes no digest. An integer is a number, text is a
string, null is null, and a value of any other type is an object that names the type: bytes are `{"bytes":"beef"}`, a
float is `{"float":"0x1.8p+0"}`. Rows that differ in nothing but a column's name, a value or its type never have the
same form. A link is the SHA-256 over the hash before it, the digest of its row (32 bytes each) and
`[1,tenant,number,subject,key]`. Both begin with the version of these rules.

A row is linked in the last step of the write transaction that inserted it and its parts:
`link(connection, table, key)`, for a table of `schema.CHAINED`. A transaction that also locks rows of its own takes
`lock_heads` first, so that two of them cannot wait for each other. Knows no money and no usage.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import literal_column, select

from polar_billing.ledger.connection import KeyedQuery, insert_rows, upsert_rows
from polar_billing.ledger.schema import CHAINED, head_table, link_table, metadata, subject_of
from polar_billing.values.canonical import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import ColumnElement, Connection, Table

    from polar_billing.ledger.schema import Chained

    Rows = Iterable[tuple[str, Sequence[Any]]]
    """A row and then its parts: name of the table, values in the order of its columns."""


FIRST_PREVIOUS: Final = bytes(32)
"""The previous hash of a chain's first link."""

_VERSION: Final = 1
"""Version of the rules of hashing: the first number in all that is hashed."""
_PLAIN: Final = frozenset({int, str, type(None)})
"""Types that JSON tells apart by itself; integers of 64 bits."""
_HEADS: Final = KeyedQuery(select(head_table).order_by(head_table.c.tenant).with_for_update(), head_table.c.tenant)
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


def digest_of(subject: str, rows: Rows) -> bytes:
    """The digest of a row and then its parts, whatever types the database returned."""
    rows = list(rows)
    if all(_PLAIN.issuperset(map(type, values)) for _, values in rows):
        with suppress(TypeError):  # an integer beyond JSON's range, which only an altered table returns
            return digest_of_plain(subject, rows)
    return digest_of_plain(subject, [(table, tuple(map(_typed_cell, values))) for table, values in rows])


def digest_of_plain(subject: str, rows: Rows) -> bytes:
    """The same for rows of 64-bit integers, text and None alone: those of usage that are about to be written."""
    lines = [_kind(subject)]
    for table, values in rows:
        end = len(values)
        while end and values[end - 1] is None:
            end -= 1
        lines.append(_names(table, end))
        lines.append(canonical_json(values if end == len(values) else values[:end]))
    return hashlib.sha256(b"\n".join(lines)).digest()


def hash_of(tenant: str, number: int, subject: str, key: str, digest: bytes, previous: bytes) -> bytes:
    """The hash of a link, over everything it says and the hash before it."""
    return hashlib.sha256(previous + digest + canonical_json((_VERSION, tenant, number, subject, key))).digest()


# A digest is made for every request that is stored, so what repeats is written once.
@lru_cache(maxsize=64)
def _kind(subject: str) -> bytes:
    return canonical_json((_VERSION, subject))


@lru_cache(maxsize=1024)
def _names(table: str, end: int) -> bytes:
    return canonical_json((table, list(map(str, metadata.tables[table].c.keys()))[:end]))


def _typed_cell(value: Any) -> Any:
    """A value whose JSON names its type, unless JSON has that type."""
    if type(value) in _PLAIN and not (isinstance(value, int) and not -(2**63) <= value < 2**64):
        return value
    if isinstance(value, (bytes, memoryview)):
        return {"bytes": value.hex()}
    if isinstance(value, float):  # JSON has no infinity, and no float that is not also another number's text
        return {"float": value.hex()}
    return {type(value).__name__: repr(value)}  # no column declares such a type; an altered table may return it


def link(connection: Connection, table: Table, key: int | str, heads: dict[str, Head] | None = None) -> None:
    """Append a row, stored in this transaction, with its parts to the chain of its tenant."""
    link_many(connection, table, [key], heads)


def link_many(
    connection: Connection, table: Table, keys: Sequence[int | str], heads: dict[str, Head] | None = None
) -> None:
    """The same for several rows of a table, in the order given."""
    subject = subject_of(table)
    chained = CHAINED[subject]
    stored = raw_rows(connection, chained, keys)
    links = []
    for key in map(str, keys):
        rows = stored[key]
        links.append(NewLink(chained.tenant_of(rows[0][1]), subject, key, digest_of(subject, rows)))
    append_links(connection, links, heads)


def append_links(connection: Connection, new: Sequence[NewLink], heads: dict[str, Head] | None = None) -> None:
    """Append rows, inserted in this transaction, to the chains of their tenants, in the order given.

    `heads` is the result of `lock_heads` for all their tenants, and is updated here; None to lock them now.
    """
    heads = lock_heads(connection, {link.tenant for link in new}) if heads is None else heads
    ends: dict[str, tuple[int, bytes]] = {link.tenant: heads[link.tenant] for link in new}
    links = []
    for tenant, subject, key, digest in new:
        last, previous = ends[tenant]
        number = last + 1
        own = hash_of(tenant, number, subject, key, digest, previous)
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
