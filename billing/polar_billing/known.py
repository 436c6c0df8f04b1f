"""Which requests the ledger holds already: as usage, or as the proof that retention left of them.

Knows how to look identities up; decides nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import select

from polar_billing.rows import from_row
from polar_billing.schema import pruned_table, receipt_table, usage_table
from polar_billing.storage import PrunedUsage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, Row, Select, Table

    from polar_billing.storage import StoredUsage

    Identity = tuple[str, str, str]
    """Tenant, source, request id."""
    Groups = Mapping[tuple[str, str], Sequence[str]]
    """(tenant, source) → request ids."""

__all__ = ["find_known", "groups_of", "joined"]

_IDS_AT_ONCE: Final = 500


def groups_of(identities: Iterable[Identity]) -> Groups:
    """Request ids by tenant and source, each once."""
    groups: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for tenant, source, request_id in identities:
        groups[tenant, source][request_id] = None
    return {group: list(ids) for group, ids in groups.items()}


def find_known(connection: Connection, groups: Groups) -> dict[Identity, tuple[str, StoredUsage | PrunedUsage]]:
    """Look identities up.

    Returns:
        Identity → content hash and what is stored; what is not stored is missing.
    """
    known: dict[Identity, tuple[str, StoredUsage | PrunedUsage]] = {}
    for row in _rows(connection, usage_table, joined(), groups):
        known[row.tenant, row.source, row.request_id] = (row.content_hash, from_row(row))
    for row in _rows(connection, pruned_table, select(pruned_table), groups):
        known[row.tenant, row.source, row.request_id] = (row.content_hash, _pruned(row))
    return known


def _rows(connection: Connection, table: Table, query: Select[Any], groups: Groups) -> Iterator[Row[Any]]:
    columns = table.c
    for (tenant, source), ids in groups.items():
        of_group = query.where(columns.tenant == tenant, columns.source == source)
        for start in range(0, len(ids), _IDS_AT_ONCE):
            yield from connection.execute(of_group.where(columns.request_id.in_(ids[start : start + _IDS_AT_ONCE])))


def _pruned(row: Row[Any]) -> PrunedUsage:
    return PrunedUsage(row.seq, row.source, row.stored_at, row.price_book_hash, row.cost, row.unrated)


def joined() -> Select[Any]:
    """Usage with its receipt, the columns that `from_row` reads."""
    receipt = receipt_table.c
    return select(usage_table, receipt.price_book_hash, receipt.cost, receipt.unrated).join(
        receipt_table, receipt.usage_seq == usage_table.c.seq
    )
