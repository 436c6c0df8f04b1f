"""How each column of each table is proved: declared beside the schema; tests compare it with the schema and `verify`.

An undeclared column fails the tests, one that is declared chained or recomputed but can be changed unnoticed fails
`make tamper`, and `docs/proof.md` prints these declarations. Knows no connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Proof(StrEnum):
    """The way in which a changed value is found."""

    CHAINED = "chained"
    """The digest of its row is in the hash chain, or it is of the chain itself."""
    RECOMPUTED = "recomputed"
    """It follows from chained values, and `polar verify` computes it again."""
    OUTSIDE = "outside the proof"
    """Nothing but its type is checked."""


@dataclass(frozen=True)
class Declared:
    """Columns of one table that are proved alike."""

    proof: Proof
    columns: tuple[str, ...]
    why: str = ""
    """From what it is recomputed, or why nothing proves it."""


def _declared(proof: Proof, columns: str, why: str = "") -> Declared:
    return Declared(proof, tuple(columns.split()), why)


def _chained(columns: str) -> tuple[Declared, ...]:
    return (_declared(Proof.CHAINED, columns),)


PROVED: Final[dict[str, tuple[Declared, ...]]] = {
    "polar_schema": (
        _declared(
            Proof.OUTSIDE, "version applied_at", "a ledger of another schema version is refused before it is read"
        ),
    ),
    "polar_probe": (_declared(Proof.OUTSIDE, "payload", "always empty, and never read"),),
    "polar_price_book": _chained("hash id document stored_at"),
    "polar_price_in_force": _chained("seq price_book_hash for_all put_at"),
    "polar_usage": _chained(
        "seq tenant source request_id content_hash record_version started_at stored_at tags model model_fingerprint "
        "router router_version tier program outcome finish_reason error tokens_input tokens_cached tokens_output "
        "visits_prefill visits_decode flops_embed flops_layers_prefill flops_layers_decode flops_head flops_router "
        "flops_total flops_formula identity_flops kv_bytes_peak device dtype queue_ns prefill_ns decode_ns "
        "loops_stopped visits_prefill_filled tokens_drafted tokens_accepted flops_drafts"
    ),
    "polar_receipt": _chained("usage_seq price_book_hash cost unrated"),
    "polar_usage_hour": (
        _declared(
            Proof.RECOMPUTED,
            "id tenant hour tier model source outcome price_book_hash unrated requests "
            "tokens_input_millions tokens_input_rest tokens_cached_millions tokens_cached_rest tokens_output_millions "
            "tokens_output_rest visits_millions visits_rest flops_millions flops_rest identity_flops_millions "
            "identity_flops_rest cost_millions cost_rest",
            "the sums of usage and receipts, and of what was pruned",
        ),
    ),
    "polar_prune": _chained("id tenant before pruned_at requests totals statements"),
    "polar_pruned": _chained(
        "seq prune_id tenant source request_id content_hash stored_at price_book_hash cost unrated"
    ),
    "polar_chain_link": _chained("tenant number subject key digest previous hash"),
    "polar_chain_head": _chained("tenant number hash"),
    "polar_transaction": _chained("id tenant kind reference effective_at booked_at corrects note"),
    "polar_entry": _chained("transaction_id line tenant account currency whole rest"),
    "polar_budget": _chained(
        "seq tenant level name unit time_window limit_count decimals zone over_budget closed set_at"
    ),
    "polar_hold": (
        _declared(
            Proof.RECOMPUTED,
            "tenant source request_id project user_name key_name at currency cost flops",
            "once settled, the usage and the receipt of its request",
        ),
        _declared(
            Proof.OUTSIDE,
            "seq attempt fingerprint offer cost_bound flops_bound held_at expires_at state resolved_at",
            "what was held before a request ran is recorded nowhere else, and its usage counts instead",
        ),
    ),
    "polar_budget_counter": (
        _declared(Proof.RECOMPUTED, "starts ends decimals spent held", "usage, receipts and open holds"),
        _declared(
            Proof.OUTSIDE,
            "seq tenant level name unit time_window",
            "a counter without a budget has no effect, and a missing one is recomputed",
        ),
    ),
    "polar_clock": (
        _declared(Proof.OUTSIDE, "id boot ahead", "only says when open holds expire, which represent nothing stored"),
    ),
    "polar_statement": _chained(
        "number tenant since until currency id price_book_hash seq_until audits_until late issued_at document"
    ),
    "polar_api_key": _chained(
        "seq tenant key_id name secret_hash tags scopes models tiers max_tokens requests_per_minute tokens_per_minute "
        "parallel not_before expires_at rotated_from revoked set_at"
    ),
    "polar_reply": (
        _declared(
            Proof.OUTSIDE,
            "seq tenant key_hash fingerprint state answer claimed_at expires_at",
            "a copy of a sent answer, kept for a day; its cost is in the usage",
        ),
    ),
    "polar_rate": (
        _declared(Proof.OUTSIDE, "key_id requests_full_at tokens_full_at", "the usage of one minute, for a minute"),
    ),
    "polar_running": (
        _declared(Proof.OUTSIDE, "key_id replica answers expires_at", "running answers, for half a minute"),
    ),
    "polar_credit_note": _chained("number tenant statement reference amount reason issued_at"),
    "polar_audit": _chained(
        "seq tenant audit_id source request_id tier promise loss alpha delta lost compared kept weight prompt_tokens "
        "flops audit_request_id at stored_at"
    ),
    "polar_standing": _chained("seq promise tier state audits losses audit_seq since reason"),
    "polar_monitor": (
        _declared(Proof.RECOMPUTED, "promise audit_seq monitor", "the audits of the promise, up to that number"),
    ),
    "polar_alert": (
        _declared(
            Proof.OUTSIDE,
            "standing_seq sent attempts due_at answer",
            "whether a webhook was notified; the content of the alert is chained",
        ),
    ),
}
"""Table → its columns, each of them once."""

ROWS_OUTSIDE: Final[dict[str, str]] = {
    "polar_schema": "a ledger of another schema version is refused before it is read",
    "polar_probe": "always empty, and never read",
    "polar_hold": "an unsettled hold represents nothing stored; if a settled one is missing, its usage counts anyway",
    "polar_reply": "a copy of a sent answer, which is deleted after a day anyway",
    "polar_rate": "a key without its row gets a full minute's allowance, once",
    "polar_running": "running answers are counted again within a quarter of a minute",
    "polar_monitor": "if one is missing, all audits of its promise are read",
    "polar_alert": "an alert without its row is sent once more, within a day",
    "polar_clock": "without its row, the clock restarts at the next hold",
    "polar_budget_counter": "a missing counter is recomputed, and one without a budget has no effect",
}
"""Table → why a deleted or added row need not be found. In every other table it is found."""


def columns_of(table: str, proof: Proof) -> frozenset[str]:
    """The columns of a table that are proved in one way."""
    return frozenset(name for one in PROVED[table] if one.proof is proof for name in one.columns)
