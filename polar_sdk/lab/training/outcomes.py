"""What programs do on prompts, pair by pair: read from a reward matrix, and measured where it lacks the program.

Knows rows and programs; the caller knows how to measure a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from polar_sdk.errors import DataError
from polar_sdk.lab.rewards.measure import STRICT_ANSWER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from polar_sdk.lab.program_search.matrix import RewardMatrix
    from polar_sdk.programs.program import Program
    from polar_sdk.router.certificate import Loss


class PromptOutcome(NamedTuple):
    """What one program does on one prompt."""

    agree: bool
    share: float
    """Share of identity's answer that is kept; see `RewardMatrix`."""
    right: bool
    flops: int
    """Without the router's."""


@dataclass
class Outcomes:
    """Outcomes on the rows of a matrix.

    Attributes:
        matrix: Known outcomes; column 0 is identity.
        block: Measures what is not known, as a matrix of the given rows and programs; None = nothing can be measured.
    """

    matrix: RewardMatrix
    block: Callable[[Sequence[int], Sequence[Program]], RewardMatrix] | None = None

    def __post_init__(self) -> None:
        self._column = {program: column for column, program in enumerate(self.matrix.programs)}
        self._measured: dict[tuple[int, Program], PromptOutcome] = {}
        self._lists = _lists(self.matrix)

    def __len__(self) -> int:
        return len(self.matrix)

    def rows(self, keep: Sequence[int]) -> Outcomes:
        """The same for some of the rows."""
        block = self.block
        measure = None if block is None else lambda rows, programs: block([keep[row] for row in rows], programs)
        part = Outcomes(self.matrix.rows(keep), measure)
        place = {row: index for index, row in enumerate(keep)}
        part._measured = {
            (place[row], program): outcome for (row, program), outcome in self._measured.items() if row in place
        }
        return part

    def of(self, rows: Sequence[int], programs: Sequence[Program]) -> list[PromptOutcome]:
        """Outcomes of pairs of a row and a program.

        Raises:
            DataError: A program is not in the matrix and cannot be measured.
        """
        pairs = list(zip(rows, programs, strict=True))
        self._measure([pair for pair in dict.fromkeys(pairs) if self._known(pair) is None])
        known = [self._known(pair) for pair in pairs]
        return [outcome for outcome in known if outcome is not None]

    def all(self, programs: Sequence[Program]) -> list[PromptOutcome]:
        """Outcomes of one program per row."""
        return self.of(range(len(self)), programs)

    def losses(self, rows: Sequence[int], programs: Sequence[Program], loss: Loss) -> list[int]:
        """Whether each pair is lost (1) or gained (−1) against identity; see `Loss`."""
        outcomes = self.of(rows, programs)
        if loss == "differs":
            return [int(not outcome.agree) for outcome in outcomes]
        if loss == "strict":  # of a choice, the share is 0 or 1
            return [int(outcome.share < STRICT_ANSWER) for outcome in outcomes]
        labelled = self.matrix.labelled.tolist()
        values = []
        for row, outcome in zip(rows, outcomes, strict=True):
            differs = int(not outcome.agree)
            drop = int(self._cell(row, 0).right) - int(outcome.right) if labelled[row] else differs
            values.append(max(0, drop) if loss == "harms" else drop)
        return values

    def _known(self, pair: tuple[int, Program]) -> PromptOutcome | None:
        column = self._column.get(pair[1])
        return self._measured.get(pair) if column is None else self._cell(pair[0], column)

    def _cell(self, row: int, column: int) -> PromptOutcome:
        agree, share, right, flops = self._lists
        return PromptOutcome(agree[row][column], share[row][column], right[row][column], flops[row][column])

    def _measure(self, pairs: Sequence[tuple[int, Program]]) -> None:
        """Measure pairs in blocks: by program where there are fewer programs than rows, by row otherwise."""
        if not pairs:
            return
        if self.block is None:
            raise DataError(f"program {pairs[0][1].text!r} is not in the reward matrix; search again with it.")
        by_program = len({program for _, program in pairs}) <= len({row for row, _ in pairs})
        blocks: dict[object, list[tuple[int, Program]]] = {}
        for pair in pairs:
            blocks.setdefault(pair[1] if by_program else pair[0], []).append(pair)
        for block in blocks.values():
            rows = list(dict.fromkeys(row for row, _ in block))
            programs = list(dict.fromkeys(program for _, program in block))
            self._keep(rows, self.block(rows, programs))

    def _keep(self, rows: Sequence[int], measured: RewardMatrix) -> None:
        agree, share, right, flops = _lists(measured)
        for place, row in enumerate(rows):
            for column, program in enumerate(measured.programs):
                cell = (agree[place][column], share[place][column], right[place][column], flops[place][column])
                self._measured[row, program] = PromptOutcome(*cell)


def _lists(matrix: RewardMatrix) -> tuple[list[list[bool]], list[list[float]], list[list[bool]], list[list[int]]]:
    tensors: list[Tensor] = [matrix.agree, matrix.share, matrix.right, matrix.flops]
    agree, share, right, flops = (
        tensor.to("cpu", torch.int64 if tensor is matrix.flops else tensor.dtype).tolist() for tensor in tensors
    )
    return agree, share, right, flops
