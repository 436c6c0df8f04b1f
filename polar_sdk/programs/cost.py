"""What a program costs, in FLOPs, for given lengths: exact integers, before anything runs.

The formula is that of `torch.utils.flop_counter.FlopCounterMode`: 2 FLOPs per multiply-accumulate, matrix products and
attention only, attention as the full rectangle queries × keys. A family describes its layers once (`LayerCost`); the
same numbers estimate a plan and meter a run, so that the two agree. Knows numbers of FLOPs, not weights and not money.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from polar_sdk.errors import MissingBridgeError
from polar_sdk.usage import FlopUsage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_sdk.programs.program import Program, Step


CHUNK = 512
"""A prompt runs in chunks that end at multiples of this length. Fixed, because the cost of attention depends on the
chunks, and a bill must not depend on who else was served at the time. Unit: tokens."""
Segment = tuple[int, int]
"""First and last layer that a bridge crosses."""

NOMINAL_PROMPT = 128
NOMINAL_OUTPUT = 64
"""Lengths at which programs are compared where there is no request: a short chat turn. Unit: tokens."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One visit of one layer.

    Attributes:
        linear: FLOPs per token in the layer's matrix products.
        attention: FLOPs per pair of one query and one key, all heads together (scores and weighted sum).
    """

    linear: int
    attention: int

    def flops(self, queries: int, keys: int) -> int:
        """FLOPs of one visit with that many new tokens over that many keys (new tokens included)."""
        return self.linear * queries + self.attention * queries * keys


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs of a whole model.

    Attributes:
        layers: One entry per layer, index = layer.
        head: FLOPs per position whose logits are computed.
        bridges: FLOPs per token of each bridge that the model has.
    """

    layers: tuple[LayerCost, ...]
    head: int
    bridges: Mapping[Segment, int] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Number of layers, D."""
        return len(self.layers)

    def with_bridges(self, bridges: Mapping[Segment, int]) -> CostModel:
        """The same model with these bridges, FLOPs per token each."""
        return replace(self, bridges=dict(bridges))

    def step(self, step: Step) -> LayerCost:
        """Cost of one step of a program.

        Raises:
            MissingBridgeError: The model has no such bridge.
        """
        if not step.bridge:
            return self.layers[step.first]
        if (step.first, step.last) not in self.bridges:
            available = ", ".join(f"[{first}-{last}]" for first, last in sorted(self.bridges)) or "none"
            raise MissingBridgeError(
                f"there is no bridge over layers {step.first}-{step.last}; this model has: {available}.",
                hint="Fit it with `polar heal`, or load the bridges that the program was made for.",
            )
        return LayerCost(linear=self.bridges[step.first, step.last], attention=0)

    def prefill(self, program: Program, prompt: int, *, cached: int = 0) -> int:
        """FLOPs of the layers for a prompt of that many tokens, the first `cached` of which are not run again."""
        costs = [self.step(step) for step in program]
        return sum(cost.flops(end - start, end) for start, end in chunks(prompt, cached) for cost in costs)

    def decode(self, program: Program, prompt: int, steps: int) -> int:
        """FLOPs of the layers for that many decode steps after the prompt.

        Step i (from 1) runs one query over prompt + i keys; the sum over the steps has a closed form.
        """
        pairs = steps * prompt + steps * (steps + 1) // 2
        costs = [self.step(step) for step in program]
        return sum(cost.linear * steps + cost.attention * pairs for cost in costs)

    def request(self, program: Program, prompt: int, output: int, *, cached: int = 0, router: int = 0) -> FlopUsage:
        """FLOPs of a whole request: the prefill gives the first output token, each further one takes a step.

        Args:
            program: What runs.
            prompt: Prompt tokens, cached ones included.
            output: Output tokens; 0 counts the prefill without the head.
            cached: Prompt tokens whose keys and values are reused; included in `prompt`.
            router: FLOPs of the router.
        """
        prefill = self.prefill(program, prompt, cached=cached)
        decode = self.decode(program, prompt, max(output - 1, 0))
        head = self.head * output
        return FlopUsage(
            layers_prefill=prefill,
            layers_decode=decode,
            head=head,
            router=router,
            total=prefill + decode + head + router,
        )


def chunks(prompt: int, cached: int = 0) -> list[tuple[int, int]]:
    """The chunks, (start, end) each, in which a prompt runs whose first `cached` tokens are not run again."""
    starts = [cached, *range((cached // CHUNK + 1) * CHUNK, prompt, CHUNK)]
    return [(start, end) for start, end in pairwise([*starts, prompt]) if start < end]
