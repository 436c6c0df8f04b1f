"""Statements: what a tenant owes for a period, provable line by line.

* `draft_statement`, `issue_statement`, `issued_statements`
                                        make one, once and for ever, and read them back
* `usage_of_line`, `lines_of_usage`     from a line to the usage records, and back
* `recheck`                             make an issued one again and name every difference; for `polar verify`
* `credit_note`, `credit_notes`         take something off an issued one
* `add_book`                            put a price book, or a revision, in force
* `reprice`                             the same usage under another book

Inside, arrows point one way: `windows` and `lines` → `bands`, `promises`, `charges` (pure rating over a period) →
`facts` (summed usage) → `statement`, `credits`, `store`, `books` → `make` → `issue`, `rechecking`, `trace`,
`repricing`, `notes`; `render` sets, `verification` is what `polar verify` runs.
"""

from __future__ import annotations

from polar_billing.statements.books import add_book
from polar_billing.statements.issue import issue_statement, issued_statements
from polar_billing.statements.lines import Agreement
from polar_billing.statements.make import draft_statement
from polar_billing.statements.notes import CreditNote, credit_note, credit_notes
from polar_billing.statements.rechecking import recheck
from polar_billing.statements.repricing import Repriced, reprice
from polar_billing.statements.statement import Statement, StatementLine
from polar_billing.statements.store import IssuedStatement
from polar_billing.statements.trace import lines_of_usage, usage_of_line

__all__ = [
    "Agreement",
    "CreditNote",
    "IssuedStatement",
    "Repriced",
    "Statement",
    "StatementLine",
    "add_book",
    "credit_note",
    "credit_notes",
    "draft_statement",
    "issue_statement",
    "issued_statements",
    "lines_of_usage",
    "recheck",
    "reprice",
    "usage_of_line",
]
