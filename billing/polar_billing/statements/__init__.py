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
