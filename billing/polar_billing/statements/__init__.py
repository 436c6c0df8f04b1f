"""Statements: what a tenant owes for a period, provable line by line.

* `draft_statement`, `issue_statement`, `issued_statements`
                                        compute a draft, issue it permanently, read issued ones back
* `usage_of_line`, `lines_of_usage`     from a line to the usage records, and back
* `recheck`                             recompute an issued one and name every difference; for `polar verify`
* `credit_note`, `credit_notes`         credit an amount on an issued one, read credit notes back

Inside, arrows point one way: `lines` → `bands`, `charges` (pure rating over a period) → `period_usage`
(summed in the database) → `statement`, `issued`, `books` → `retention` → `draft` → `issue`, `tracing`, `period`.
"""
