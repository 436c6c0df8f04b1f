"""What a router is: prompt tokens in, a program and the router's own cost out. Knows no text and no money."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.engine.lead import Lead
    from polar_sdk.programs.program import Program


@dataclass(frozen=True, slots=True)
class Route:
    """A router's answer for one prompt.

    Attributes:
        program: What the prompt runs, fixed for the whole request.
        flops: FLOPs the router itself executed, those of the lead not included.
        lead: What the program's first layers made of the prompt already, since the router reads that; None = nothing.
    """

    program: Program
    flops: int = 0
    lead: Lead | None = None

    def onto(self, program: Program) -> Route:
        """The same reading of the prompt with another program.

        A program that does not begin with the layers of the lead cannot take it over: it was the router's alone then.
        """
        if self.lead is None or self.lead.begins(program):
            return replace(self, program=program)
        return Route(program, self.flops + self.lead.flops)


class Router(ABC):
    """Maps a prompt to a program. Implementations hold no state that a request changes."""

    kind: ClassVar[str]
    """Name of the kind, as it stands in usage records."""
    version: str = "1"
    """Version of the rule or of the trained weights."""

    @abstractmethod
    def route(self, tokens: Sequence[int]) -> Route:
        """Choose the program for one prompt of that many token ids."""
