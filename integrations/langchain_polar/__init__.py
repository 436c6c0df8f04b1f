"""PoLar models for LangChain: `PolarLLM` completes text, `ChatPolar` answers messages.

The public names are in `__init__.pyi` and load on first use, so that `import langchain_polar` imports neither LangChain
nor torch (the command `polar` looks into this package for its `demo`). Knows nothing of money: prices come back in the
receipt of the sink.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
