"""Schema version 2: hash chain, double entry, retention, rollups, budgets, statements, loops stopped.

Up keeps every row of version 1, links all of it in the order it was stored, and sums it up by hour. Down drops what
version 2 added, and refuses while that holds what version 1 has no place for.

The tables are those of `polar_billing.ledger.schema` without what later versions added. A test pins their definition
(`tests/billing/data/schema_v2.sql`): the day one of them changes, this file gets today's statements as text, as version
1 has.

Revision ID: 0002
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from alembic import op
from sqlalchemy import func, select, text

from polar_billing.errors import SchemaVersionError
from polar_billing.ledger import chain
from polar_billing.ledger.digests import FIRST
from polar_billing.ledger.migrations.stored import forget_version, stored_chained
from polar_billing.ledger.rollups import raw_usage, sum_up, write_rollups
from polar_billing.ledger.schema import metadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Table

    from polar_billing.ledger.schema import Chained


revision = "0002"
down_revision = "0001"

_OLD: Final = {"polar_schema", "polar_price_book", "polar_usage", "polar_receipt", "polar_probe"}
_LATER: Final = {
    *("polar_price_in_force", "polar_chain_anchor", "polar_clock"),
    *("polar_api_key", "polar_reply", "polar_rate", "polar_running"),
}
_DERIVED: Final = {"polar_chain_link", "polar_chain_head", "polar_usage_hour"}
_ROWS_BATCH: Final = 500
_PRUNED: Final = {"polar_usage": "seq", "polar_receipt": "usage_seq"}
"""Tables whose rows retention may delete → their column that `polar_pruned.seq` names."""
_SAME_ROW: Final = {
    "polar_schema": "version = NEW.version",
    "polar_price_book": "hash = NEW.hash",
    "polar_usage": "seq = NEW.seq OR (tenant = NEW.tenant AND source = NEW.source AND request_id = NEW.request_id)",
    "polar_receipt": "usage_seq = NEW.usage_seq",
}
"""Tables of version 1 → what is true of a stored row that an insert would replace."""
_NAMED_BY_RECEIPTS: Final = {"usage_seq": "polar_usage (seq)", "price_book_hash": "polar_price_book (hash)"}
"""Columns of receipts → what they are foreign keys of in version 1; in version 2 on SQLite only."""


def upgrade() -> None:
    """Add the tables, and fill those that follow from what is there."""
    connection = op.get_bind()
    metadata.create_all(connection, tables=_added())
    _run(connection, "ALTER TABLE polar_usage ADD COLUMN loops_stopped BIGINT DEFAULT '0' NOT NULL")
    for name, column in _PRUNED.items():
        _let_pruned_go(connection, name, column)
    if connection.dialect.name == "postgresql":
        for column in _NAMED_BY_RECEIPTS:
            _run(connection, f"ALTER TABLE polar_receipt DROP CONSTRAINT polar_receipt_{column}_fkey")
    else:
        _refuse_replacing(connection, "FAIL")
    chained = stored_chained(connection)
    for subject in ("price_book", "usage"):
        _link_all(connection, subject, chained[subject])
    write_rollups(connection, sum_up(raw_usage(connection)))
    connection.execute(text("INSERT INTO polar_schema VALUES (2, :now)"), {"now": time.time_ns() // 1_000})


def _added() -> list[Table]:
    return [table for table in metadata.sorted_tables if table.name not in _OLD | _LATER]


def _link_all(connection: Connection, subject: str, chained: Chained) -> None:
    for keys in _pages(connection, chained):
        rows = chain.raw_rows(connection, chained, keys)
        new = [
            chain.NewLink(chained.tenant_of(found[0][1]), subject, str(key), FIRST.digest_of(subject, found))
            for key in keys
            for found in [rows[str(key)]]
        ]
        chain.append_links(connection, new, version=FIRST)


def _pages(connection: Connection, chained: Chained) -> Iterator[list[int | str]]:
    key = chained.table.c[chained.key]
    query = select(key).order_by(key).limit(_ROWS_BATCH)
    keys = list(connection.execute(query).scalars())
    while keys:
        yield keys
        keys = list(connection.execute(query.where(key > keys[-1])).scalars())


def _let_pruned_go(connection: Connection, name: str, column: str) -> None:
    pruned = f"EXISTS (SELECT 1 FROM polar_pruned WHERE polar_pruned.seq = OLD.{column})"
    if connection.dialect.name != "postgresql":
        refuse = f"BEGIN SELECT RAISE(ABORT, '{name} is append-only'); END"
        _run(connection, f"DROP TRIGGER {name}_no_delete")
        _run(connection, f"CREATE TRIGGER {name}_no_delete BEFORE DELETE ON {name} WHEN NOT ({pruned}) {refuse}")
        return
    _run(
        connection,
        f"CREATE OR REPLACE FUNCTION {name}_guard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF TG_OP = 'DELETE' AND ({pruned}) THEN RETURN OLD; END IF; "
        "RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$",
    )
    _set_trigger(connection, name, f"{name}_guard")


def _refuse_replacing(connection: Connection, how: str) -> None:
    for name, same_row in _SAME_ROW.items():
        exists = f"WHEN EXISTS (SELECT 1 FROM {name} WHERE {same_row})"
        refuse = f"BEGIN SELECT RAISE({how}, '{name} is append-only'); END"
        _run(connection, f"DROP TRIGGER {name}_no_replace")
        _run(connection, f"CREATE TRIGGER {name}_no_replace BEFORE INSERT ON {name} {exists} {refuse}")


def _let_none_go(connection: Connection, name: str) -> None:
    if connection.dialect.name != "postgresql":
        refuse = f"BEGIN SELECT RAISE(ABORT, '{name} is append-only'); END"
        _run(connection, f"DROP TRIGGER {name}_no_delete")
        _run(connection, f"CREATE TRIGGER {name}_no_delete BEFORE DELETE ON {name} {refuse}")
        return
    _set_trigger(connection, name, "polar_refuse_change")
    _run(connection, f"DROP FUNCTION {name}_guard()")


def _set_trigger(connection: Connection, name: str, function: str) -> None:
    _run(connection, f"DROP TRIGGER {name}_no_change ON {name}")
    row = f"FOR EACH ROW EXECUTE FUNCTION {function}()"
    _run(connection, f"CREATE TRIGGER {name}_no_change BEFORE UPDATE OR DELETE ON {name} {row}")


def downgrade() -> None:
    """Drop what version 2 added; facts and receipts stay."""
    connection = op.get_bind()
    added = _added()[::-1]
    for table in added:
        if table.name not in _DERIVED and connection.execute(select(func.count()).select_from(table)).scalar_one():
            raise SchemaVersionError(
                f"table {table.name!r} holds rows, which schema version 1 has no place for.",
                hint="Go back to a backup instead.",
            )
    if connection.execute(text("SELECT count(*) FROM polar_usage WHERE loops_stopped > 0")).scalar_one():
        raise SchemaVersionError(
            "column 'polar_usage.loops_stopped' holds counts, which schema version 1 has no place for.",
            hint="Go back to a backup instead.",
        )
    for name in _PRUNED:
        _let_none_go(connection, name)
    if connection.dialect.name == "postgresql":
        for column, named in _NAMED_BY_RECEIPTS.items():
            _run(connection, f"ALTER TABLE polar_receipt ADD FOREIGN KEY ({column}) REFERENCES {named}")
    else:
        _refuse_replacing(connection, "ABORT")
    _run(connection, "ALTER TABLE polar_usage DROP COLUMN loops_stopped")
    metadata.drop_all(connection, tables=added)
    forget_version(connection, 2)


def _run(connection: Connection, statement: str) -> None:
    connection.execute(text(statement))
