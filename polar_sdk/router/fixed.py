"""Routers that give every prompt the same program, at no cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from polar_sdk.engine.route import Route
from polar_sdk.programs.program import Program
from polar_sdk.router.base import Router

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class StaticRouter(Router):
    """One program, named by hand or picked by a scan."""

    kind: ClassVar[str] = "static"

    def __init__(self, program: Program | str | Iterable[int]) -> None:
        self._route = Route(Program.of(program))

    @property
    def program(self) -> Program:
        """The program every prompt runs."""
        return self._route.program

    def route(self, tokens: Sequence[int]) -> Route:
        """Return the one program."""
        return self._route


class IdentityRouter(StaticRouter):
    """Every layer once."""

    kind: ClassVar[str] = "identity"

    def __init__(self, depth: int) -> None:
        super().__init__(Program.identity(depth))


def fixed_router(program: Program, depth: int) -> Router:
    """The router of a program that was fixed before the prompt was read."""
    return IdentityRouter(depth) if program.is_identity(depth) else StaticRouter(program)
