"""The layout of one pass: in which turns rows share layers, and where each packed token has its row, position and page.

Rows with different programs share the layers of a pass in *turns*. Which rows take part in which turn depends only on
the programs: that is a *plan*, kept from pass to pass. What depends on the pass is built once, for all turns together,
so that a turn does little work that grows with the number of rows. Not every token of a prompt runs every layer:
`cost.Piece` states which do, and turns with the same tokens share their layout. Pure: indices in, indices out.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from polar_sdk.engine.attention import added_mask
from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.row import extra_visits, fill_entries, last_visit, page_slots
from polar_sdk.programs.cost import Parts, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.row import Row
    from polar_sdk.engine.types import Rotary
    from polar_sdk.programs.cost import Piece, Segment
    from polar_sdk.programs.program import Program, Step


MAX_PAGED: Final = 16
"""Number of tokens of one row up to which each of them attends over the row's pages by itself, where kernels can: the
last ones of a prompt, its first, and drafts."""
Range = tuple[int, int, int]
"""Tokens of one row: its index, the position of the first one, and that after the last one."""


class Turn(NamedTuple):
    """One step, run once for some of the rows."""

    step: Step
    """The step; whether it is filled for some of a row's tokens is up to the row's program."""
    members: tuple[tuple[int, int], ...]
    """(row, place): the row's index, and the position of the step in that row's program."""


@lru_cache(maxsize=64)
def schedule(programs: tuple[Program, ...]) -> tuple[Turn, ...]:
    """Merge programs so that a layer's weights are read once for all rows that need it next.

    Rows that loop wait for none, and rows with the same program stay together throughout. Every row runs its program in
    its own order. Cached, since rows decode together for long.
    """
    return tuple(_turns([tuple(step.unfilled for step in program) for program in programs]))


def _turns(programs: Sequence[tuple[Step, ...]]) -> Iterator[Turn]:
    if all(steps == programs[0] for steps in programs):
        rows = range(len(programs))
        yield from (Turn(step, tuple((row, place) for row in rows)) for place, step in enumerate(programs[0]))
        return
    # Scan order: always the lowest step (by layer) that any row needs next, run for all rows that need exactly it.
    #     row 0: 0 1 2 3        turns: 0 (both) · 1 (row 0) · 2 (both) · 2 (row 1) · 3 (both)
    #     row 1: 0 2 2 3        A row waits at a layer until those behind it have come up to it.
    places = [0] * len(programs)
    while following := {row: steps[places[row]] for row, steps in enumerate(programs) if places[row] < len(steps)}:
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
    bounds: Tensor
    """The first member of each turn, and the end of those of the last one."""
    layers: Tensor | None
    """The layer of each turn; None if a turn is not one layer, run whole."""


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
        torch.tensor(list(accumulate((len(turn.members) for turn in turns), initial=0))),
        torch.tensor([turn.step.first for turn in turns]) if all(turn.step.plain for turn in turns) else None,
    )


class Layout:
    """The packed tokens of a pass.

    Attributes:
        rows: Of the pass.
        pieces: The new tokens of each row, and which of them are wanted.
        tokens: Token ids, (N,).
        positions: Position of each token in its row, (N,).
        counts: Number of new tokens of each row.
        chunks: The pieces, with the tokens of the same chunk of a prompt that had run before.
        whole: Whether every token takes every step of its row's program whole.
        single: Whether, besides, every chunk has one token.
        few: Whether, besides, every chunk has so few that each of them can attend by itself.
        guarded: Whether any row has loops that are watched.
        longest: Length of the longest row after the pass. Unit: tokens.
    """

    def __init__(
        self, rows: Sequence[Row], pieces: Sequence[Piece], tokens: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        self.rows, self.pieces, self.device = rows, pieces, device
        self._new_tokens = tokens
        self._by_device = {device: self}
        self.plan = plan_of(tuple(row.program for row in rows), device)
        self.counts = [len(new) for new in tokens]
        self.starts = [sum(self.counts[:row]) for row in range(len(rows))]
        self.whole = all(piece.runs_whole(row.program) for row, piece in zip(rows, pieces, strict=True))
        self.chunks = [piece.chunk for piece in pieces]
        longest = max(chunk.end - chunk.start for chunk in self.chunks)
        self.single, self.few = self.whole and longest == 1, self.whole and longest <= MAX_PAGED
        self.guarded = any(row.guard is not None and extra_visits(row.program) for row in rows)
        self.longest = max(piece.end for piece in pieces)
        self.tokens = torch.tensor([token for new in tokens for token in new], device=device)
        positions = [position for piece in pieces for position in range(piece.start, piece.end)]
        self.positions = torch.tensor(positions, device=device)
        self._some: dict[tuple[Range, ...], Tokens] = {}
        self._bands: dict[tuple[int, ...], tuple[Band, ...]] = {}

    def on(self, device: torch.device) -> Layout:
        """The same pass, laid out on another device; built when it is first needed."""
        if device not in self._by_device:
            other = Layout(self.rows, self.pieces, self._new_tokens, device)
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
        """Place in its store of the page of each visit, row and block, (visits, B, blocks).

        Blocks that a row does not have name its first page, so that it never meets numbers of another row, nan among
        them, not even with weight 0.
        """
        places = tuple(row.page_table.places for row in self.rows)
        return _tables(places, -(-self.longest // PAGE)).to(self.device)

    @cached_property
    def _member_rows(self) -> list[int]:
        return [row for turn in self.plan.turns for row, _ in turn.members]

    @cached_property
    def member_bounds(self) -> Sequence[int]:
        """The first token of each member of every turn among those of all, and the end of the last one's."""
        if self.single:
            return range(len(self.plan.rows) + 1)
        return list(accumulate((self.counts[row] for row in self._member_rows), initial=0))

    @property
    def turn_bounds(self) -> Tensor:
        """The first token of each turn among those of all, and the end of the last one's."""
        bounds = self.plan.bounds
        return bounds if self.single else torch.tensor(self.member_bounds)[bounds]

    @cached_property
    def member_tokens(self) -> Tensor:
        """Places among the packed tokens of those of every member of every turn, in order."""
        if self.single:
            return self.plan.rows
        spans = ((self.starts[row], self.counts[row]) for row in self._member_rows)
        return torch.tensor([place for start, count in spans for place in range(start, start + count)]).to(self.device)

    @cached_property
    def member_tables(self) -> Tensor:
        """Pages of the row of each of these tokens, in order, (tokens, blocks)."""
        if self.single:
            return _of_members(self.tables, self.plan.visits, self.plan.rows)
        # Not `repeat_interleave`, which wakes torch's threads, and they spin on while the library's own share a layer.
        members = [member for member, row in enumerate(self._member_rows) for _ in range(self.counts[row])]
        visits = self.plan.visits[torch.tensor(members).to(self.device)]
        return self.tables[visits, self.owners[self.member_tokens]]

    @cached_property
    def member_positions(self) -> Tensor:
        """Position of each of these tokens."""
        return self.positions[self.member_tokens]

    @cached_property
    def member_pages(self) -> Tensor:
        """Page of the token of every member of every turn, where each row has one."""
        return self.member_tables.gather(1, (self.member_positions // PAGE)[:, None])[:, 0]

    @cached_property
    def member_offsets(self) -> Tensor:
        """Place of the same within its page."""
        return self.member_positions % PAGE

    def bands(self, rows: tuple[int, ...]) -> tuple[Band, ...]:
        """These rows, of one token each, those of similar length together; the same objects when asked again."""
        if rows not in self._bands:
            places: dict[int, list[int]] = {}
            for place, row in enumerate(rows):
                blocks = -(-self.pieces[row].end // PAGE)
                places.setdefault(max(blocks - 1, 1).bit_length(), []).append(place)
            self._bands[rows] = tuple(Band(self, rows, each) for each in places.values())
        return self._bands[rows]

    def some(self, ranges: Iterable[Range]) -> Tokens:
        """Some of the tokens; asked for again, the same object."""
        key = tuple(ranges)
        if key not in self._some:
            self._some[key] = Tokens(self, key)
        return self._some[key]

    @cached_property
    def all(self) -> Tokens:
        """All tokens."""
        return self.some((row, piece.start, piece.end) for row, piece in enumerate(self.pieces))


# Rows that decode together have the same pages for up to 64 tokens, and then the same tensors of them.
@lru_cache(maxsize=16)
def _tables(places: tuple[Tensor, ...], blocks: int) -> Tensor:
    """The tables of rows, from `PageTable.places` of each, (visits, B, blocks)."""
    visits = max(each.shape[1] for each in places)
    table = torch.zeros((len(places), blocks, visits), dtype=torch.long)
    for index, each in enumerate(places):
        own = each[:blocks]
        table[index, :, : own.shape[1]] = own[0]
        table[index, : own.shape[0], : own.shape[1]] = own
    return table.permute(2, 0, 1).contiguous()


@lru_cache(maxsize=16)
def _of_members(tables: Tensor, visits: Tensor, rows: Tensor) -> Tensor:
    """Select from tables (visits, B, blocks) those of some visits of some rows, (members, blocks)."""
    return tables[visits, rows]


class Tokens:
    """Some of the tokens of a pass, in the order in which they are packed.

    Attributes:
        ranges: Which.
        count: How many, M.
    """

    def __init__(self, layout: Layout, ranges: tuple[Range, ...]) -> None:
        self._layout, self.ranges = layout, ranges
        self.count = sum(end - start for _, start, end in ranges)
        self._rotary: list[Rotary] | None = None

    @cached_property
    def index(self) -> Tensor | None:
        """Their places among the packed ones, (M,); None = all."""
        layout = self._layout
        if self.count == len(layout.tokens):
            return None
        shifts = [layout.starts[row] - layout.pieces[row].start for row, _, _ in self.ranges]
        places = [
            place
            for shift, (_, start, end) in zip(shifts, self.ranges, strict=True)
            for place in range(start + shift, end + shift)
        ]
        return torch.tensor(places, device=layout.device)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each in its row, (M,)."""
        return self.of(self._layout.positions)

    @cached_property
    def owners(self) -> Tensor:
        """Row of each, (M,)."""
        return self.of(self._layout.owners)

    @cached_property
    def offsets(self) -> Tensor:
        """Place of each within its page, (M,)."""
        return self.positions % PAGE

    def of(self, values: Tensor) -> Tensor:
        """Select theirs, (M, …), from values for all packed tokens, (N, …)."""
        return values if self.index is None else values.index_select(0, self.index)

    def rotary(self, at: Callable[[Tensor, int], list[Rotary]]) -> list[Rotary]:
        """Their angles, which `Decoder.rotary` looks up once."""
        if self._rotary is None:
            self._rotary = at(self.positions, self._layout.longest)
        return self._rotary

    def tables(self, visits: Sequence[int]) -> Tensor:
        """Pages of the row of each, in order, (M, blocks), where each row's history is the one in `visits`."""
        return self._layout.tables[self._visits(visits), self.owners]

    def pages(self, visits: Sequence[int]) -> Tensor:
        """Page of each, (M,)."""
        return self._layout.tables[self._visits(visits), self.owners, self.positions // PAGE]

    def _visits(self, visits: Sequence[int]) -> Tensor:
        return torch.tensor(visits, device=self._layout.device)[self.owners]


class Band:
    """Rows with one token each whose histories are of similar length, so that they are read together.

    Lengths are within a factor of two, or up to two pages. So of what is read at most half is nobody's.

    Attributes:
        places: Of the band's rows among the members of a turn, (M,); None = all members.
        longest: Tokens of the longest history, the new one included.
        blocks: Pages of the same.
    """

    def __init__(self, layout: Layout, rows: Sequence[int], places: Sequence[int]) -> None:
        self.lengths = [layout.pieces[rows[place]].end for place in places]
        self.longest = max(self.lengths)
        self.blocks = -(-self.longest // PAGE)
        self.places = None if len(places) == len(rows) else torch.tensor(places, device=layout.device)
        self._device = layout.device
        self._masks: dict[int | None, Tensor | None] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The mask that `attend_rows` adds, made once for all layers with this window; None = every key is seen."""
        if window not in self._masks:
            seen = self._seen(window)
            self._masks[window] = None if seen is None else added_mask(seen, dtype)
        return self._masks[window]

    def _seen(self, window: int | None) -> Tensor | None:
        """Which keys each row sees, (M, longest); None = all."""
        if min(self.lengths) == self.longest and (window is None or window >= self.longest):
            return None
        positions = torch.arange(self.longest, device=self._device)
        distance = torch.tensor(self.lengths, device=self._device)[:, None] - 1 - positions
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)

    def of(self, values: Tensor) -> Tensor:
        """Select those of the band from values for all members, (…)."""
        return values if self.places is None else values.index_select(0, self.places)


class Spot(NamedTuple):
    """The tokens of one row among those that run a turn."""

    row: Row
    place: int
    """Place of the step in the row's program."""
    visit: int
    """Which of the row's histories the visit uses."""
    ranges: tuple[tuple[int, int], ...]
    """Positions of the tokens."""
    span: slice
    """Their places among the turn's tokens."""
    end: int
    """Position after the row's last new token."""

    @property
    def is_suffix(self) -> bool:
        """Whether the tokens are the row's last ones, without a gap."""
        return len(self.ranges) == 1 and self.ranges[0][1] == self.end


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
        """Whether every row has one token, which runs."""
        return self.layout.single

    @property
    def few(self) -> bool:
        """Whether every row has few tokens, all of which run; then the next four say which."""
        return self.layout.few

    @property
    def count(self) -> int:
        """How many tokens that is."""
        return sum(self.layout.counts[row] for row, _ in self.going)

    @cached_property
    def index(self) -> Tensor | None:
        """Places of their tokens among the packed ones, (M,); None = all."""
        return None if len(self.going) == len(self.layout.rows) else self._of_members(self.layout.member_tokens)

    @property
    def positions(self) -> Tensor:
        """Position of each, (M,)."""
        return self._of_members(self.layout.member_positions)

    @property
    def table(self) -> Tensor:
        """Pages of the row of each in order, (M, blocks)."""
        return self._of_members(self.layout.member_tables)

    @property
    def pages(self) -> Tensor:
        """The page of each token, (M,), if every row has one."""
        return self._of_members(self.layout.member_pages)

    @property
    def offsets(self) -> Tensor:
        """The place of each token within its page, (M,), if every row has one."""
        return self._of_members(self.layout.member_offsets)

    @property
    def bands(self) -> tuple[Band, ...]:
        """The rows, those of similar length together, if every row has one token."""
        return self.layout.bands(tuple(row for row, _ in self.going))

    @cached_property
    def _parts(self) -> list[tuple[int, Parts]]:
        """(row, what its tokens do)."""
        rows, pieces, whole = self.layout.rows, self.layout.pieces, self.layout.whole
        return [
            (row, Parts(((pieces[row].start, pieces[row].end),)))
            if whole
            else (row, pieces[row].parts(rows[row].program.steps[place], place, last_visit(rows[row].program)))
            for row, place in self.going
        ]

    @cached_property
    def running(self) -> Tokens:
        """Tokens that take the whole step."""
        if self.layout.whole and len(self.going) == len(self.layout.rows):
            return self.layout.all
        return self.layout.some((row, *each) for row, parts in self._parts for each in parts.running)

    @cached_property
    def leaving(self) -> Tokens:
        """Tokens that leave keys and values only."""
        return self.layout.some((row, *each) for row, parts in self._parts for each in parts.leaving)

    @property
    def filled(self) -> dict[Segment, Tokens]:
        """Tokens for which a segment is filled that begins here."""
        ranges: dict[Segment, list[Range]] = {}
        for (row, parts), (_, place) in zip(self._parts, self.going, strict=True):
            if parts.filled:
                segment = fill_entries(self.layout.rows[row].program).get(place)
                if segment is not None:
                    ranges.setdefault(segment, []).extend((row, *each) for each in parts.filled)
        return {segment: self.layout.some(each) for segment, each in ranges.items()}

    @cached_property
    def visits(self) -> list[int]:
        """For each row of the pass, which of its histories the visit uses; 0 for those that do not take part."""
        visits = [0] * len(self.layout.rows)
        for row, place in self.going:
            visits[row] = page_slots(self.layout.rows[row].program)[place]
        return visits

    @property
    def apart(self) -> bool:
        """Whether so few tokens of every row run that each of them can attend by itself.

        Of a prompt whose start was there already, as many count as if it had not been: the numbers must be the same.
        """
        for (row, parts), (_, place) in zip(self._parts, self.going, strict=True):
            chunk, program, running = self.layout.chunks[row], self.layout.rows[row].program, parts.running
            if running and chunk is not self.layout.pieces[row]:
                running = chunk.parts(program.steps[place], place, last_visit(program)).running
            if size(running) > MAX_PAGED:
                return False
        return True

    @property
    def spots(self) -> Iterator[Spot]:
        """The rows of which tokens run."""
        start = 0
        for (row, parts), (_, place) in zip(self._parts, self.going, strict=True):
            count = size(parts.running)
            if count:
                yield Spot(
                    self.layout.rows[row], place, self.visits[row], parts.running, slice(start, start + count),
                    self.layout.pieces[row].end,
                )  # fmt: skip
            start += count

    def _of_members(self, values: Tensor) -> Tensor:
        """Select those of this turn from values for the tokens of every member of every turn."""
        bounds, span = self.layout.member_bounds, self._span
        if self._kept is None:
            return values[bounds[span.start] : bounds[span.stop]]
        members = [span.start + member for member in self._kept]
        return values[[place for member in members for place in range(bounds[member], bounds[member + 1])]]
