"""Recognises a topic in a prompt's tokens by the model's own embeddings, from a few examples.

A text is the mean of its tokens' embeddings, in which frequent tokens weigh less; what ordinary prompts have in common,
and the few directions in which they differ most, are removed. A prompt is about the topic if a window of a few words
points in the direction of the examples, so surrounding text cannot hide it, but other words can. This costs look-ups
and sums, and no product. Knows tokens and embeddings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import TYPE_CHECKING, Final, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder

_WINDOW: Final = 12
"""Unit: tokens."""
_STRIDE: Final = 3
_RARE: Final = 1e-3
"""Share of all tokens from which on a token weighs less than half."""
_BEGINNING: Final = 400
"""Length of a long ordinary prompt. Unit: characters."""
_COMMON: Final = 3
"""Directions that are taken out."""
_UNLIKE: Final = 0.5
"""How much of the direction of texts that are unlike is taken off that of the examples."""
_ORDINARY: Final = (0.02, 0.1)
"""Share of ordinary prompts that may be taken for the topic: in any case, and at most, to find more examples."""
_FOUND: Final = 0.95
"""Share of examples that are to be found, as long as the second of these allows it."""


@dataclass(frozen=True)
class Texts:
    """How texts are compared on one model.

    Attributes:
        decoder: The model's weights.
        ordinary: Tokens of prompts about everything, of a long one its beginning.
    """

    decoder: Decoder
    ordinary: Sequence[Sequence[int]]

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Directions of the windows of a text, (N, H), each of length 1."""
        return self.of([tokens])[0]

    def of(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The same of several texts."""
        counts, means = self._means(texts)
        states = means - self._centre
        states = states - states @ self._common.T @ self._common
        return list((states / states.norm(dim=-1, keepdim=True).clamp(min=1e-9)).split(counts))

    @cached_property
    def windows(self) -> list[Tensor]:
        """Directions of the ordinary prompts."""
        return self.of(self.ordinary)

    @cached_property
    def _weights(self) -> Tensor:
        """The weight of each token, (V,)."""
        tokens = torch.tensor([token for row in self.ordinary for token in row])
        counts = torch.bincount(tokens, minlength=self.decoder.vocab)
        return (_RARE / (_RARE + counts / counts.sum())).double()

    @cached_property
    def _plain(self) -> Tensor:
        return self._means(self.ordinary)[1]

    @cached_property
    def _centre(self) -> Tensor:
        return self._plain.mean(0)

    @cached_property
    def _common(self) -> Tensor:
        """The directions of largest variance, (3, H)."""
        spread = self._plain - self._centre
        vectors: Tensor = torch.linalg.eigh(spread.T @ spread).eigenvectors
        return vectors[:, -_COMMON:].T

    @torch.inference_mode()
    def _means(self, texts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Number of windows of each text, and weighted means of the embeddings in each window, of all texts (N, H)."""
        starts, ends, counts, first = list[int](), list[int](), list[int](), 0
        for text in texts:
            size = min(_WINDOW, len(text))
            own = range(first, first + len(text) - size + 1, _STRIDE)
            starts += own
            ends += [start + size for start in own]
            counts.append(len(own))
            first += len(text)
        ids = torch.tensor([token for text in texts for token in text])
        distinct, places = torch.unique(ids, return_inverse=True)
        on = distinct.to(self.decoder.device)
        embedded = self.decoder.embed(on, torch.zeros_like(on)).double().cpu()
        weights = self._weights[distinct].unsqueeze(1)
        total = torch.cat((embedded * weights, weights), 1)[places].cumsum(0)
        total = torch.cat((torch.zeros_like(total[:1]), total))
        sums = total[ends] - total[starts]
        return counts, (sums[:, :-1] / sums[:, -1:]).float()


@dataclass(frozen=True)
class TopicGate:
    """A topic, as a direction.

    Attributes:
        texts: How texts are compared.
        direction: Of the examples, (H,).
        threshold: Least cosine of a window about the topic.
        found: Share of the examples that the others recognise.
        ordinary: Share of ordinary prompts that are taken for it.
    """

    texts: Texts
    direction: Tensor
    threshold: float
    found: float
    ordinary: float

    @classmethod
    def of(cls, texts: Texts, about: Sequence[Sequence[int]], unlike: Sequence[Sequence[int]]) -> Self:
        """A gate from the tokens of examples, at least two, and of texts that are not about it."""
        windows = texts.of(about)
        means = torch.stack([own.mean(0) for own in windows])
        other = _UNLIKE * torch.stack([own.mean(0) for own in texts.of(unlike)]).mean(0) if unlike else 0.0
        # Each example is judged by a direction that it has no part in.
        left = [means[torch.arange(len(means)) != place].mean(0) - other for place in range(len(means))]
        own = torch.stack([(rows @ (way / way.norm())).max() for rows, way in zip(windows, left, strict=True)])
        direction = means.mean(0) - other
        direction = direction / direction.norm()
        others = torch.stack([(rows @ direction).max() for rows in texts.windows])
        few, many = (torch.quantile(others, 1 - share) for share in _ORDINARY)
        threshold = torch.minimum(few, torch.quantile(own, 1 - _FOUND)).maximum(many)
        shares = [float((values >= threshold).float().mean()) for values in (own, others)]
        return cls(texts, direction, float(threshold), *shares)

    def about(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt is about the topic."""
        return bool((self.texts(tokens) @ self.direction).max() >= self.threshold)


def ordinary_prompts() -> list[str]:
    """The prompts that come with the package, of long ones the beginning: about everything."""
    text = (resources.files("polar_sdk") / "shipped" / "prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"][:_BEGINNING] for line in text.splitlines()]
