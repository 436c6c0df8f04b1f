"""Routers: what maps a prompt to a program.

Two kinds need no training: `IdentityRouter` (full depth) and `StaticRouter` (one program for every prompt, named by
hand or picked by `polar scan`).
"""

from polar_sdk.router.base import Route, Router
from polar_sdk.router.fixed import IdentityRouter, StaticRouter, fixed_router

__all__ = ["IdentityRouter", "Route", "Router", "StaticRouter", "fixed_router"]
