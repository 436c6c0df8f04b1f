"""Schema version 4: a hash chain that knows the types of values.

Up proves every chain by the rule it was written by, row by row, and refuses to go on from one that is broken. Then it
anchors each: the first link of version 2 names how many links were proved, and the hash of the last. No stored row and
no link changes, so receipts and heads kept elsewhere stay good. Down takes the anchors back, and refuses once something
was linked after them, which schema version 3 could not prove.

Revision ID: 0004
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from alembic import op
from sqlalchemy import delete, or_, select, text, update

from polar_billing.errors import LedgerUnsoundError, SchemaVersionError
from polar_billing.ledger import chain
from polar_billing.ledger.cells import well_typed
from polar_billing.ledger.migrations.stored import forget_version, past_triggers, stored_chained
from polar_billing.ledger.schema import anchor_table, head_table, link_table, metadata
from polar_billing.ledger.walk import Walk, unlinked

if TYPE_CHECKING:
    from sqlalchemy import Connection


revision = "0004"
down_revision = "0003"

_TABLES: Final = [anchor_table]


def upgrade() -> None:
    """Prove what is there, then anchor it."""
    connection = op.get_bind()
    heads = _proved(connection)
    metadata.create_all(connection, tables=_TABLES)
    now = time.time_ns() // 1_000
    for tenant, head in heads.items():
        columns = "tenant, version, links, head, anchored_at"
        added = text(f"INSERT INTO polar_chain_anchor ({columns}) VALUES (:of, 1, :links, :head, :now) RETURNING id")
        values = {"of": tenant, "links": head.number, "head": head.hash, "now": now}
        chain.link(connection, anchor_table, connection.execute(added, values).scalar_one(), heads)
    connection.execute(text("INSERT INTO polar_schema VALUES (4, :now)"), {"now": now})


def _proved(connection: Connection) -> dict[str, chain.Head]:
    """Prove every chain, and keep writers off all of them.

    Returns:
        The end of each chain.

    Raises:
        LedgerUnsoundError: One is not as it was written.
    """
    chained = stored_chained(connection)
    tables = [link_table, head_table]
    for one in chained.values():
        tables += [one.table, *one.parts]
    with well_typed(connection, tables) as wrong:
        if wrong:
            raise _unsound(wrong[0].tenant, None, wrong[0].what)
        tenants = set(connection.execute(select(link_table.c.tenant).distinct()).scalars())
        tenants |= set(connection.execute(select(head_table.c.tenant)).scalars())
        heads = chain.lock_heads(connection, tenants)
        for tenant in sorted(tenants):
            fault = Walk(connection, tenant, chained, all_first=True).first_fault(heads[tenant])
            if fault is not None:
                raise _unsound(tenant, fault.number, fault.what)
        for fault in unlinked(connection, chained):
            raise _unsound(fault.tenant, fault.number, fault.what)
    return heads


def _unsound(tenant: str, number: int | None, what: str) -> LedgerUnsoundError:
    whose = f"tenant {tenant!r}" if tenant else "rows of no tenant"
    where = "" if number is None else f", number {number} of the chain"
    return LedgerUnsoundError(
        f"the ledger was changed after it was written, so it was not migrated and is as it was: {whose}{where}: {what}",
        hint="Migrate a backup from before that change, or undo the change; schema 4 goes on from proved chains only.",
    )


def downgrade() -> None:
    """Take the anchors back."""
    connection = op.get_bind()
    anchor, head = anchor_table.c, head_table.c
    joined = head_table.outerjoin(anchor_table, anchor.tenant == head.tenant)
    longer = or_(anchor.links.is_(None), head.number > anchor.links + 1)
    query = select(head.tenant).select_from(joined).where(head.number > 0, longer).order_by(head.tenant).limit(1)
    for tenant in connection.execute(query).scalars():
        raise SchemaVersionError(
            f"the chain of tenant {tenant!r} holds links of version 2, which schema version 3 has no place for.",
            hint="Go back to a backup instead.",
        )
    anchors = connection.execute(select(anchor.tenant, anchor.links, anchor.head)).all()
    with past_triggers(connection, "polar_chain_link"), past_triggers(connection, "polar_chain_head"):
        connection.execute(delete(link_table).where(link_table.c.subject == chain.ANCHOR))
        for tenant, links, last in anchors:
            values = {"number": links, "hash": last}
            connection.execute(update(head_table).where(head.tenant == tenant).values(values))
    metadata.drop_all(connection, tables=_TABLES)
    forget_version(connection, 4)
