"""The route of a prompt: the program that a router chose, and the lead that it ran to choose it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polar_sdk.engine.lead import Lead
    from polar_sdk.programs.program import Program


@dataclass(frozen=True, slots=True)
class Route:
    """A router's answer for one prompt.

    Attributes:
        program: What the prompt runs, fixed for the whole request.
        flops: FLOPs that the router itself executed; those of the lead are not included.
        lead: What the program's first layers have already made of the prompt, because the router reads it; None where
            it reads no layers.
    """

    program: Program
    flops: int = 0
    lead: Lead | None = None

    def onto(self, program: Program) -> Route:
        """The same route with another program.

        A program that does not begin with the layers of the lead cannot take it over; the lead then counts as the
        router's work.
        """
        if self.lead is None or self.lead.begins(program):
            return replace(self, program=program)
        return Route(program, self.flops + self.lead.flops)
