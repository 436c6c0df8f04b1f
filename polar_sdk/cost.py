"""What a program costs, in FLOPs, for given lengths: exact integers, before anything runs.

The formula is the one of `torch.utils.flop_counter.FlopCounterMode`: 2 FLOPs per multiply-accumulate, matrix products
and attention only, attention as the full rectangle queries × keys. Knows numbers of FLOPs, not weights and not money.
A family describes its layers once (`LayerCost`); the same numbers price a plan and meter a run, so that the two agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polar_sdk.usage import FlopUsage

if TYPE_CHECKING:
    from polar_sdk.program import Program

__all__ = ["NOMINAL_OUTPUT", "NOMINAL_PROMPT", "CostModel", "LayerCost"]

NOMINAL_PROMPT = 128
NOMINAL_OUTPUT = 64
"""Lengths at which programs are compared where no request is at hand: a short chat turn. Unit: tokens."""


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
    """

    layers: tuple[LayerCost, ...]
    head: int

    @property
    def depth(self) -> int:
        """Number of layers, D."""
        return len(self.layers)

    def prefill(self, program: Program, prompt: int) -> int:
        """FLOPs of the layers for a prompt of that many tokens."""
        return sum(self.layers[layer].flops(prompt, prompt) for layer in program)

    def decode(self, program: Program, prompt: int, steps: int) -> int:
        """FLOPs of the layers for that many decode steps after the prompt.

        Step i (from 1) runs one query over prompt + i keys; the sum over steps is closed.
        """
        pairs = steps * prompt + steps * (steps + 1) // 2
        return sum(self.layers[layer].linear * steps + self.layers[layer].attention * pairs for layer in program)

    def request(self, program: Program, prompt: int, output: int, *, router: int = 0) -> FlopUsage:
        """FLOPs of a whole request: the prefill gives the first output token, each further one takes a step.

        Args:
            program: What runs.
            prompt: Prompt tokens.
            output: Output tokens; 0 counts the prefill without the head.
            router: FLOPs of the router.
        """
        prefill = self.prefill(program, prompt)
        decode = self.decode(program, prompt, max(output - 1, 0))
        head = self.head * output
        return FlopUsage(
            layers_prefill=prefill,
            layers_decode=decode,
            head=head,
            router=router,
            total=prefill + decode + head + router,
        )
