"""Store usage records and their receipts inside an open write transaction: once each, linked, rolled up.

The order is what makes it safe with several writers: first the heads of the tenants' chains are locked, then it
is looked up what is stored already, then rows are written. Knows no connection of its own and no prices.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import insert, select, text

from polar_billing import chain
from polar_billing.among import Among
from polar_billing.budgets.settle import settle
from polar_billing.bulk import insert_rows
from polar_billing.columns import to_microseconds
from polar_billing.errors import ConflictError
from polar_billing.known import find_known, find_pruned
from polar_billing.rollups import add_to_rollups
from polar_billing.rows import receipt_to_raw, to_raw
from polar_billing.schema import price_book_table, receipt_table, usage_table
from polar_billing.storage import PrunedUsage, StoredUsage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from polar_billing.price_book import PriceBook
    from polar_billing.storage import Entry, Identity

__all__ = ["store_entries"]

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
