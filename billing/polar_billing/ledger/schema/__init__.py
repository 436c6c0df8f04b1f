"""The ledger's tables on one metadata, which of them are chained, and the triggers that forbid changes.

`usage` facts, receipts, price books, sums, retention · `ledger` the hash chain, double entry, statements · `access`
API keys, rates, replies, budgets and holds · `promises` audits, standings, monitors, alerts. A new table belongs in
one of them or in a module of its own that is imported here, and in `CHAINED` if its rows belong in the hash chain.
Knows no connection.
"""

from __future__ import annotations

from typing import Final

from polar_billing.ledger.schema.access import (
    api_key_table,
    budget_table,
    clock_table,
    counter_table,
    hold_table,
    rate_table,
    reply_table,
    running_table,
)
from polar_billing.ledger.schema.base import NO_TENANT, SCHEMA_VERSION, Chained, metadata, subject_of
from polar_billing.ledger.schema.ledger import (
    credit_note_table,
    entry_table,
    head_table,
    link_table,
    statement_table,
    transaction_table,
)
from polar_billing.ledger.schema.promises import alert_table, audit_table, monitor_table, standing_table
from polar_billing.ledger.schema.usage import (
    ROLLUP_KEYS,
    ROLLUP_QUANTITIES,
    in_force_table,
    price_book_table,
    probe_table,
    prune_table,
    pruned_table,
    receipt_table,
    rollup_table,
    usage_table,
    version_table,
)

__all__ = [
    "CHAINED",
    "NO_TENANT",
    "ROLLUP_KEYS",
    "ROLLUP_QUANTITIES",
    "SCHEMA_VERSION",
    "Chained",
    "alert_table",
    "api_key_table",
    "audit_table",
    "budget_table",
    "clock_table",
    "counter_table",
    "credit_note_table",
    "entry_table",
    "head_table",
    "hold_table",
    "in_force_table",
    "link_table",
    "metadata",
    "monitor_table",
    "price_book_table",
    "probe_table",
    "prune_table",
    "pruned_table",
    "rate_table",
    "receipt_table",
    "reply_table",
    "rollup_table",
    "running_table",
    "standing_table",
    "statement_table",
    "subject_of",
    "transaction_table",
    "usage_table",
    "version_table",
]

CHAINED: Final = {
    chained.subject: chained
    for chained in (
        Chained(price_book_table),
        Chained(usage_table, {receipt_table: "usage_seq"}),
        Chained(transaction_table, {entry_table: "transaction_id"}),
        Chained(in_force_table),
        Chained(prune_table, {pruned_table: "prune_id"}),
        Chained(budget_table),
        Chained(statement_table),
        Chained(credit_note_table),
        Chained(api_key_table),
        Chained(audit_table),
        Chained(standing_table),
    )
}
"""Every table whose rows are links of the hash chain, by subject; a ledger is verified over all of them."""
