"""A day of a messaging service, replayed on this machine: what `polar simulate` does.

Requests of several tenants and tiers arrive as they would during a day, only faster, and run through engine, router,
budgets and ledger: once at full depth and once routed, so that one table has both. The public names are in
`__init__.pyi` and load on first use. This package stands on top of the engine and of billing; nothing imports it but
the command `polar`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
