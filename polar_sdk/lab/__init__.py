"""The laboratory: functions that heal, search, train, calibrate and evaluate a model.

Serving never imports it. The public names are in `__init__.pyi` and load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
