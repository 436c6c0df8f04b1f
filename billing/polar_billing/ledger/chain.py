"""The hash chain of a tenant: what it covers, how a row becomes a link, and how a link is appended.

For every chained row there is one link: number n of its tenant, the digest of the row (with the rows of other
tables that belong to it), the hash of link n−1, and its own hash over all of that. So no stored value can change,
vanish, appear or trade places without the chain telling; `polar_billing.proof.verify` walks it.

For those who add a chained table, all inside their own open write transaction:

    register_chained(hold_table, parts={hold_level_table: "hold_id"})     # once, at import
    …insert the row and its parts…
    link(connection, hold_table, hold_id)                                 # as the last step

A chained table has one primary-key column, and a column `tenant` unless its rows belong to no tenant; it holds
integers, text and bytes only, and is append-only. Its parts are rows that never change once their row is linked.
A transaction that also locks rows of its own takes `lock_heads` first, so that two of them cannot wait for each
other. Knows no money and no usage.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from sqlalchemy import Integer, literal_column, select

from polar_billing.ledger.lookup import Among, insert_rows, upsert_rows
from polar_billing.ledger.schema.chain import head_table, link_table
from polar_billing.values.canonical import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Table


NO_TENANT: Final = ""
"""The chain of rows that belong to no tenant, such as price books; no tenant has an empty name."""

FIRST_PREVIOUS: Final = bytes(32)
"""What the first link of a chain names as the hash before it."""

Key = TypeVar("Key")

_PREFIX: Final = "polar_"
_HEADS: Final = Among(select(head_table).order_by(head_table.c.tenant).with_for_update(), head_table.c.tenant)
_MOVE: Final = ("number = excluded.number", "hash = excluded.hash")
_KEYS_AT_ONCE: Final = 500
"""SQLite takes at least 999 parameters in one statement."""


@dataclass(frozen=True)
class Chained:
    """A table whose rows are links of the chain."""

    table: Table
    parts: Mapping[Table, str] = field(default_factory=dict)
    """Tables whose rows belong to a row of `table` → their column that names it."""

    @property
    def key(self) -> str:
        """Name of the primary-key column."""
        (column,) = self.table.primary_key.columns
        return str(column.name)

    def key_of(self, text: str) -> int | str | None:
        """The primary key that a link's text stands for; None where it cannot be one."""
        if not isinstance(self.table.c[self.key].type, Integer):
            return text
        try:
            return int(text)
        except ValueError:
            return None

    def tenant_of(self, row: Sequence[Any]) -> str:
        """Whose chain a row of the table belongs into."""
        columns = self.table.c.keys()
        return str(row[columns.index("tenant")]) if "tenant" in columns else NO_TENANT


CHAINED: Final[dict[str, Chained]] = {}
"""Every chained table by its subject. Filled at import; `polar_billing.ledger.chained` imports all who register."""


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


def register_chained(table: Table, *, parts: Mapping[Table, str] | None = None) -> None:
    """Say that the rows of a table belong into the chain.

    Args:
        table: The table; see the rules at the top of this module.
        parts: Tables whose rows belong to a row of it → their column that holds its key.
    """
    CHAINED[subject_of(table)] = Chained(table, parts or {})


def subject_of(table: Table) -> str:
    """What links call a table: its name without the prefix."""
    return str(table.name).removeprefix(_PREFIX)


def link(connection: Connection, table: Table, key: int | str, heads: dict[str, Head] | None = None) -> None:
    """Append a stored row, with its parts, to the chain of its tenant.

    Args:
        connection: A write transaction in which the row was inserted.
        table: A registered table.
        key: Its primary key.
        heads: As for `append_links`.
    """
    subject = subject_of(table)
    chained = CHAINED[subject]
    found = raw_rows(connection, chained, [key])[str(key)]
    tenant = chained.tenant_of(found[0][1])
    append_links(connection, [NewLink(tenant, subject, str(key), digest_of(subject, found))], heads)


