"""Where the tokens of one pass lie: packed one after another, each with its row, position and place in the pages.

Built once per pass, on the device, so that a step needs no work that depends on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.rows import extra_visits, page_slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.rows import Row
    from polar_sdk.engine.schedule import Turn
    from polar_sdk.program import Step

__all__ = ["Layout", "Members"]


class Layout:
    """The packed tokens of a pass.

    Attributes:
        tokens: Token ids, (N,).
        positions: Position of each token in its row, (N,).
        guarded: Whether any row has loops that are watched.
        longest: Most tokens of any row after the pass.
    """

    def __init__(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]], device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.counts = [len(new) for new in tokens]
        self.starts = [sum(self.counts[:row]) for row in range(len(rows))]
        self.single = all(count == 1 for count in self.counts)
        self.guarded = any(row.guard is not None and extra_visits(row.program) for row in rows)
        self.longest = max(row.length + count for row, count in zip(rows, self.counts, strict=True))
        self.tokens = torch.tensor([token for new in tokens for token in new], device=device)
        at = [place for row, count in zip(rows, self.counts, strict=True) for place in _span(row.length, count)]
        self.positions = torch.tensor(at, device=device)
        self.owners = torch.tensor(
            [number for number, count in enumerate(self.counts) for _ in range(count)], device=device
        )
        self.blocks, self.offsets = self.positions // PAGE, self.positions % PAGE
        self._picked: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def tables(self) -> Tensor:
        """Place in its store of the page of each visit, row and block, (visits, B, blocks); 0 where there is none."""
        blocks = -(-self.longest // PAGE)
        visits = max(row.pages.visits for row in self.rows)
        table = torch.zeros((len(self.rows), blocks, visits), dtype=torch.long)
        for number, row in enumerate(self.rows):
            filled = row.pages.places(blocks)
            table[number, : filled.shape[0], : filled.shape[1]] = filled
        return table.permute(2, 0, 1).contiguous().to(self.device)

    def members(self, turn: Turn) -> Members | None:
        """The rows that take part in a turn, those whose guard stopped it left out; None where no row is left."""
        going = [(row, place) for row, place in turn.members if place not in self.rows[row].stopped]
        return Members(self, going) if going else None

    def index(self, rows: tuple[int, ...]) -> Tensor:
        """Positions of some rows' tokens among the packed ones."""
        if rows not in self._picked:
            at = [place for row in rows for place in _span(self.starts[row], self.counts[row])]
            self._picked[rows] = torch.tensor(at, device=self.device)
        return self._picked[rows]


@dataclass
class Members:
    """The rows that take part in one turn."""

    layout: Layout
    going: Sequence[tuple[int, int]]
    """(row, place in its program)."""

    @property
    def single(self) -> bool:
        """Whether every row has one token."""
        return self.layout.single

    @cached_property
    def index(self) -> Tensor | None:
        """Positions of the members' tokens among the packed ones; None = all."""
        rows = tuple(row for row, _ in self.going)
        return None if len(rows) == len(self.layout.rows) else self.layout.index(rows)

    @cached_property
    def visits(self) -> tuple[int, ...]:
        """For each member, which of its histories the visit uses."""
        return tuple(page_slots(self.layout.rows[row].program)[place] for row, place in self.going)

    @property
    def positions(self) -> Tensor:
        """Position of each token in its row, (N,)."""
        return self._of(self.layout.positions)

    @property
    def offsets(self) -> Tensor:
        """Place of each token in its page, (N,)."""
        return self._of(self.layout.offsets)

    @property
    def pages(self) -> Tensor:
        """Page of each token, (N,)."""
        owners, blocks = self._of(self.layout.owners), self._of(self.layout.blocks)
        if len(set(self.visits)) == 1:
            return self.layout.tables[self.visits[0]][owners, blocks]
        counts = torch.tensor([self.layout.counts[row] for row, _ in self.going])
        visits = torch.tensor(self.visits).repeat_interleave(counts).to(self.layout.device)
        return self.layout.tables[visits, owners, blocks]

    @property
    def table(self) -> Tensor:
        """Pages of each row in order, (B, blocks)."""
        same = len(set(self.visits)) == 1
        if same and self.index is None:
            return self.layout.tables[self.visits[0]]
        rows = torch.tensor([row for row, _ in self.going], device=self.layout.device)
        if same:
            return self.layout.tables[self.visits[0]][rows]
        return self.layout.tables[torch.tensor(self.visits, device=self.layout.device), rows]

    @property
    def places(self) -> list[tuple[Row, int, slice]]:
        """(row, place in its program, its tokens among the members')."""
        found, start = [], 0
        for row, place in self.going:
            end = start + self.layout.counts[row]
            found.append((self.layout.rows[row], place, slice(start, end)))
            start = end
        return found

    @property
    def spans(self) -> list[tuple[Row, int, slice]]:
        """(row, history, its tokens among the members')."""
        return [(row, visit, span) for (row, _, span), visit in zip(self.places, self.visits, strict=True)]

    def count(self, step: Step) -> None:
        """Count the step, which has run, for every member."""
        for row, _ in self.going:
            new = self.layout.counts[row]
            self.layout.rows[row].work.step(step, new, self.layout.rows[row].length + new)

    def _of(self, values: Tensor) -> Tensor:
        return values if self.index is None else values[self.index]


def _span(start: int, count: int) -> range:
    return range(start, start + count)
