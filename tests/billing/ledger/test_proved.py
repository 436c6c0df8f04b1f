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


def test_a_column_added_since_version_4_is_last_and_null_in_older_rows() -> None:
    """Else it would change the digests of rows that were linked before it was added."""
    for table in OF_CHAIN:
        if table.name not in IN_VERSION_4:  # made by a later version as a whole
            continue
        columns = [column.name for column in table.c]
        then = IN_VERSION_4[table.name].split()
        assert columns[: len(then)] == then, table.name
        for added in columns[len(then) :]:
            assert table.c[added].nullable, (table.name, added)
            assert table.c[added].server_default is None, (table.name, added)


IN_VERSION_4 = {
    "polar_budget": "seq tenant level name unit time_window limit_count decimals zone over_budget closed set_at",
    "polar_chain_anchor": "id tenant version links head anchored_at",
    "polar_chain_head": "tenant number hash",
    "polar_chain_link": "tenant number subject key digest previous hash",
    "polar_price_book": "hash id document stored_at",
    "polar_prune": "id tenant before pruned_at requests totals",
    "polar_transaction": "id tenant kind reference effective_at booked_at corrects note",
    "polar_usage": (
        "seq tenant source request_id content_hash record_version started_at stored_at tags model model_fingerprint "
        "router router_version tier program outcome finish_reason error tokens_input tokens_cached tokens_output "
        "visits_prefill visits_decode flops_embed flops_layers_prefill flops_layers_decode flops_head flops_router "
        "flops_total flops_formula identity_flops kv_bytes_peak device dtype queue_ns prefill_ns decode_ns "
        "loops_stopped"
    ),
    "polar_entry": "transaction_id line tenant account currency whole rest",
    "polar_price_in_force": "seq price_book_hash for_all put_at",
    "polar_pruned": "seq prune_id tenant source request_id content_hash stored_at price_book_hash cost unrated",
    "polar_receipt": "usage_seq price_book_hash cost unrated",
    "polar_statement": "number tenant since until currency id price_book_hash seq_until late issued_at document",
    "polar_credit_note": "number tenant statement reference amount reason issued_at",
}