def append_links(connection: Connection, new: Sequence[NewLink], heads: dict[str, Head] | None = None) -> None:
    """Append rows to the chains of their tenants, in the order given.

    Args:
        connection: A write transaction in which the rows were inserted.
        new: What to append.
        heads: What `lock_heads` answered in this transaction for all their tenants, moved along by this; None to
            lock them now.
    """
    heads = lock_heads(connection, {one.tenant for one in new}) if heads is None else heads
    ends: dict[str, tuple[int, bytes]] = {one.tenant: heads[one.tenant] for one in new}
    links = []
    for tenant, subject, key, digest in new:
        last, previous = ends[tenant]
        number = last + 1
        own = hash_of(tenant, number, subject, key, digest, previous)
        ends[tenant] = (number, own)
        links.append((tenant, number, subject, key, digest, previous, own))
    insert_rows(connection, link_table, links)
    upsert_rows(connection, head_table, [(tenant, *ends[tenant]) for tenant in sorted(ends)], _MOVE)
    heads.update((tenant, Head(*end)) for tenant, end in ends.items())


def lock_heads(connection: Connection, tenants: Iterable[str]) -> dict[str, Head]:
    """Read the ends of chains, and keep other writers off them until the transaction ends.

    Chains are locked in the order of their tenants' names, so that two writers cannot wait for each other.
    """
    wanted = sorted(tenants)
    if connection.dialect.name == "postgresql":  # SQLite's write transaction is alone already, and locks no rows
        upsert_rows(connection, head_table, [(tenant, *Head()) for tenant in wanted], ())
    heads = dict.fromkeys(wanted, Head())
    for row in _HEADS.run(connection, wanted):
        heads[row.tenant] = Head(row.number, bytes(row.hash))
    return heads


def hash_of(tenant: str, number: int, subject: str, key: str, digest: bytes, previous: bytes) -> bytes:
    """The hash of a link: SHA-256 over everything it says and the hash before it."""
    return hashlib.sha256(previous + digest + canonical_json([tenant, number, subject, key])).digest()


def digest_of(subject: str, rows: Iterable[tuple[str, Sequence[Any]]]) -> bytes:
    """SHA-256 over a row and its parts, as the database holds them.

    Args:
        subject: What links call the table.
        rows: The row, then its parts: name of the table, values in the order of its columns. Nulls at the end do not
            count, so that a column added later, at the end, does not change what was hashed before.
    """
    lines = [subject.encode()]
    for table, values in rows:
        end = len(values)
        while end and values[end - 1] is None:
            end -= 1
        lines.append(canonical_json((table, *values[:end])))
    return hashlib.sha256(b"\n".join(lines)).digest()


def raw_rows(
    connection: Connection, chained: Chained, keys: Sequence[int | str]
) -> dict[str, list[tuple[str, tuple[Any, ...]]]]:
    """Read rows with their parts as the database holds them: integers and text, not what they stand for.

    Returns:
        Key as text → the row and then its parts, each with the name of its table; missing rows are missing.
    """
    found: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
    for key, values in _read(connection, chained.table, chained.key, keys):
        found[str(key)] = [(str(chained.table.name), values)]
    for table, column in chained.parts.items():
        for key, values in _read(connection, table, column, keys):
            if (rows := found.get(str(key))) is not None:
                rows.append((str(table.name), values))
    return found


def _read(
    connection: Connection, table: Table, column: str, keys: Sequence[int | str]
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The value of `column` and the whole row, for every row where that is one of the keys."""
    quote = connection.dialect.identifier_preparer.quote
    names = [str(one.name) for one in table.c]
    columns: list[ColumnElement[Any]] = [literal_column(quote(name)) for name in names]
    query = select(*columns).select_from(table)
    order: list[ColumnElement[Any]] = [literal_column(quote(str(one.name))) for one in table.primary_key.columns]
    place = names.index(column)
    for some in _some(list(keys)):
        for row in connection.execute(query.where(table.c[column].in_(some)).order_by(*order)):
            yield row[place], tuple(map(_plain, row))


def _plain(value: object) -> object:
    return bytes(value).hex() if isinstance(value, (bytes, memoryview)) else value


def _some(keys: list[Key]) -> Iterator[list[Key]]:
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        yield keys[start : start + _KEYS_AT_ONCE]
