"""The layout of one pass: in which turns rows share layers, and where each packed token has its row, position and page.

Rows with different programs share the layers of a pass in *turns*. Who takes part in which turn depends on the programs
alone: that is a *plan*, kept from pass to pass. What depends on the pass is built once, for all turns together, so that
a turn needs little work that grows with the number of rows. Pure: indices in, indices out.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.row import extra_visits, page_slots

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.row import Row
    from polar_sdk.programs.program import Program, Step


class Turn(NamedTuple):
    """One step, run once for some of the rows."""

    step: Step
    members: tuple[tuple[int, int], ...]
    """(row, place): the row's index, and the position of the step in that row's program."""


@lru_cache(maxsize=64)
def schedule(programs: tuple[Program, ...]) -> tuple[Turn, ...]:
    """Merge programs so that a layer's weights are read once for all rows that need it next.

    Rows that loop wait for none, and rows with the same program stay together throughout. Every row runs its program in
    its own order. Cached, since rows decode together for long.
    """
    return tuple(_turns(programs))


def _turns(programs: Sequence[Program]) -> Iterator[Turn]:
    if all(program == programs[0] for program in programs):
        rows = range(len(programs))
        yield from (Turn(step, tuple((row, place) for row in rows)) for place, step in enumerate(programs[0].steps))
        return
    # Scan order: always the lowest step (by layer) that any row needs next, run for all rows that need exactly it.
    #     row 0: 0 1 2 3        turns: 0 (both) · 1 (row 0) · 2 (both) · 2 (row 1) · 3 (both)
    #     row 1: 0 2 2 3        A row waits at a layer until those behind it have come up to it.
    places = [0] * len(programs)
    while following := {
        row: program.steps[places[row]] for row, program in enumerate(programs) if places[row] < len(program)
    }:
        step = min(following.values())
        members = tuple((row, places[row]) for row, next_step in following.items() if next_step == step)
        for row, _ in members:
            places[row] += 1
        yield Turn(step, members)


class Plan(NamedTuple):
    """The turns of rows with certain programs; members of all turns stand one after another."""

    turns: tuple[Turn, ...]
    rows: Tensor
    """Row of each member."""
    visits: Tensor
    """For each member, which of its row's histories the visit uses."""


@lru_cache(maxsize=64)
def plan_of(programs: tuple[Program, ...], device: torch.device) -> Plan:
    """The plan of rows with these programs."""
    turns = schedule(programs)
    members = [member for turn in turns for member in turn.members]
    slots = [page_slots(program) for program in programs]
    return Plan(
        turns,
        torch.tensor([row for row, _ in members], device=device),
        torch.tensor([slots[row][place] for row, place in members], device=device),
    )


