"""Metering and billing for PoLar: usage records in, charges and reports out.

`Meter` is the sink that receives the engine's usage records; `Ledger` keeps them; a `PriceBook` has the prices; `rate`
applies it; `usage_rows` and `build_report` answer who used what and what it cost.

The public names are in `__init__.pyi` and load on first use, so importing this package loads neither SQLAlchemy nor any
part of the engine except its errors and the usage record.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
