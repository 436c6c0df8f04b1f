"""Imports every module that registers a chained table, so that `CHAINED` is complete.

A module that calls `register_chained` is listed here; a ledger cannot be verified without knowing all its tables.
"""

from __future__ import annotations

from polar_billing import append, postings, price_choices, retention
from polar_billing.budgets import records as budget_records
from polar_billing.chain import CHAINED
from polar_billing.statements import notes, store

__all__ = ["CHAINED", "MODULES"]

MODULES = (append, postings, price_choices, retention, budget_records, store, notes)
