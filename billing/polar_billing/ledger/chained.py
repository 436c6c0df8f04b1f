"""Imports every module that registers a chained table, so that `CHAINED` is complete.

A module that calls `register_chained` is listed here; a ledger cannot be verified without knowing all its tables.
"""

from __future__ import annotations

from polar_billing.budgets import holds as budget_records
from polar_billing.ledger import append, postings, retention
from polar_billing.ledger import books as price_choices
from polar_billing.statements import credit_notes, store

MODULES = (append, postings, price_choices, retention, budget_records, store, credit_notes)
