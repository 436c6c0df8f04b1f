"""Statements: what a tenant owes for a period, provable line by line.

* `draft_statement`, `issue_statement`, `issued_statements`
                                        see what it would say, issue it once and for ever, read them back
* `usage_of_line`, `lines_of_usage`     from a line to the usage records, and back
* `recheck`                             compute an issued one again and name every difference; for `polar verify`
* `credit_note`, `credit_notes`         take an amount off an issued one

Inside, arrows point one way: `lines` → `bands`, `charges` (pure rating over a period) → `period_usage`
(summed in the database) → `statement`, `issued` → `draft` → `issue`, `tracing`, `period`.
"""
