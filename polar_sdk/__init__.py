"""PoLar: run an open-weights LLM by a program over its layers, and record the compute that was really executed.

The names below load on first use: `import polar_sdk` alone imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polar_sdk.errors import PolarError as PolarError
    from polar_sdk.generation import Chunk as Chunk
    from polar_sdk.generation import Generation as Generation
    from polar_sdk.generation import TokenLogprobs as TokenLogprobs
    from polar_sdk.model import PolarModel as PolarModel
    from polar_sdk.policy import Policy as Policy
    from polar_sdk.policy import Tier as Tier
    from polar_sdk.program import Program as Program
    from polar_sdk.router import IdentityRouter as IdentityRouter
    from polar_sdk.router import MenuRouter as MenuRouter
    from polar_sdk.router import PolicyRouter as PolicyRouter
    from polar_sdk.router import Router as Router
    from polar_sdk.router import StaticRouter as StaticRouter
    from polar_sdk.sinks import JsonlSink as JsonlSink
    from polar_sdk.usage import ListSink as ListSink
    from polar_sdk.usage import NullSink as NullSink
    from polar_sdk.usage import UsageRecord as UsageRecord
    from polar_sdk.usage import UsageSink as UsageSink

_HOME = {
    "Chunk": "generation",
    "Generation": "generation",
    "IdentityRouter": "router",
    "JsonlSink": "sinks",
    "MenuRouter": "router",
    "ListSink": "usage",
    "NullSink": "usage",
    "PolarError": "errors",
    "PolarModel": "model",
    "Policy": "policy",
    "PolicyRouter": "router",
    "Program": "program",
    "Router": "router",
    "StaticRouter": "router",
    "Tier": "policy",
    "TokenLogprobs": "generation",
    "UsageRecord": "usage",
    "UsageSink": "usage",
}

__all__ = [  # noqa: PLE0604  (built from the table above, and checked by a test)
    *_HOME,
]

try:
    __version__ = version("polar-llm")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polar_sdk' has no attribute {name!r}; public names: {', '.join(sorted(_HOME))}")
    return getattr(import_module(f"polar_sdk.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
