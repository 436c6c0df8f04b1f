"""A row: one sequence with its program, its pages, its counts, and what its loops are doing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from polar_sdk.engine.pages import PageTable
from polar_sdk.engine.work import Work

if TYPE_CHECKING:
    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.lead import Lead
    from polar_sdk.loops import LoopGuard
    from polar_sdk.program import Program

__all__ = ["Row", "extra_visits", "page_slots"]


@dataclass
class Row:
    """One sequence that runs a program."""

    decoder: Decoder
    program: Program
    guard: LoopGuard | None = None
    """What watches the extra visits of loops; None = nobody."""
    lead: Lead | None = None
    """What the program's first layers made of the prompt already; None once it is taken over."""
    work: Work = field(init=False)
    pages: PageTable = field(init=False)
    left_out: set[int] = field(default_factory=set)
    """Places of the program that the next pass leaves out: loops that the guard stopped, and layers that ran ahead."""
    loops_stopped: int = 0
    """Loops that the guard has stopped."""

    def __post_init__(self) -> None:
        self.work = Work(self.decoder.cost, self.program)
        self.pages = PageTable(self.decoder.pool, self.decoder.stores(self.program))
        if self.lead is not None:
            self.work.ahead(self.program.steps[: self.lead.layers], self.lead.tokens)
            self.left_out.update(range(self.lead.layers))

    @property
    def length(self) -> int:
        """Tokens that have been run."""
        return self.pages.length

    def end_lead(self) -> None:
        """From the next pass on, the program runs whole: its lead is taken over, or shall not be kept."""
        if self.lead is not None:
            self.left_out.difference_update(range(self.lead.layers))
            self.lead.release()
            self.lead = None

    def stop_loop(self, place: int) -> None:
        """Leave out this extra visit and those that follow it in the same loop, for the rest of the request."""
        steps = self.program.steps
        end = place
        while end < len(steps) and steps[end] == steps[place]:
            end += 1
        self.left_out.update(range(place, end))
        self.loops_stopped += 1


@lru_cache(maxsize=1024)
def page_slots(program: Program) -> tuple[int, ...]:
    """For each place of a program, which of the row's histories a visit there uses; bridges use none."""
    return tuple(count - 1 for count in accumulate(0 if step.bridge else 1 for step in program.steps))


@lru_cache(maxsize=1024)
def extra_visits(program: Program) -> frozenset[int]:
    """Places that visit the layer that was visited just before: what a guard watches."""
    steps = program.steps
    return frozenset(at for at in range(1, len(steps)) if steps[at] == steps[at - 1] and not steps[at].bridge)
