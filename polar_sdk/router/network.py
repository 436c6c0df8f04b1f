"""What a learned router computes: features of a prompt, and a small fully connected network over them.

`embedding` features pool the input embeddings and cost no matrix product. `early` features run the first layers of the
model over the prompt and pool their output; a program that begins with those layers takes over what they computed, so
that reading costs it nothing, and for any other they count as the router's cost. The network is a flat dictionary of
tensors, as stored in `router.safetensors`. Knows tokens, weights and features; what the outputs mean, the kinds know.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine.lead import begins, lead_flops, run_lead

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.lead import Lead
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
        """Number of features for hidden states of this width: pooled states, and the length of the prompt."""
        return width * (1 if self.kind == "embedding" else 2) + 1

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Features of one prompt, (F,) float32: mean state (`early`: also the last one) and log of the length."""
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
        # The state of the first position is large and nearly the same for every prompt; it would drown the others.
        body = lead.states[1:] if len(tokens) > 1 else lead.states
        pooled = torch.cat((body.mean(0, dtype=torch.float32), lead.states[-1].float()))
        return torch.cat((pooled.to(self.decoder.device), length)), lead

    def flops(self, tokens: int, program: Program) -> int:
        """FLOPs of reading a prompt of that many tokens: those of the layers that run only for this."""
        return 0 if begins(program, self.layers) else lead_flops(self.decoder.cost, self.layers, tokens)

    def stack(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Features of several prompts, (M, F)."""
        return torch.stack([self(tokens) for tokens in prompts])


@dataclass(frozen=True)
class Network:
    """x ↦ W_n(… relu(W_0 standardised(x) + b_0) …) + b_n.

    Attributes:
        mean: Subtracted from the features, (F,).
        scale: Multiplied with the result, (F,).
        weights: Per layer (out, in).
        biases: Per layer (out,).
    """

    mean: Tensor
    scale: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    @classmethod
    def fresh(cls, features: Tensor, hidden: Sequence[int], outputs: int, seed: int) -> Self:
        """A new network for features like these, (M, F); the last layer starts at zero."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [features.shape[1], *hidden, outputs]
        weights = [torch.randn(b, a, generator=generator) * (2 / a) ** 0.5 for a, b in pairwise(sizes)]
        weights[-1].zero_()
        spread = features.std(0, unbiased=False)
        scale = torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), torch.zeros_like(spread))
        return cls(features.mean(0), scale, tuple(weights), tuple(torch.zeros(size) for size in sizes[1:]))

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (…, O) of features (…, F)."""
        x = (x - self.mean) * self.scale
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(x, weight, bias)
            if index < last:
                x = F.relu(x)
        return x

    @property
    def flops(self) -> int:
        """FLOPs of one prompt: 2 per multiply-accumulate of the products."""
        return sum(2 * weight.numel() for weight in self.weights)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for tensor in (*self.weights, *self.biases))

    @property
    def trainable(self) -> list[Tensor]:
        """The tensors that training changes, in a fixed order."""
        return [*self.weights, *self.biases]

    def to(self, device: torch.device) -> Network:
        """The same network on a device."""
        weights, biases = (tuple(tensor.to(device) for tensor in tensors) for tensors in (self.weights, self.biases))
        return Network(self.mean.to(device), self.scale.to(device), weights, biases)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as they are stored."""
        named = {"mean": self.mean, "scale": self.scale}
        named |= {f"weight.{index}": weight for index, weight in enumerate(self.weights)}
        named |= {f"bias.{index}": bias for index, bias in enumerate(self.biases)}
        return {name: tensor.detach().to("cpu", torch.float32).contiguous().clone() for name, tensor in named.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From stored tensors.

        Raises:
            ValueError: They do not form one network, or contain a value that is not finite.
        """
        count = sum(name.startswith("weight.") for name in tensors)
        try:
            weights = tuple(tensors[f"weight.{index}"] for index in range(count))
            biases = tuple(tensors[f"bias.{index}"] for index in range(count))
            mean, scale = tensors["mean"], tensors["scale"]
        except KeyError as error:
            raise ValueError(f"tensor {error} is missing") from error
        widths = [mean.shape[0], *(bias.shape[0] for bias in biases)]
        shapes = [tuple(weight.shape) for weight in weights]
        if not weights or scale.shape != mean.shape or shapes != [(b, a) for a, b in pairwise(widths)]:
            raise ValueError(f"the shapes {shapes} do not form one network")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("a tensor contains a value that is not finite")
        return cls(mean, scale, weights, biases)
