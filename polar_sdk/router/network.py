"""The features of a prompt that a learned router reads, and the small fully connected network over them.

`embedding` features are the mean of the input embeddings and cost no matrix product. `ending` features add a mean in
which tokens weigh less the farther they are from the end, and `edges` features another one in which they weigh less the
farther they are from the beginning of the last message: what a chain asks for stands before a text or after it, and
hardly shows in the mean of a long prompt. The network is a flat dictionary of tensors, as stored in
`router.safetensors`. Knows tokens, weights and features; the kinds of routers know what the outputs mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder


FeatureKind = Literal["embedding", "ending", "edges"]
_MEANS: Final[dict[FeatureKind, int]] = {"embedding": 1, "ending": 2, "edges": 3}
_FALL: Final = 12
"""Tokens over which weights fall by a factor of e, from an edge inwards. 6 to 16 do as well."""
_EDGE: Final = 8 * _FALL
"""Tokens that are read at an edge: those farther in would weigh less than a thousandth."""
_NO_MESSAGE: Final = 8
"""Tokens between two separators of a template that are no message yet, such as those of "assistant"."""
_FAMILIAR: Final = "familiar."
_CENTRES: Final = 48
_ROUNDS: Final = 10
_BANDS: Final = (100.0, 500.0)
"""Lengths of prompts between which radii differ. Unit: tokens."""
_FEWEST: Final = 30
"""Held-out prompts of a range of lengths from which it has a radius of its own."""
_UNLIKE: Final = 0.01
"""Share of held-out prompts beyond the radius, before the margin."""
_MARGIN: Final = 1.1
_STRETCH: Final = log(1.5)
"""By how much a prompt may be longer than the longest one seen, or shorter than the shortest, as a logarithm."""


@dataclass(frozen=True)
class FeatureReader:
    """Reads the features of prompts.

    Attributes:
        decoder: The base model's weights.
        kind: Which features.
        separators: Tokens that the model's chat template puts around messages, for `edges`.
    """

    decoder: Decoder
    kind: FeatureKind = "embedding"
    separators: Collection[int] = ()

    @property
    def size(self) -> int:
        """Number of features, F: means of states, and the length of the prompt."""
        return self.decoder.family.hidden * _MEANS[self.kind] + 1

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Features of one prompt, (F,) float32.

        They are the mean embedding, the weighted means of `edges`, and the logarithm of the length.
        """
        device = self.decoder.device
        states = self.decoder.embed(torch.tensor(tokens, device=device), torch.arange(len(tokens), device=device))
        means = [states.mean(0, dtype=torch.float32)]
        for place, weights in edges(self.kind, tokens, self.separators):
            means.append((states[place].float() * weights.to(device).unsqueeze(1)).sum(0))
        return torch.cat((*means, torch.full((1,), log(len(tokens)), device=device)))

    def stack(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Features of several prompts, (M, F)."""
        return torch.stack([self(tokens) for tokens in prompts])


def edges(kind: FeatureKind, tokens: Sequence[int], separators: Collection[int]) -> list[tuple[slice, Tensor]]:
    """Where the tokens of each weighted mean stand in a prompt, and what they weigh in it; weights sum to 1."""
    found = []
    if kind != "embedding":
        last = range(max(0, len(tokens) - _EDGE), len(tokens))
        found.append((slice(last.start, last.stop), _falling(len(last)).flip(0)))
    if kind == "edges":
        message = _last_message(tokens, separators)[:_EDGE]
        found.append((slice(message.start, message.stop), _falling(len(message))))
    return found


def _falling(length: int) -> Tensor:
    weights = torch.exp(torch.arange(0, -length, -1) / _FALL)
    return weights / weights.sum()


def _last_message(tokens: Sequence[int], separators: Collection[int]) -> range:
    """Where the last message stands: the last longer stretch between separators, or the whole prompt."""
    end = len(tokens)
    for place in reversed([-1, *(place for place, token in enumerate(tokens) if token in separators)]):
        if end - place - 1 > _NO_MESSAGE:
            return range(place + 1, end)
        end = place
    return range(len(tokens))


@dataclass(frozen=True)
class Familiar:
    """Prompts that a router has seen the like of, by distance to the nearest of a few centres of their features.

    A short prompt's mean state varies more than a long one's, so that each range of lengths has a radius of its own.

    Attributes:
        centres: Standardised features, (K, F).
        radii: Maximum distance, per feature and squared, for prompts of under 100, of 100 to 500, and of more tokens,
            (3,).
        lengths: Logarithms of the shortest and of the longest prompt, (2,).
    """

    centres: Tensor
    radii: Tensor
    lengths: Tensor

    @classmethod
    def around(cls, seen: Tensor, held_out: Tensor, network: Network, seed: int = 0) -> Self:
        """Find what is like some prompts.

        Args:
            seen: Features that the centres are made from, (P, F).
            held_out: Features of other prompts of the same kinds, (Q, F): all but one of a hundred are to be familiar.
            network: Standardises features.
            seed: Of the first centres.
        """
        points = (seen - network.mean) * network.scale
        generator = torch.Generator().manual_seed(seed)
        count = max(1, min(_CENTRES, len(points) // 8))
        centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
        for _ in range(_ROUNDS):  # k-means; an empty cluster keeps its centre
            nearest = torch.cdist(points, centres).argmin(1)
            for place in sorted(set(nearest.tolist())):
                centres[place] = points[nearest == place].mean(0)
        lengths = torch.cat((seen, held_out))[:, -1]
        spread = torch.stack((lengths.min() - _STRETCH, lengths.max() + _STRETCH))
        found = cls(centres, torch.zeros(len(_BANDS) + 1), spread)
        others = held_out if len(held_out) else seen
        (distance, _), band = found.nearest((others - network.mean) * network.scale), found._bands(others)
        for place in range(len(_BANDS) + 1):
            own = distance[band == place]
            chosen = own if len(own) >= _FEWEST else distance
            found.radii[place] = _MARGIN * torch.quantile(chosen, 1 - _UNLIKE)
        return found

    def unlike(self, features: Tensor, distance: Tensor) -> Tensor:
        """Whether prompts at these distances are unlike all that were seen, (…) bool."""
        length = features[..., -1]
        too_far = distance > self.radii[self._bands(features)]
        return too_far | (length < self.lengths[0]) | (length > self.lengths[1])

    def strangeness(self, features: Tensor, network: Network) -> Tensor:
        """Distances of prompts as shares of the radius, (…): beyond 1 they are unlike all that were seen."""
        distance, _ = self.nearest((features - network.mean) * network.scale)
        return distance / self.radii[self._bands(features)]

    def nearest(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared distance to the nearest centre, and its index, (…) each."""
        rows = standardised.reshape(-1, standardised.shape[-1])
        nearest = torch.cdist(rows, self.centres).min(-1)
        distance = nearest.values.square() / rows.shape[-1]
        return distance.view(standardised.shape[:-1]), nearest.indices.view(standardised.shape[:-1])

    @staticmethod
    def _bands(features: Tensor) -> Tensor:
        return torch.bucketize(features[..., -1].contiguous(), torch.tensor(_BANDS, device=features.device).log())

    def to(self, device: torch.device) -> Familiar:
        """The same on a device."""
        return Familiar(self.centres.to(device), self.radii.to(device), self.lengths.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as they are stored."""
        return {f"{_FAMILIAR}{name}": getattr(self, name) for name in ("centres", "radii", "lengths")}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], width: int) -> Self | None:
        """From stored tensors; None if there are none.

        Raises:
            ValueError: Some are missing, or have other shapes.
        """
        names = [name for name in tensors if name.startswith(_FAMILIAR)]
        if not names:
            return None
        try:
            found = cls(*(tensors[f"{_FAMILIAR}{name}"] for name in ("centres", "radii", "lengths")))
        except KeyError as error:
            raise ValueError(f"tensor {error} is missing") from error
        shapes = (found.centres.shape[1:], found.radii.shape, found.lengths.shape)
        if shapes != ((width,), (len(_BANDS) + 1,), (2,)):
            raise ValueError(f"the shapes of {', '.join(names)} do not fit {width} features")
        return found


class Reading(NamedTuple):
    """A network's view of prompts, features (…, F)."""

    outputs: Tensor
    """(…, O)"""
    distance: Tensor
    """Mean squared distance to the nearest centre of what was seen, or to the mean where there are none, (…)."""
    centre: Tensor
    """Index of that centre, (…)."""


@dataclass(frozen=True)
class Network:
    """x ↦ W_n(… relu(W_0 standardised(x) + b_0) …) + b_n.

    Attributes:
        mean: Subtracted from the features, (F,).
        scale: Multiplied with the result, (F,).
        weights: Per layer (out, in).
        biases: Per layer (out,).
        familiar: Which prompts it knows the like of; for any other all outputs are −∞. None = all.
        choosing: What is added to the outputs (O,) for a prompt that is answered with one of given choices, which the
            request says and the prompt may not show. None = nothing.
    """

    mean: Tensor
    scale: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    familiar: Familiar | None = None
    choosing: Tensor | None = None

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
        return self.read(x).outputs

    def read(self, features: Tensor) -> Reading:
        """Outputs for features (…, F), and how like they are to those that were seen."""
        x = (features - self.mean) * self.scale
        unlike: Tensor | None = None
        if self.familiar is None:
            distance, centre = x.square().mean(-1), torch.zeros(x.shape[:-1], dtype=torch.long)
        else:
            distance, centre = self.familiar.nearest(x)
            unlike = self.familiar.unlike(features, distance)
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(x, weight, bias)
            if index < last:
                x = F.relu(x)
        return Reading(x if unlike is None else x.masked_fill(unlike.unsqueeze(-1), -torch.inf), distance, centre)

    def where_choosing(self, outputs: Tensor) -> Tensor:
        """What outputs (…, O) are if these prompts are answered with one of given choices."""
        return outputs if self.choosing is None else outputs + self.choosing.to(outputs.device)

    def without_limits(self) -> Network:
        """The same network, which takes every prompt for familiar."""
        return replace(self, familiar=None)

    @property
    def flops(self) -> int:
        """FLOPs of one prompt: 2 per multiply-accumulate of the products, distances to what is familiar included."""
        centres = 0 if self.familiar is None else 2 * self.familiar.centres.numel()
        return sum(2 * weight.numel() for weight in self.weights) + centres

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
        familiar = None if self.familiar is None else self.familiar.to(device)
        choosing = None if self.choosing is None else self.choosing.to(device)
        return Network(self.mean.to(device), self.scale.to(device), weights, biases, familiar, choosing)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as they are stored."""
        named = {"mean": self.mean, "scale": self.scale}
        named |= {f"weight.{index}": weight for index, weight in enumerate(self.weights)}
        named |= {f"bias.{index}": bias for index, bias in enumerate(self.biases)}
        named |= {} if self.familiar is None else self.familiar.tensors()
        named |= {} if self.choosing is None else {"choosing": self.choosing}
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
        choosing = tensors.get("choosing")
        if choosing is not None and choosing.shape != biases[-1].shape:
            raise ValueError(f"tensor 'choosing' has shape {tuple(choosing.shape)}, not {tuple(biases[-1].shape)}")
        return cls(mean, scale, weights, biases, Familiar.of(tensors, mean.shape[0]), choosing)
