"""A row: one sequence with its program, its pages and the state of its loops. Knows no requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from polar_sdk.engine.pages import PageTable
from polar_sdk.engine.work import Work
from polar_sdk.programs.cost import Piece

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.programs.cost import Segment
    from polar_sdk.programs.policy import LoopGuard
    from polar_sdk.programs.program import Program


@dataclass
class Row:
    """One sequence that runs a program."""

    decoder: Decoder
    program: Program
    guard: LoopGuard | None = None
    """Watches the extra visits of loops; None = nothing does."""
    prompt: int | None = None
    """Number of tokens of the prompt, which says who is filled; None = all tokens of the first pass."""
    work: Work = field(init=False)
    page_table: PageTable = field(init=False)
    left_out: set[int] = field(default_factory=set)
    """Places of the program that the next pass leaves out: loops that the guard stopped."""
    loops_stopped: int = 0
    """Number of loops that the guard has stopped."""
    drafted: int = 0
    """Number of tokens of the pass under way that are drafted: its last ones."""
    breached: bool = False
    """Whether a guard objected to a token of the last pass with drafts, which then counts for nothing."""
    ran: int = 0
    """Number of tokens that had run when the row last gave its pages up; they run again before it goes on."""
    _replay: _Replay | None = None
    _states: tuple[Tensor, slice] | None = None

    def __post_init__(self) -> None:
        self.work = Work(self.decoder.cost, self.program)
        self.page_table = PageTable(self.decoder.pool, self.decoder.stores(self.program))
        self._stops: list[tuple[int, range]] = []
        """Loops that the guard stopped: number of tokens that had run by then, and places that no later token runs."""
        self._replayed_flops = 0

    @property
    def length(self) -> int:
        """Number of tokens that have been run."""
        return self.page_table.length

    @property
    def states(self) -> Tensor | None:
        """Before the final norm, of the tokens of the last pass whose logits were computed, (T, E).

        None if nobody reads them, since the model has no draft head, and where none of these tokens was kept.
        """
        return None if self._states is None else self._states[0][self._states[1]]

    def keep_states(self, states: Tensor, start: int, end: int) -> None:
        """Take the states of its tokens, from `start` to `end` among those of all rows of a pass, (N, E)."""
        self._states = states, slice(start, end)

    def keep_state(self, token: int) -> None:
        """Keep the state of this token alone, the last of the pass that was kept; −1 = none."""
        if self._states is not None:
            states, own = self._states
            self._states = (states, slice(own.start + token, own.start + token + 1)) if token >= 0 else None

    @property
    def independent(self) -> bool:
        """Whether it decodes the same, to the bit, whatever is beside it and however many tokens run at a time."""
        return self.decoder.kernels.independent and not self.program.bridges

    def piece(self, new: int, wanted: int | None) -> Piece:
        """The next pass, with that many new tokens, the last `wanted` of which are wanted; None = all of them."""
        end = self.length + new
        if self.prompt is None:
            self.prompt = end
        return Piece(self.length, end, self.prompt, end - (new if wanted is None else wanted))

    def stop_loop(self, place: int) -> None:
        """Leave out this extra visit and those that follow it in the same loop, for the rest of the request."""
        steps = self.program.steps
        end = place
        while end < len(steps) and steps[end] == steps[place]:
            end += 1
        self.left_out.update(range(place, end))
        self._stops.append((self.length, range(place, end)))
        self.loops_stopped += 1

    # -- running again what has run, for a row that gave its pages up ------------------------------------------------

    @property
    def replaying(self) -> bool:
        """Whether tokens that have run must run again, because their keys and values are gone."""
        return self._replay is not None

    @property
    def replay_end(self) -> int:
        """How far the next pass of a replay may go: to where it ends, or to where the guard stopped a loop."""
        return min([self.ran, *(start for start, _ in self._stops if start > self.length)])

    @property
    def metered(self) -> Work:
        """The work that counts for the request: that of each token once."""
        return self.work if self._replay is None else self._replay.work

    @property
    def executed(self) -> int:
        """FLOPs of everything that ran, replays included, which `work` leaves out once they are over."""
        return self._replayed_flops + self.work.executed + (self._replay.work.executed if self._replay else 0)

    def drop_pages(self) -> None:
        """Give the pages up. What has run must run again, with the same loops stopped at the same tokens.

        Until then `work` counts apart from what is metered: a usage record contains every token's run once.
        """
        self.ran = max(self.ran, self.length)
        self.page_table.release()
        if self._replay is not None:
            self._replayed_flops += self.work.executed
            self.work = Work(self.decoder.cost, self.program)
        elif self.ran:
            self._replay = _Replay(self.work, self.guard)
            self.work, self.guard = Work(self.decoder.cost, self.program), None
        self.note_replay()

    def note_replay(self) -> None:
        """The row has moved on, or back to its beginning: prepare the next pass of a replay, or end the replay."""
        if self._replay is None:
            return
        if self.length == self.ran:
            self.end_replay()
        self.left_out = {place for start, places in self._stops if start <= self.length for place in places}

    def end_replay(self) -> None:
        """Go on to count what is metered: the replay is over, or the row will not go on."""
        if self._replay is not None:
            self._replayed_flops += self.work.executed
            self.work, self.guard = self._replay
            self._replay = None


class _Replay(NamedTuple):
    """Put aside while a row runs again what has run."""

    work: Work
    guard: LoopGuard | None


@lru_cache(maxsize=1024)
def page_slots(program: Program) -> tuple[int, ...]:
    """For each place of a program, which of the row's histories a visit there uses; bridges use none."""
    return tuple(count - 1 for count in accumulate(0 if step.bridge else 1 for step in program.steps))


@lru_cache(maxsize=1024)
def last_visit(program: Program) -> int:
    """Place of a program's last visit."""
    return program.last_visit


@lru_cache(maxsize=1024)
def fill_entries(program: Program) -> Mapping[int, Segment]:
    """The filled segments of a program, each at the place of its first visit."""
    places = [place for place, step in enumerate(program.steps) if step.begins_segment]
    return dict(zip(places, program.fills, strict=True))


@lru_cache(maxsize=1024)
def extra_visits(program: Program) -> frozenset[int]:
    """Places that visit the layer that was visited just before: what a guard watches."""
    steps = program.steps
    return frozenset(
        place for place in range(1, len(steps)) if steps[place] == steps[place - 1] and not steps[place].bridge
    )
