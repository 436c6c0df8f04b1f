"""Budgets and holds: what a tenant, project, user or key may use per window, enforced before compute.

* `budget`         the definition of a budget, pure
* `offers`         the maximum cost of a request's offers, and which fits its budgets, pure
* `counters`       what is spent and held per budget and window
* `holds`          the maximum that a request may use, held before it runs
* `leases`         the holds of this process, renewed while their requests run
* `settlement`     a hold becomes what was used, when the usage record is stored
* `discrepancies`  from holds and counters back to the usage that they represent
* `enforcement`    `Budgets`, which does all of this on a ledger

Nothing is imported here, so that the pure parts load without a database.
"""
