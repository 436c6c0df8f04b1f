"""A PoLar model for LlamaIndex: `PolarLLM` completes and chats, runs here and is metered.

The name is loaded on first use, so that `import llama_index_polar` imports neither LlamaIndex nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from llama_index_polar.llm import PolarLLM

__all__ = ["PolarLLM"]

_HOMES: Final = {"PolarLLM": "llm"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
