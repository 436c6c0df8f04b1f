"""Store usage records, their receipts and price books inside an open write transaction: once each, linked, rolled up.

The order is what makes it safe with several writers: first the heads of the tenants' chains are locked, then stored
requests are looked up (as usage, or as the proof that retention left of them), then rows are written. Opens no
connection; knows no prices.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, insert, literal, select, text, union_all

from polar_billing.errors import ConflictError
from polar_billing.ledger import chain
from polar_billing.ledger.connection import KeyedQuery, insert_rows
from polar_billing.ledger.records import (
    INTERRUPTED_TAG,
    REUSED_TAG,
    PrunedUsage,
    StoredUsage,
    from_row,
    receipt_to_raw,
    to_raw,
)
from polar_billing.ledger.rollups import add_to_rollups
from polar_billing.ledger.schema import (
    NO_TENANT,
    price_book_table,
    pruned_table,
    receipt_table,
    subject_of,
    usage_table,
)
from polar_billing.values.canonical import to_microseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, Row, Select, Table

    from polar_billing.ledger.records import Entry, Identity
    from polar_billing.prices.book import PriceBook

    Settle = Callable[[Connection, Sequence[Entry]], None]
    """Called in the transaction that stored new records, after their rows were written, with the heads of the chains of
    their tenants locked; if it raises, the records are rolled back as well."""
    Known = dict[Identity, tuple[str, StoredUsage | PrunedUsage]]
    """Identity → content hash and what is stored; what is not stored is missing."""


def find_known(connection: Connection, identities: Iterable[Identity]) -> Known:
    """Look up which of some identities are stored."""
    groups = _groups_of(identities)
    known = _pruned_among(connection, groups)
    for row in _rows(connection, _USAGE, groups):
        known[row.tenant, row.source, row.request_id] = (row.content_hash, from_row(row))
    return known


def find_pruned(connection: Connection, identities: Iterable[Identity]) -> Known:
    """Look up only what retention left; most ledgers were never pruned, and one quick query says so."""
    if connection.execute(_ANY_PRUNED).first() is None:
        return {}
    return _pruned_among(connection, _groups_of(identities))


def _pruned_among(connection: Connection, groups: Mapping[tuple[str, str], Sequence[str]]) -> Known:
    known: Known = {}
    for row in _rows(connection, _PRUNED, groups):
        left = PrunedUsage(row.seq, row.source, row.stored_at, row.price_book_hash, row.cost, row.unrated)
        known[row.tenant, row.source, row.request_id] = (row.content_hash, left)
    return known


def is_stored(connection: Connection, identity: Identity) -> bool:
    """True if a request is stored, as usage or as what retention left of it."""
    tenant, source, request_id = identity
    values = {"tenant": tenant, "source": source, "request_id": request_id}
    return connection.execute(_STORED, values).first() is not None


def is_recorded(connection: Connection, entry: Entry) -> bool:
    """True if the request that an entry is of is stored, whatever its content: by its id and the time it began.

    It may be stored under another id: if another request had taken its own, or if its process was killed. What
    retention left of a request does not say when that began; the id must do.
    """
    record, usage = entry.record, usage_table.c
    begun = (usage.tenant == record.tenant, usage.source == entry.source, usage.started_at == record.started_at)
    for request_id, tags in connection.execute(select(usage.request_id, usage.tags).where(*begun)):
        if record.request_id in (request_id, tags.get(REUSED_TAG), tags.get(INTERRUPTED_TAG)):
            return True
    return bool(find_pruned(connection, [entry.identity]))


def _groups_of(identities: Iterable[Identity]) -> dict[tuple[str, str], list[str]]:
    """Request ids by tenant and source."""
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for tenant, source, request_id in identities:
        groups[tenant, source].append(request_id)
    return groups


def _rows(
    connection: Connection, query: KeyedQuery, groups: Mapping[tuple[str, str], Sequence[str]]
) -> Iterator[Row[Any]]:
    for (tenant, source), ids in groups.items():
        yield from query.run(connection, ids, of_tenant=tenant, of_source=source)


def _by_request(table: Table, query: Select[Any]) -> KeyedQuery:
    of_group = (table.c.tenant == bindparam("of_tenant"), table.c.source == bindparam("of_source"))
    return KeyedQuery(query.where(*of_group), table.c.request_id)


def joined() -> Select[Any]:
    """Usage with its receipt, the columns that `from_row` reads."""
    receipt = receipt_table.c
    return select(usage_table, receipt.price_book_hash, receipt.cost, receipt.unrated).join(
        receipt_table, receipt.usage_seq == usage_table.c.seq
    )


_USAGE: Final = _by_request(usage_table, joined())
_PRUNED: Final = _by_request(pruned_table, select(pruned_table))
_ANY_PRUNED: Final = select(pruned_table.c.seq).limit(1)
# Built once: building a statement costs more than running it.
_LAST_ON_SQLITE: Final = text("SELECT seq FROM sqlite_sequence WHERE name = 'polar_usage'")
_NEXT_ON_POSTGRES: Final = text("SELECT array_agg(nextval('polar_usage_seq_seq')) FROM generate_series(1, :count)")

_STORED_BOOKS: Final = KeyedQuery(select(price_book_table.c.hash), price_book_table.c.hash)
_STORED: Final = union_all(
    *(
        select(literal(1)).where(
            table.c.tenant == bindparam("tenant"),
            table.c.source == bindparam("source"),
            table.c.request_id == bindparam("request_id"),
        )
        for table in (usage_table, pruned_table)
    )
)

_SUBJECT: Final = subject_of(usage_table)
_USAGE_NAME: Final = str(usage_table.name)
_RECEIPT_NAME: Final = str(receipt_table.name)


def store_entries(
    connection: Connection, entries: Sequence[Entry], settle: Settle, *, as_new: bool
) -> list[StoredUsage | ConflictError]:
    """Store what is not stored yet, in order; see `Ledger.append_many`.

    Entries taken `as_new` are inserted first: retrying the rare duplicate is cheaper than checking every record.

    Raises:
        IntegrityError: One of them was not new, or the database does not take its content.
    """
    books = missing_books(connection, {entry.book.content_hash: entry.book for entry in entries})
    tenants = {entry.record.tenant for entry in entries}
    heads = chain.lock_heads(connection, tenants | {NO_TENANT} if books else tenants)
    known = (find_pruned if as_new else find_known)(connection, [entry.identity for entry in entries])
    fresh: dict[Identity, Entry] = {}
    for entry in entries:
        if (identity := entry.identity) not in known:
            fresh.setdefault(identity, entry)
    if fresh:
        used = {entry.book.content_hash for entry in fresh.values()}  # a replay alone brings no book in
        store_books(connection, {digest: book for digest, book in books.items() if digest in used}, heads)
        for (identity, entry), stored in zip(fresh.items(), _write(connection, heads, [*fresh.values()]), strict=True):
            known[identity] = (entry.content_hash, stored)
        settle(connection, [*fresh.values()])
    return [_answer(entry, *known[entry.identity]) for entry in entries]


def _answer(entry: Entry, digest: str, stored: StoredUsage | PrunedUsage) -> StoredUsage | ConflictError:
    if digest == entry.content_hash:
        return stored.of(entry.record) if isinstance(stored, PrunedUsage) else stored
    return ConflictError(
        f"request {entry.record.request_id!r} of tenant {entry.record.tenant!r} is in the ledger (seq {stored.seq}) "
        "with other content.",
        hint="Give every request its own id; the first record stands.",
    )


def _write(connection: Connection, heads: dict[str, chain.Head], entries: Sequence[Entry]) -> list[StoredUsage]:
    now = datetime.now(UTC)
    stored_at = to_microseconds(now)
    numbers = _numbers(connection, len(entries))
    usage = [to_raw(seq, entry, stored_at) for seq, entry in zip(numbers, entries, strict=True)]
    receipts = list(map(receipt_to_raw, numbers, entries))
    insert_rows(connection, usage_table, usage)
    insert_rows(connection, receipt_table, receipts)
    links = []
    for row, receipt in zip(usage, receipts, strict=True):
        digest = chain.digest_of_plain(_SUBJECT, ((_USAGE_NAME, row), (_RECEIPT_NAME, receipt)))
        links.append(chain.NewLink(row[1], _SUBJECT, str(row[0]), digest))
    chain.append_links(connection, links, heads)
    add_to_rollups(connection, zip(usage, receipts, strict=True))
    return [
        StoredUsage(seq, entry.source, entry.record, now, entry.book.content_hash, entry.cost, entry.unrated)
        for seq, entry in zip(numbers, entries, strict=True)
    ]


def _numbers(connection: Connection, count: int) -> Sequence[int]:
    """The next numbers of `polar_usage`, reserved for this transaction."""
    if connection.dialect.name == "postgresql":
        numbers: list[int] = connection.execute(_NEXT_ON_POSTGRES, {"count": count}).scalar_one()
        return numbers
    last = connection.execute(_LAST_ON_SQLITE).scalar() or 0
    return range(last + 1, last + 1 + count)


def missing_books(connection: Connection, books: Mapping[str, PriceBook]) -> dict[str, PriceBook]:
    """Those of some books, by content hash, that are not stored yet."""
    stored = set(_STORED_BOOKS.run(connection, books).scalars()) if books else set()
    return {digest: book for digest, book in books.items() if digest not in stored}


def store_books(
    connection: Connection, books: Mapping[str, PriceBook], heads: dict[str, chain.Head] | None = None
) -> None:
    """Store books as they are, by content hash, unless they are stored already; `heads` as for `chain.append_links`."""
    for digest, book in missing_books(connection, books).items():
        values = {"hash": digest, "id": book.id, "document": book.document, "stored_at": datetime.now(UTC)}
        connection.execute(insert(price_book_table).values(values))
        chain.link(connection, price_book_table, digest, heads)
