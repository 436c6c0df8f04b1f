"""Which requests the ledger holds already: as usage, or as the proof that retention left of them.

Knows how to look identities up; decides nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, select

from polar_billing.among import Among
from polar_billing.rows import from_row
from polar_billing.schema import pruned_table, receipt_table, usage_table
from polar_billing.storage import PrunedUsage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, Row, Select, Table

    from polar_billing.storage import Identity, StoredUsage

    Known = dict[Identity, tuple[str, StoredUsage | PrunedUsage]]
    """Identity → content hash and what is stored; what is not stored is missing."""

__all__ = ["find_known", "find_pruned", "joined"]


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
