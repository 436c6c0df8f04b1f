"""The ledger's tables, version 3, on one metadata, and the triggers that make them append-only.

`usage` facts and receipts · `chain` the hash chain · `ledger` double entry · `retention` what pruning leaves ·
`rollups` sums by hour · `budgets` budgets and holds · `statements` what was issued · `prices` books in force. A topic
adds a module of its own, which is imported here so that its tables are created with the others. Knows no connection.
"""

from __future__ import annotations

from polar_billing.ledger.schema.base import SCHEMA_VERSION, metadata
from polar_billing.ledger.schema.budgets import budget_table, counter_table, hold_table
from polar_billing.ledger.schema.chain import head_table, link_table
from polar_billing.ledger.schema.ledger import entry_table, transaction_table
from polar_billing.ledger.schema.prices import in_force_table
from polar_billing.ledger.schema.retention import prune_table, pruned_table
from polar_billing.ledger.schema.rollups import rollup_table
from polar_billing.ledger.schema.statements import credit_note_table, statement_table
from polar_billing.ledger.schema.usage import price_book_table, probe_table, receipt_table, usage_table, version_table

__all__ = [
    "SCHEMA_VERSION",
    "budget_table",
    "counter_table",
    "credit_note_table",
    "entry_table",
    "head_table",
    "hold_table",
    "in_force_table",
    "link_table",
    "metadata",
    "price_book_table",
    "probe_table",
    "prune_table",
    "pruned_table",
    "receipt_table",
    "rollup_table",
    "statement_table",
    "transaction_table",
    "usage_table",
    "version_table",
]
