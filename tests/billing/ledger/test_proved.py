"""Every column of every table says how it is proved, once, and in truth as far as the schema tells."""

from __future__ import annotations

from polar_billing.ledger.schema import CHAINED, head_table, link_table, metadata
from polar_billing.ledger.schema.proved import PROVED, ROWS_OUTSIDE, Proof, columns_of

OF_CHAIN = {head_table, link_table, *(table for one in CHAINED.values() for table in (one.table, *one.parts))}


def test_every_column_of_every_table_is_declared_once() -> None:
    """One that is new fails here: declare it in `ledger/schema/proved.py`, then run `python docs/generate_proof.py`."""
    declared = {name: [column for one in parts for column in one.columns] for name, parts in PROVED.items()}
    assert {name: sorted(columns) for name, columns in declared.items()} == {
        name: sorted(map(str, table.c.keys())) for name, table in metadata.tables.items()
    }


def test_what_is_declared_chained_is_in_a_digest() -> None:
    for name, table in metadata.tables.items():
        chained = columns_of(name, Proof.CHAINED)
        assert chained == (set(table.c.keys()) if table in OF_CHAIN else set()), name


def test_what_is_not_chained_says_why() -> None:
    for name, parts in PROVED.items():
        for one in parts:
            assert bool(one.why) == (one.proof is not Proof.CHAINED), name
    for name in ROWS_OUTSIDE:
        assert columns_of(name, Proof.OUTSIDE), name
    assert not set(ROWS_OUTSIDE) & {str(table.name) for table in OF_CHAIN}
