"""PoLar models for LangChain: `PolarLLM` completes text, `ChatPolar` answers messages.

Names are loaded on first use, so that `import langchain_polar` imports neither LangChain nor torch (the
command `polar` looks into this package for its `demo`). Knows nothing of money: prices come back in the
receipt of the sink.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from langchain_polar.callbacks import (
        CostTotals,
        PolarCall,
        PolarCostCallbackHandler,
        get_polar_cost_callback,
    )
    from langchain_polar.chat_models import ChatPolar
    from langchain_polar.llms import PolarLLM

__all__ = [
    "ChatPolar",
    "CostTotals",
    "PolarCall",
    "PolarCostCallbackHandler",
    "PolarLLM",
    "get_polar_cost_callback",
]

_HOMES: Final = {
    "ChatPolar": "chat_models",
    "CostTotals": "callbacks",
    "PolarCall": "callbacks",
    "PolarCostCallbackHandler": "callbacks",
    "PolarLLM": "llms",
    "get_polar_cost_callback": "callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
