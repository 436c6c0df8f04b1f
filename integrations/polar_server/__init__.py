"""One OpenAI-compatible API in front of the engine: `build(settings)` makes the ASGI app that `polar serve` runs.

The public names are in `__init__.pyi` and load on first use. Depends on `polar_sdk` alone: where usage goes and who
holds keys is found through entry points. Knows nothing of money: prices come back in the receipt of the sink.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
