"""PoLar: run an open-weights LLM by a program over its layers, and record the compute that was actually executed.

The public names are in `__init__.pyi` and load on first use: `import polar_sdk` alone imports neither torch nor
transformers.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

try:
    __version__ = version("polar-llm")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"
