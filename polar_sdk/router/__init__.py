"""Routers: what maps a prompt to a program.

Four kinds. `identity` (full depth) and `static` (one program for every prompt) need no training. `menu` predicts how
well each of a few whole programs would do and takes the cheapest that is good enough; `policy` says skip, execute or
loop layer by layer. Both are trained, calibrated and saved (`polar train`, `polar calibrate`).

The names below load on first use, so that asking for a fixed router imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polar_sdk.router.base import Route, Router
from polar_sdk.router.fixed import IdentityRouter, StaticRouter, fixed_router

if TYPE_CHECKING:
    from polar_sdk.router.artifact import load_router as load_router
    from polar_sdk.router.artifact import save_router as save_router
    from polar_sdk.router.certificate import Certificate as Certificate
    from polar_sdk.router.layerwise import PolicyRouter as PolicyRouter
    from polar_sdk.router.learned import LearnedRouter as LearnedRouter
    from polar_sdk.router.menu import MenuRouter as MenuRouter

_HOME = {
    "Certificate": "certificate",
    "LearnedRouter": "learned",
    "MenuRouter": "menu",
    "PolicyRouter": "layerwise",
    "load_router": "artifact",
    "save_router": "artifact",
}

__all__ = [
    "Certificate",
    "IdentityRouter",
    "LearnedRouter",
    "MenuRouter",
    "PolicyRouter",
    "Route",
    "Router",
    "StaticRouter",
    "fixed_router",
    "load_router",
    "save_router",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polar_sdk.router' has no attribute {name!r}")
    return getattr(import_module(f"polar_sdk.router.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
