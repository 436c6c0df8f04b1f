"""Which tokens of a batch run which layers, by the programs of their requests. Knows positions, no tensors and no vLLM.

What a token runs follows from its position alone (`polar_sdk.programs.cost.Piece`, the formula that is billed). So it
does not depend on the pieces in which a prompt is scheduled, on preemptions, or on other requests.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence, Set

    from polar_sdk.programs.cost import Piece, Segment


class UnsupportedProgramError(ValueError):
    """A program that cannot run inside vLLM, or has no map here."""


class Turn(NamedTuple):
    """A request's part of a batch."""

    program: Program
    piece: Piece
    """Its new tokens."""


class Span(NamedTuple):
    """Consecutive tokens of one request."""

    row: int
    """The request, by its place in the batch."""
    start: int
    end: int
    """Positions of the first token, and after the last one."""


class Stretch(NamedTuple):
    """Consecutive layers in which no token changes its part."""

    first: int
    after: int
    """The first layer, and the one after the last."""
    running: tuple[Span, ...]
    """Tokens that run the layers, the shortest spans first; each span attends to all tokens up to its end."""
    leaving: tuple[Span, ...]
    """Tokens that leave keys and values, and are needed no more: only in the model's last layer."""
    filled: Mapping[Segment, tuple[Span, ...]]
    """Tokens for which the map of a segment that begins here writes keys and values, and carries their states."""


def program_of(text: str, depth: int, segments: Set[Segment]) -> Program:
    """Read a program that requests name.

    Args:
        text: The program.
        depth: Layers of the model.
        segments: Segments that have a map.

    Raises:
        UnsupportedProgramError: It does not visit every layer once, in order, or fills a segment without a map.
        ProgramSyntaxError: It does not parse.
    """
    program = Program.parse(text)
    if tuple(step.first for step in program) != tuple(range(depth)) or not all(step.plain for step in program):
        raise UnsupportedProgramError(
            f"program {text!r} does not visit each of the layers 0 to {depth - 1} once, in order; vLLM runs programs "
            "that fill layers. To serve one that skips or loops, use `polar export`, on a server of its own."
        )
    if missing := [segment for segment in program.fills if segment not in segments]:
        known = ", ".join(f"({first}-{last})" for first, last in sorted(segments)) or "none"
        raise UnsupportedProgramError(
            f"program {text!r} fills layers {missing[0][0]} to {missing[0][1]}, for which this server has no map; it "
            f"has: {known}."
        )
    return program


def stretches(turns: Sequence[Turn], depth: int) -> list[Stretch]:
    """The layers of a model, in order, with what each token of a batch does there."""
    borders = {0, depth - 1, depth}
    for program in {turn.program for turn in turns}:
        borders |= {
            place for place, (before, step) in enumerate(pairwise(program), 1) if before.segment != step.segment
        }
    return [_stretch(turns, first, after, depth) for first, after in pairwise(sorted(borders))]


def _stretch(turns: Sequence[Turn], first: int, after: int, depth: int) -> Stretch:
    running: list[Span] = []
    leaving: list[Span] = []
    filled: dict[Segment, tuple[Span, ...]] = {}
    for row, (program, piece) in enumerate(turns):
        step = program.steps[first]
        parts = piece.parts(step, first, depth - 1)
        running += _spans(row, parts.running)
        leaving += _spans(row, parts.leaving)
        if step.begins_segment and parts.filled:
            segment = step.segment[0], step.segment[1]
            filled[segment] = (*filled.get(segment, ()), *_spans(row, parts.filled))
    running.sort(key=lambda span: span.end - span.start)
    return Stretch(first, after, tuple(running), tuple(leaving), filled)


def _spans(row: int, ranges: Sequence[tuple[int, int]]) -> Iterator[Span]:
    return (Span(row, start, end) for start, end in ranges)