class Layout:
    """The packed tokens of a pass.

    Attributes:
        tokens: Token ids, (N,).
        positions: Position of each token in its row, (N,).
        counts: Number of new tokens of each row.
        single: Whether every row has one token.
        guarded: Whether any row has loops that are watched.
        longest: Length of the longest row after the pass. Unit: tokens.
    """

    def __init__(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]], device: torch.device) -> None:
        self.rows, self.device = rows, device
        self._new_tokens = tokens
        self._by_device = {device: self}
        self.plan = plan_of(tuple(row.program for row in rows), device)
        self.counts = [len(new) for new in tokens]
        self.starts = [sum(self.counts[:row]) for row in range(len(rows))]
        self.single = all(count == 1 for count in self.counts)
        self.guarded = any(row.guard is not None and extra_visits(row.program) for row in rows)
        self.longest = max(row.length + count for row, count in zip(rows, self.counts, strict=True))
        self.tokens = torch.tensor([token for new in tokens for token in new], device=device)
        positions = [
            position for row, count in zip(rows, self.counts, strict=True) for position in _span(row.length, count)
        ]
        self.positions = torch.tensor(positions, device=device)
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def on(self, device: torch.device) -> Layout:
        """The same pass, laid out on another device; built when it is first needed."""
        if device not in self._by_device:
            other = Layout(self.rows, self._new_tokens, device)
            other._by_device = self._by_device
            self._by_device[device] = other
        return self._by_device[device]

    def members(self, devices: Sequence[torch.device]) -> Iterator[Members]:
        """The rows that take part in each turn, without those that leave it out; turns without rows are dropped.

        Args:
            devices: Of each layer; a turn's members are laid out on the device of its layer.
        """
        start = 0
        for turn in self.plan.turns:
            span = slice(start, start + len(turn.members))
            going = [index for index, (row, place) in enumerate(turn.members) if place not in self.rows[row].left_out]
            if going:
                layout = self.on(devices[turn.step.first])
                yield Members(layout, turn, span, None if len(going) == len(turn.members) else going)
            start = span.stop

    @cached_property
    def owners(self) -> Tensor:
        """Row of each token, (N,)."""
        rows = [row for row, count in enumerate(self.counts) for _ in range(count)]
        return torch.tensor(rows, device=self.device)

    @cached_property
    def tables(self) -> Tensor:
        """Place in its store of the page of each visit, row and block, (visits, B, blocks); 0 where there is none."""
        blocks = -(-self.longest // PAGE)
        visits = max(row.page_table.visits for row in self.rows)
        table = torch.zeros((len(self.rows), blocks, visits), dtype=torch.long)
        for index, row in enumerate(self.rows):
            places = row.page_table.places(blocks)
            table[index, : places.shape[0], : places.shape[1]] = places
        return table.permute(2, 0, 1).contiguous().to(self.device)

    @cached_property
    def member_tables(self) -> Tensor:
        """Pages of every member of every turn, in order, (members, blocks)."""
        return self.tables[self.plan.visits, self.plan.rows]

    @cached_property
    def member_positions(self) -> Tensor:
        """Position of the token of every member of every turn, where each row has one."""
        return self.positions[self.plan.rows]

    def index(self, rows: tuple[int, ...]) -> Tensor:
        """Places of some rows' tokens among the packed ones."""
        if rows not in self._indices:
            places = [place for row in rows for place in _span(self.starts[row], self.counts[row])]
            self._indices[rows] = torch.tensor(places, device=self.device)
        return self._indices[rows]


class Members:
    """The rows that take part in one turn.

    Args:
        layout: Of the pass.
        turn: The step, and the rows that it was planned for.
        span: Where those stand in the plan.
        kept: Which of them take part; None = all.
    """

    def __init__(self, layout: Layout, turn: Turn, span: slice, kept: list[int] | None) -> None:
        self.layout, self.step, self._span, self._kept = layout, turn.step, span, kept
        self.going = turn.members if kept is None else [turn.members[index] for index in kept]
        """(row, place in its program)."""

    @property
    def single(self) -> bool:
        """Whether every row has one token."""
        return self.layout.single

    @cached_property
    def index(self) -> Tensor | None:
        """Places of the members' tokens among the packed ones; None = all."""
        if len(self.going) == len(self.layout.rows):
            return None
        if self.single:
            return self._of_members(self.layout.plan.rows)
        return self.layout.index(tuple(row for row, _ in self.going))

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token in its row, (N,)."""
        if self.single:
            return self._of_members(self.layout.member_positions)
        return self._of_tokens(self.layout.positions)

    @property
    def table(self) -> Tensor:
        """Pages of each row in order, (B, blocks); each row has one token."""
        return self._of_members(self.layout.member_tables)

    @property
    def token_offsets(self) -> Tensor:
        """Place of each token within its page, (N,)."""
        return self.positions % PAGE

    @property
    def token_pages(self) -> Tensor:
        """Page of each token, (N,)."""
        counts = [self.layout.counts[row] for row, _ in self.going]
        repeats = torch.tensor(counts, device=self.layout.device)
        # With the size of the output given, the device need not be waited for.
        visits = self._of_members(self.layout.plan.visits).repeat_interleave(repeats, output_size=sum(counts))
        return self.layout.tables[visits, self._of_tokens(self.layout.owners), self.positions // PAGE]

    @property
    def places(self) -> list[tuple[Row, int, slice]]:
        """(row, place in its program, its tokens among the members')."""
        places, start = [], 0
        for row, place in self.going:
            end = start + self.layout.counts[row]
            places.append((self.layout.rows[row], place, slice(start, end)))
            start = end
        return places

    @property
    def spans(self) -> list[tuple[Row, int, slice]]:
        """(row, history, its tokens among the members')."""
        return [(row, page_slots(row.program)[place], span) for row, place, span in self.places]

    def _of_members(self, values: Tensor) -> Tensor:
        """Of values for every member of every turn, those of this turn."""
        values = values[self._span]
        return values if self._kept is None else values[self._kept]

    def _of_tokens(self, values: Tensor) -> Tensor:
        """Of values for every token, the members'."""
        return values if self.index is None else values[self.index]


def _span(start: int, count: int) -> range:
    return range(start, start + count)
