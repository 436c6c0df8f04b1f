"""A PoLar model for LlamaIndex: `PolarLLM` completes and chats, runs locally and is metered.

The public names are in `__init__.pyi` and load on first use, so that `import llama_index_polar` imports neither
LlamaIndex nor torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
