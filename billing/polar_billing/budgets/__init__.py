"""Budgets and holds: what a tenant, project, user or key may use per window, enforced before compute.

`budget` the definition · `choose` which offer fits, pure · `records` rows · `counters` spent and held per window ·
`projection` the same computed from what is stored · `reserve` the most a request may use is held · `settle` a hold
becomes what was used, when its record is stored · `keeper` the whole · `render` for people and programs.
Nothing is imported here, so that the pure parts load without a database.
"""
