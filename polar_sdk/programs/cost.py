"""The cost of a program in FLOPs, for given lengths: exact integers, before anything runs.

The formula is that of `torch.utils.flop_counter.FlopCounterMode`: 2 FLOPs per multiply-accumulate, matrix products and
attention only, attention as the full rectangle queries × keys. A family describes its layers once (`LayerCost`), and
`Piece` says which tokens of a pass take which part of a step; the same numbers estimate a plan, lay out a pass and
meter a run, so that the three agree. Knows numbers of FLOPs, not weights and not money.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from polar_sdk.errors import MissingMapError
from polar_sdk.programs.program import Program
from polar_sdk.usage import FlopUsage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from polar_sdk.programs.program import Step


CHUNK = 512
"""A prompt runs in chunks that end at multiples of this length. Fixed, because the cost of attention depends on the
chunks, and a bill must not depend on who else was served at the time. Unit: tokens."""
Segment = tuple[int, int]
"""First and last layer that a bridge crosses, or that a fill writes."""

NOMINAL_PROMPT = 128
NOMINAL_OUTPUT = 64
"""Lengths at which programs are compared where there is no request: a short chat turn. Unit: tokens."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One visit of one layer.

    Attributes:
        linear: FLOPs per token in the layer's matrix products.
        attention: FLOPs per pair of one query and one key, all heads together (scores and weighted sum).
        keys_values: FLOPs per token of keys and values alone; included in `linear`.
    """

    linear: int
    attention: int
    keys_values: int = 0

    def flops(self, queries: int, keys: int, leaving: int = 0) -> int:
        """FLOPs of one visit with N new tokens over M keys (all new tokens included).

        `leaving` further tokens leave their keys and values, and nothing else.
        """
        return self.linear * queries + self.attention * queries * keys + self.keys_values * leaving


class Parts(NamedTuple):
    """The part of each new token of a row in one step; a token in none of the three passes unchanged.

    Ranges of positions, each (first, the one after the last), ascending, none of them empty.
    """

    running: tuple[tuple[int, int], ...]
    """Tokens that take the whole step."""
    leaving: tuple[tuple[int, int], ...] = ()
    """Tokens that leave keys and values only: no later step reads their states."""
    filled: tuple[tuple[int, int], ...] = ()
    """Tokens whose keys and values the segment's map writes."""


class Piece(NamedTuple):
    """The new tokens of one row in one pass."""

    start: int
    """Position of the first one."""
    end: int
    """Position after the last one."""
    prompt: int
    """Number of tokens of the row's prompt; those from this position on belong to the answer."""
    wanted: int
    """From this position on, logits or states of the tokens are needed; `end` = of none."""

    @property
    def chunk(self) -> Piece:
        """The chunk of a prompt that it ends, of which the first tokens may have been there already; else itself."""
        start = self.start if self.start >= self.prompt else self.start // CHUNK * CHUNK
        return self if start == self.start else self._replace(start=start)

    def runs_whole(self, program: Program) -> bool:
        """Whether every token takes every step whole, as those of the answer do."""
        return self.wanted <= self.start and (self.start >= self.prompt or not program.tail)

    def parts(self, step: Step, place: int, last_visit: int) -> Parts:
        """The part of each token in a step, which is at this place of a program whose last visit is at `last_visit`.

        After the last visit nobody reads a token's state but the head. So there, and after it, only tokens that are
        wanted run; at the last visit itself the others leave their keys and values.
        """
        if place > last_visit:
            return Parts(_ranges((self.wanted, self.end)))
        tail = self.prompt - step.fill if step.fill else self.start
        first = (0, min(1, tail, self.end)) if self.start == 0 else (0, 0)
        running = _ranges(first, (max(self.start, first[1], tail), self.end))
        filled = _ranges((max(self.start, 1), min(self.end, tail)))
        if place < last_visit:
            return Parts(running, (), filled)
        leaving = _ranges(*((start, min(end, self.wanted)) for start, end in running))
        return Parts(_ranges(*((max(start, self.wanted), end) for start, end in running)), leaving, filled)


class Share(NamedTuple):
    """The work of a pass at one step of a program."""

    step: Step
    parts: Parts
    flops: int


