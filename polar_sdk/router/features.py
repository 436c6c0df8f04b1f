"""What a learned router reads of a prompt: pooled input embeddings, or pooled hidden states after the first layers.

`embedding` pools the input embeddings and costs no matrix product. `early` runs the first layers of the model over the
prompt and pools their output. A program that begins with those layers takes over what they computed, so that reading
costs it nothing; of another one, they are the router's cost. Knows tokens and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Literal

import torch

from polar_sdk.engine.route import begins, lead_flops, run_lead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.route import Lead
    from polar_sdk.programs.program import Program


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

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Features of one prompt, (F,) float32: mean state (`early`: also the last one), log of the length."""
        return self.read(tokens)[0]

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> tuple[Tensor, Lead | None]:
        """Features of one prompt, and the lead that its request may take over where layers ran for them."""
        length = torch.full((1,), log(len(tokens)), device=self.decoder.device)
        if self.kind == "embedding":
            ids = torch.tensor(tokens, device=self.decoder.device)
            states = self.decoder.embed(ids, torch.arange(len(tokens), device=self.decoder.device))
            return torch.cat((states.mean(0, dtype=torch.float32), length)), None
        lead = run_lead(self.decoder, tokens, self.layers)
        # The first position has a state of its own, large and alike for every prompt; it would drown the others.
        body = lead.states[1:] if len(tokens) > 1 else lead.states
        pooled = torch.cat((body.mean(0, dtype=torch.float32), lead.states[-1].float()))
        return torch.cat((pooled.to(self.decoder.device), length)), lead

    def flops(self, tokens: int, program: Program) -> int:
        """FLOPs of reading a prompt of that many tokens: those of layers that run for it alone."""
        return 0 if begins(program, self.layers) else lead_flops(self.decoder.cost, self.layers, tokens)

    def stack(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Features of several prompts, (M, F)."""
        return torch.stack([self(tokens) for tokens in prompts])
