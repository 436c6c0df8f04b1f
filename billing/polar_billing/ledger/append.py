"""Store usage records and their receipts inside an open write transaction: once each, linked, rolled up.

The order is what makes it safe with several writers: first the heads of the tenants' chains are locked, then it
is looked up what is stored already, then rows are written. Knows no connection of its own and no prices.

Which requests the ledger holds already: as usage, or as the proof that retention left of them.

Knows how to look identities up; decides nothing.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, insert, select, text

from polar_billing.budgets.settlement import settle
from polar_billing.errors import ConflictError
from polar_billing.ledger import chain
from polar_billing.ledger.contract import PrunedUsage, StoredUsage
from polar_billing.ledger.lookup import Among, insert_rows
from polar_billing.ledger.rollups import add_to_rollups
from polar_billing.ledger.rows import from_row, receipt_to_raw, to_raw
from polar_billing.ledger.schema import price_book_table, pruned_table, receipt_table, usage_table
from polar_billing.ledger.schema.base import to_microseconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, Row, Select, Table

    from polar_billing.ledger.contract import Entry, Identity
    from polar_billing.prices.book import PriceBook

    Known = dict[Identity, tuple[str, StoredUsage | PrunedUsage]]
    """Identity → content hash and what is stored; what is not stored is missing."""


def find_known(connection: Connection, identities: Iterable[Identity]) -> Known:
    """Look identities up."""
    groups = _groups_of(identities)
    known = _pruned_among(connection, groups)
    for row in _rows(connection, _USAGE, groups):
        known[row.tenant, row.source, row.request_id] = (row.content_hash, from_row(row))
    return known


def find_pruned(connection: Connection, identities: Iterable[Identity]) -> Known:
    """Look up only what retention left; most ledgers were never pruned, and tell at once."""
    if connection.execute(_ANY_PRUNED).first() is None:
        return {}
    return _pruned_among(connection, _groups_of(identities))


def _pruned_among(connection: Connection, groups: Mapping[tuple[str, str], Sequence[str]]) -> Known:
    return {
        (row.tenant, row.source, row.request_id): (row.content_hash, _pruned(row))
        for row in _rows(connection, _PRUNED, groups)
    }


def _groups_of(identities: Iterable[Identity]) -> dict[tuple[str, str], list[str]]:
    """Request ids by tenant and source."""
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for tenant, source, request_id in identities:
        groups[tenant, source].append(request_id)
    return groups


def _rows(connection: Connection, query: Among, groups: Mapping[tuple[str, str], Sequence[str]]) -> Iterator[Row[Any]]:
    for (tenant, source), ids in groups.items():
        yield from query.run(connection, ids, of_tenant=tenant, of_source=source)


def _pruned(row: Row[Any]) -> PrunedUsage:
    return PrunedUsage(row.seq, row.source, row.stored_at, row.price_book_hash, row.cost, row.unrated)


def _by_request(table: Table, query: Select[Any]) -> Among:
    of_group = (table.c.tenant == bindparam("of_tenant"), table.c.source == bindparam("of_source"))
    return Among(query.where(*of_group), table.c.request_id)


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
_BOOKS: Final = Among(select(price_book_table.c.hash), price_book_table.c.hash)
_LAST_ON_SQLITE: Final = text("SELECT seq FROM sqlite_sequence WHERE name = 'polar_usage'")
_NEXT_ON_POSTGRES: Final = text("SELECT array_agg(nextval('polar_usage_seq_seq')) FROM generate_series(1, :count)")

_SUBJECT: Final = chain.subject_of(usage_table)
_USAGE_NAME: Final = str(usage_table.name)
_RECEIPT_NAME: Final = str(receipt_table.name)


def store_entries(
    connection: Connection, entries: Sequence[Entry], *, as_new: bool
) -> list[StoredUsage | ConflictError]:
    """Store what is not stored yet; see `LedgerStorage.append_many`.

    Args:
        connection: An open write transaction.
        entries: In the order they shall be stored.
        as_new: Do not look which are stored: looking costs more than to fail and try again, as most never are.

    Raises:
        IntegrityError: One of them was not new, or the database does not take its content.
    """
    books = _missing_books(connection, {entry.book.content_hash: entry.book for entry in entries})
    tenants = {entry.record.tenant for entry in entries}
    heads = chain.lock_heads(connection, tenants | {chain.NO_TENANT} if books else tenants)
    known = (find_pruned if as_new else find_known)(connection, [entry.identity for entry in entries])
    fresh: dict[Identity, Entry] = {}
    for entry in entries:
        if (identity := entry.identity) not in known:
            fresh.setdefault(identity, entry)
    if fresh:
        _store_books(connection, books, {entry.book.content_hash for entry in fresh.values()}, heads)
        for (identity, entry), stored in zip(fresh.items(), _write(connection, heads, [*fresh.values()]), strict=True):
            known[identity] = (entry.content_hash, stored)
    return [_answer(entry, *known[entry.identity]) for entry in entries]


def _answer(entry: Entry, digest: str, stored: StoredUsage | PrunedUsage) -> StoredUsage | ConflictError:
    if digest == entry.content_hash:
        return stored.of(entry.record) if isinstance(stored, PrunedUsage) else stored
    return ConflictError(
        f"request {entry.record.request_id!r} of tenant {entry.record.tenant!r} is in the ledger (seq {stored.seq}) "
        "with other content.",
        hint="Give every request an id of its own; the first record stands.",
    )


def _write(connection: Connection, heads: dict[str, chain.Head], entries: Sequence[Entry]) -> list[StoredUsage]:
    now = datetime.now(UTC)
    stored_at = to_microseconds(now)
    numbers = _numbers(connection, len(entries))
    usage = [to_raw(seq, entry, stored_at) for seq, entry in zip(numbers, entries, strict=True)]
    receipts = list(map(receipt_to_raw, numbers, entries))
    insert_rows(connection, usage_table, usage)
    insert_rows(connection, receipt_table, receipts)
    chain.append_links(connection, list(map(_link, usage, receipts)), heads)
    add_to_rollups(connection, zip(usage, receipts, strict=True))
    settle(connection, entries)
    return [
        StoredUsage(seq, one.source, one.record, now, one.book.content_hash, one.cost, one.unrated)
        for seq, one in zip(numbers, entries, strict=True)
    ]


def _link(usage: Sequence[Any], receipt: Sequence[Any]) -> chain.NewLink:
    seq, tenant = usage[:2]
    digest = chain.digest_of(_SUBJECT, ((_USAGE_NAME, usage), (_RECEIPT_NAME, receipt)))
    return chain.NewLink(tenant, _SUBJECT, str(seq), digest)


def _numbers(connection: Connection, count: int) -> Sequence[int]:
    """The next numbers of `polar_usage`, which no one else will get."""
    if connection.dialect.name == "postgresql":
        numbers: list[int] = connection.execute(_NEXT_ON_POSTGRES, {"count": count}).scalar_one()
        return numbers
    last = connection.execute(_LAST_ON_SQLITE).scalar() or 0
    return range(last + 1, last + 1 + count)


def _missing_books(connection: Connection, books: dict[str, PriceBook]) -> dict[str, PriceBook]:
    found = set(_BOOKS.run(connection, books).scalars())
    return {digest: book for digest, book in books.items() if digest not in found}


def _store_books(
    connection: Connection, books: dict[str, PriceBook], used: set[str], heads: dict[str, chain.Head]
) -> None:
    """Store the books that rated something; a replay alone brings none in."""
    wanted = {digest: book for digest, book in books.items() if digest in used}
    for digest, book in _missing_books(connection, wanted).items() if wanted else ():
        values = {"hash": digest, "id": book.id, "document": book.document, "stored_at": datetime.now(UTC)}
        connection.execute(insert(price_book_table).values(values))
        chain.link(connection, price_book_table, digest, heads)


chain.register_chained(usage_table, parts={receipt_table: "usage_seq"})
chain.register_chained(price_book_table)
