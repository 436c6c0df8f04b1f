"""What a learned router reads of a prompt: pooled input embeddings, or pooled hidden states after the first layers.

`embedding` pools the input embeddings and costs no matrix product. `early` runs the first layers of the model over the
prompt and pools their output; what they cost is the router's. Knows tokens and weights, no programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Literal

import torch

from polar_sdk.engine.attention import attend_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder

__all__ = ["FeatureKind", "FeatureReader"]

FeatureKind = Literal["embedding", "early"]


@dataclass(frozen=True)
class FeatureReader:
    """Reads the features of prompts.

    Attributes:
        decoder: The base model's weights.
        kind: `embedding` or `early`.
        layers: Layers run for `early`; 0 for `embedding`.
    """

    decoder: Decoder
    kind: FeatureKind = "embedding"
    layers: int = 0

    def size(self, width: int) -> int:
        """Number of features for hidden states of that width: pooled states, and the prompt's length."""
        return width * (1 if self.kind == "embedding" else 2) + 1

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Features of one prompt, (F,) float32: mean state (`early`: also the last one), log of the length."""
        ids = torch.tensor(tokens, device=self.decoder.device)
        positions = torch.arange(len(tokens), device=self.decoder.device)
        states = self.decoder.embed(ids, positions)
        length = states.new_full((1,), log(len(tokens)), dtype=torch.float32)
        if self.kind == "embedding":
            return torch.cat((states.mean(0, dtype=torch.float32), length))
        states = self._run(states, positions).to(self.decoder.device)
        # The first position has a state of its own, large and alike for every prompt; it would drown the others.
        body = states[1:] if len(tokens) > 1 else states
        return torch.cat((body.mean(0, dtype=torch.float32), states[-1].float(), length))

    def flops(self, tokens: int) -> int:
        """FLOPs of reading a prompt of that many tokens: those of the layers that run for it."""
        return sum(cost.flops(tokens, tokens) for cost in self.decoder.cost.layers[: self.layers])

    def stack(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Features of several prompts, (M, F)."""
        return torch.stack([self(tokens) for tokens in prompts])

    def _run(self, states: Tensor, positions: Tensor) -> Tensor:
        """The first layers over one prompt, (T, E)."""
        decoder = self.decoder
        here, rotary = decoder.device, decoder.rotary(positions, len(positions))
        for layer in range(self.layers):
            if (there := decoder.placement.layers[layer]) != here:
                states, rotary = states.to(there), decoder.rotary(positions.to(there), len(positions))
                here = there
            query, key, value = decoder.project(layer, states, rotary)
            kind = decoder.family.kinds[layer]
            mixed = attend_row(query, key.transpose(0, 1), value.transpose(0, 1), kind)
            states = decoder.finish(layer, states, mixed)
        return states
