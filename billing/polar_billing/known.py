"""Which requests the ledger holds already: as usage, or as the proof that retention left of them.

Knows how to look identities up; decides nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import to_json
from sqlalchemy import ARRAY, Text, any_, bindparam, func, select

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
    Queries = tuple[Select[Any], Select[Any]]
    """On SQLite, on PostgreSQL."""

__all__ = ["find_known", "groups_of", "joined"]


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
    for row in _rows(connection, _USAGE, groups):
        known[row.tenant, row.source, row.request_id] = (row.content_hash, from_row(row))
    for row in _rows(connection, _PRUNED, groups):
        known[row.tenant, row.source, row.request_id] = (row.content_hash, _pruned(row))
    return known


def _rows(connection: Connection, queries: Queries, groups: Groups) -> Iterator[Row[Any]]:
    on_postgres = connection.dialect.name == "postgresql"
    query = queries[on_postgres]
    for (tenant, source), ids in groups.items():
        named: Any = list(ids) if on_postgres else to_json(ids).decode()
        yield from connection.execute(query, {"of_tenant": tenant, "of_source": source, "ids": named})


def _pruned(row: Row[Any]) -> PrunedUsage:
    return PrunedUsage(row.seq, row.source, row.stored_at, row.price_book_hash, row.cost, row.unrated)


def _queries(table: Table, query: Select[Any]) -> Queries:
    """Look request ids up that are one parameter, however many: thousands of them cost more than the look-up."""
    columns = table.c
    query = query.where(columns.tenant == bindparam("of_tenant"), columns.source == bindparam("of_source"))
    unpacked = func.json_each(bindparam("ids", type_=Text)).table_valued("value")
    return (
        query.where(columns.request_id.in_(select(unpacked.c.value))),
        query.where(columns.request_id == any_(bindparam("ids", type_=ARRAY(Text)))),
    )


def joined() -> Select[Any]:
    """Usage with its receipt, the columns that `from_row` reads."""
    receipt = receipt_table.c
    return select(usage_table, receipt.price_book_hash, receipt.cost, receipt.unrated).join(
        receipt_table, receipt.usage_seq == usage_table.c.seq
    )


# Built once: building a statement costs more than running it.
_USAGE: Final = _queries(usage_table, joined())
_PRUNED: Final = _queries(pruned_table, select(pruned_table))
