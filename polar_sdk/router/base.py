"""A router: prompt tokens in, a program and the router's own cost out; and the two that read no prompt.

Knows no text and no money.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_sdk.promises.novelty import Likeness


class Route(NamedTuple):
    """A router's answer for one prompt."""

    program: Program
    """The layers that the whole request runs."""
    flops: int = 0
    """FLOPs that the router itself executed."""
    likeness: Likeness | None = None
    """How similar the prompt is to those that the router knows; None if it reads none."""


class Router(ABC):
    """Maps a prompt to a program. Implementations hold no state that a request changes."""

    kind: ClassVar[str]
    """Name of the kind, as usage records show it."""
    version: str = "1"
    """Version of the rule or of the trained weights."""

    @abstractmethod
    def route(self, tokens: Sequence[int]) -> Route:
        """Choose the program for one prompt, given as token ids."""


class StaticRouter(Router):
    """One program, named by hand or by a policy."""

    kind: ClassVar[str] = "static"

    def __init__(self, program: Program | str | Iterable[int]) -> None:
        self.program = Program.of(program)
        """The program that every prompt runs."""

    def route(self, tokens: Sequence[int]) -> Route:
        """Return the one program."""
        return Route(self.program)


class IdentityRouter(StaticRouter):
    """Every layer once."""

    kind: ClassVar[str] = "identity"

    def __init__(self, depth: int) -> None:
        super().__init__(Program.identity(depth))


def fixed_router(program: Program, depth: int) -> Router:
    """The router of a program that was fixed before the prompt was read."""
    return IdentityRouter(depth) if program.is_identity(depth) else StaticRouter(program)