def _ranges(*ranges: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Those of the ranges that are not empty; where one continues another, the two as one."""
    kept: list[tuple[int, int]] = []
    for start, end in ranges:
        if start < end:
            begin = kept.pop()[0] if kept and kept[-1][1] == start else start
            kept.append((begin, end))
    return tuple(kept)


def size(ranges: Iterable[tuple[int, int]]) -> int:
    """Number of tokens in ranges."""
    return sum(end - start for start, end in ranges)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs of a whole model.

    Attributes:
        layers: One entry per layer, index = layer.
        head: FLOPs per position whose logits are computed.
        bridges: FLOPs per token of each bridge that the model has.
        fills: FLOPs per filled token of the map of each segment that the model can fill, all its layers together.
        guess: FLOPs of one guess of the model's draft head; 0 = it has none.
    """

    layers: tuple[LayerCost, ...]
    head: int
    bridges: Mapping[Segment, int] = field(default_factory=dict)
    fills: Mapping[Segment, int] = field(default_factory=dict)
    guess: int = 0

    @property
    def depth(self) -> int:
        """Number of layers, D."""
        return len(self.layers)

    def with_bridges(self, bridges: Mapping[Segment, int]) -> CostModel:
        """The same model with these bridges, FLOPs per token each."""
        return replace(self, bridges=dict(bridges))

    def with_fills(self, fills: Mapping[Segment, int]) -> CostModel:
        """The same model with these fills, FLOPs per filled token each."""
        return replace(self, fills=dict(fills))

    def step(self, step: Step) -> LayerCost:
        """Cost of one step of a program for a token that runs it.

        Raises:
            MissingMapError: The model has no such bridge.
        """
        if not step.bridge:
            return self.layers[step.first]
        if (step.first, step.last) not in self.bridges:
            raise MissingMapError(
                f"there is no bridge over layers {step.first}-{step.last}; this model has: "
                f"{_listed('[{}-{}]', self.bridges)}.",
                hint="Fit it with `polar lab heal`, or load the bridges that the program was made for.",
            )
        return LayerCost(linear=self.bridges[step.first, step.last], attention=0)

    def fill(self, segment: Segment) -> int:
        """FLOPs per filled token of a segment's map.

        Raises:
            MissingMapError: The model has no such map.
        """
        if segment not in self.fills:
            raise MissingMapError(
                f"there is no fill for layers {segment[0]}-{segment[1]}; this model has: "
                f"{_listed('({}-{})', self.fills)}.",
                hint="Fit it with `polar lab heal`, or load the fills that the program was made for.",
            )
        return self.fills[segment]

    def shares(self, program: Program, piece: Piece) -> Iterator[Share]:
        """The work of a pass at each step of a program, in order; a segment's map counts with its first visit."""
        last = program.last_visit
        for place, step in enumerate(program):
            parts = piece.parts(step, place, last)
            flops = self.step(step).flops(size(parts.running), piece.end, size(parts.leaving))
            if step.begins_segment:
                flops += self.fill((step.segment[0], step.segment[1])) * size(parts.filled)
            yield Share(step, parts, flops)

    def prefill(self, program: Program, prompt: int, *, cached: int = 0, scored: bool = False) -> int:
        """FLOPs of the layers for a prompt of that many tokens, the first `cached` of which are not run again.

        Logits are wanted of the prompt's last token alone, so the others do not run the last visit to its end; unless
        all of them are `scored`.
        """
        return sum(share.flops for piece in pieces(prompt, cached, scored) for share in self.shares(program, piece))

    def decode(self, program: Program, prompt: int, steps: int) -> int:
        """FLOPs of the layers for N decode steps after the prompt.

        Step i (from 1) runs one query over prompt + i keys; the sum over the steps has a closed form.
        """
        pairs = steps * prompt + steps * (steps + 1) // 2
        costs = [self.step(step) for step in program]
        return sum(cost.linear * steps + cost.attention * pairs for cost in costs)

    def scoring(self, program: Program, prompt: int, tails: Iterable[int]) -> int:
        """FLOPs of scoring continuations of these lengths after a prompt, whose tokens run once for all of them."""
        lengths = list(tails)
        pieces = [Piece(prompt, prompt + tail, prompt, prompt) for tail in lengths]
        layers = sum(share.flops for piece in pieces for share in self.shares(program, piece))
        return self.prefill(program, prompt) + layers + self.head * sum(lengths)

    def ratio(self, program: Program) -> float:
        """FLOPs over identity's, at 128 prompt and 64 output tokens: how programs are compared without a request."""
        ours, full = (
            self.request(each, NOMINAL_PROMPT, NOMINAL_OUTPUT).total for each in (program, Program.identity(self.depth))
        )
        return ours / full

    def request(
        self,
        program: Program,
        prompt: int,
        output: int,
        *,
        cached: int = 0,
        router: int = 0,
        scored: bool = False,
    ) -> FlopUsage:
        """FLOPs of a whole request: the prefill gives the first output token, each further one takes a step.

        Args:
            program: What runs.
            prompt: Prompt tokens, cached ones included.
            output: Output tokens; 0 counts the prefill without the head.
            cached: Prompt tokens whose keys and values are reused; included in `prompt`.
            router: FLOPs of the router.
            scored: Whether the prompt's own tokens are scored: the head runs for all that precede another one.
        """
        prefill = self.prefill(program, prompt, cached=cached, scored=scored)
        decode = self.decode(program, prompt, max(output - 1, 0))
        head = self.head * (output + (prompt - 1 if scored else 0))
        return FlopUsage(
            layers_prefill=prefill,
            layers_decode=decode,
            head=head,
            router=router,
            total=prefill + decode + head + router,
        )


def _listed(form: str, segments: Iterable[Segment]) -> str:
    return ", ".join(form.format(*segment) for segment in sorted(segments)) or "none"


def pieces(prompt: int, cached: int = 0, scored: bool = False) -> list[Piece]:
    """The passes in which a prompt runs whose first `cached` tokens are not run again.

    Logits are wanted of its last token, or of all where they are `scored`.
    """

    def wanted(start: int, end: int) -> int:
        return start if scored else prompt - 1 if end == prompt else end

    borders = [cached, *range((cached // CHUNK + 1) * CHUNK, prompt, CHUNK), prompt]
    return [Piece(start, end, prompt, wanted(start, end)) for start, end in pairwise(borders) if start < end]


def layer_tokens(program: Program, prompt: int, output: int, *, cached: int = 0) -> int:
    """Tokens by layers that a request needs: how many tokens run each visit of its program whole, summed.

    Who computes for others counts them too, so that the two can be held against each other.
    """
    last, visits = program.last_visit, [(place, step) for place, step in enumerate(program) if not step.bridge]
    prefill = sum(
        size(piece.parts(step, place, last).running) for piece in pieces(prompt, cached) for place, step in visits
    )
    return prefill + len(visits) * max(output - 1, 0)
