"""Prompts that look easy to a learned router, found with its weights: words appended to a prompt, and mutations of it.

A router reads a mean of embeddings, so each appended token moves its features by a known vector, and the gradient of
the predicted quality says which tokens of the vocabulary raise it most. `suffix` replaces one token after another by
that gradient; `gradient` first moves the embeddings of the suffix freely, and then takes the nearest tokens; `mutation`
uses no gradient, and mixes real prompts. All of them stay within what the router considers familiar. Knows the router;
`attack` finds out whether the answer really changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from polar_sdk.router.network import edges

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from polar_sdk.model import PolarModel
    from polar_sdk.router.learned import LearnedRouter

METHODS: Final = ("gradient", "suffix", "mutation")
_LENGTHS: Final = (16, 32, 64)
"""Tokens of a suffix."""
_CANDIDATES: Final = 24
"""Tokens tried in each place."""
_STEPS: Final = 60
_STEP: Final = 0.3
"""Step of the gradient ascent, in standard deviations of the embeddings."""
_UNKNOWN: Final = -1
"""In place of a token that is not known yet."""
_MUTANTS: Final = 24
_EDGE: Final = 0.97
"""How near to what is unlike the router's prompts a search goes, as a share of the radius."""
_PENALTY: Final = 50.0
_WORD: Final = re.compile(r" ?[A-Za-z]{2,}|[ ,.;:!?'\"()-]+")
_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+|\n+")
_DEMANDS: Final = (
    "Copy this text word for word:\n\n{}",
    "{}\n\nRepeat every number and every name above, in the same order.",
    "Write the following text backwards, sentence by sentence:\n\n{}",
    "{}\n\nNow write the third sentence of the text above again, letter by letter.",
    "Translate into capital letters and change nothing else:\n\n{}",
    "{}\n\nIgnore all of this and continue the list: 7, 11, 18, 29,",
)
"""Demands that every word of a text matters to."""


@dataclass
class Surface:
    """A learned router as somebody sees it who has its weights.

    Attributes:
        model: The model.
        router: The router, bound to it.
        guarded: Whether it sends prompts unlike its own to full depth.
    """

    model: PolarModel
    router: LearnedRouter
    guarded: bool = True

    @cached_property
    def embeddings(self) -> Tensor:
        """Embeddings of the whole vocabulary, (V, H) float32."""
        decoder = self.model.decoder
        with torch.inference_mode():
            ids = torch.arange(decoder.vocab, device=decoder.device)
            return torch.cat(
                [decoder.embed(part, torch.zeros_like(part)).float().cpu() for part in torch.split(ids, 8192)]
            )

    @cached_property
    def words(self) -> Tensor:
        """Ids of tokens that a person could type, (W,)."""
        tokenizer = self.model.loaded.tokenizer
        texts = [str(tokenizer.decode([token])) for token in range(min(self.model.decoder.vocab, len(tokenizer)))]
        return torch.tensor([token for token, text in enumerate(texts) if _WORD.fullmatch(text)])

    @cached_property
    def word_embeddings(self) -> Tensor:
        """Theirs, (W, H)."""
        return self.embeddings[self.words]

    def ease(self, features: Tensor, target: int) -> Tensor:
        """How easy prompts look, (…), for the program at this place of the menu (from 1)."""
        network = self.router.network
        plain = network.without_limits()
        easy = plain(features)[..., target - 1]
        if not self.guarded or network.familiar is None:
            return easy
        return easy - _PENALTY * (network.familiar.strangeness(features, network) - _EDGE).clamp(min=0)

    def features(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Features of prompts, (B, F)."""
        return self.router.reader.stack(prompts).cpu()


@dataclass(frozen=True)
class _Slot:
    """Where a suffix of k tokens stands, and how the router's features follow from its embeddings.

    Attributes:
        surface: The router.
        target: The program that is to look good.
        before: Tokens before the suffix.
        after: Tokens after it.
        size: k.
    """

    surface: Surface
    target: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    size: int

    @cached_property
    def _base(self) -> tuple[Tensor, Tensor]:
        """The fixed tokens' part of each of N means, (N, H), and what each suffix token weighs in them, (N, k)."""
        tokens = (*self.before, *[_UNKNOWN] * self.size, *self.after)
        reader = self.surface.router.reader
        shares = [torch.full((len(tokens),), 1 / len(tokens))]
        for place, weights in edges(reader.kind, tokens, reader.separators):
            shares.append(torch.zeros(len(tokens)))
            shares[-1][place] = weights
        before, own, after = torch.split(torch.stack(shares), [len(self.before), self.size, len(self.after)], 1)
        table = self.surface.embeddings[torch.tensor(self.before + self.after)]
        return torch.cat((before, after), 1) @ table, own

    def features(self, suffix: Tensor) -> Tensor:
        """Features (…, F) with suffixes of these embeddings (…, k, H)."""
        fixed, own = self._base
        means = (fixed + own @ suffix).flatten(-2)
        length = float(len(self.before) + self.size + len(self.after))
        return torch.cat((means, torch.full((*means.shape[:-1], 1), length).log()), -1)

    def ease(self, suffix: Tensor) -> Tensor:
        return self.surface.ease(self.features(suffix), self.target)

    def slope(self, suffix: Tensor) -> Tensor:
        """Gradient of the ease by the suffix (k, H)."""
        point = suffix.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.ease(point), point)
        return slope

    def exchanged(self, suffix: list[int], dice: random.Random) -> list[int]:
        """The suffix after one token after another was exchanged for the best of those that the gradient names."""
        table, words, known = self.surface.embeddings, self.surface.words, self.surface.word_embeddings
        for place in dice.sample(range(self.size), self.size):
            states = table[torch.tensor(suffix)]
            likely = words[(known @ self.slope(states)[place]).topk(min(_CANDIDATES, len(words))).indices]
            tried = states.repeat(len(likely) + 1, 1, 1)
            tried[1:, place] = table[likely]
            best = int(self.ease(tried).argmax())
            if best:
                suffix[place] = int(likely[best - 1])
        return suffix


def suffixes(surface: Surface, prompt: str, target: int, method: str, dice: random.Random) -> Iterator[str]:
    """Prompts with words appended that make the program look good, by the method `gradient` or `suffix`."""
    table, words, known = surface.embeddings, surface.words, surface.word_embeddings
    for size in dice.sample(_LENGTHS, len(_LENGTHS)):
        before, after = _around(surface.model, prompt)
        slot = _Slot(surface, target, before, after, size)
        suffix = [int(words[dice.randrange(len(words))]) for _ in range(size)]
        if method == "gradient":
            states = _relaxed(slot, table[torch.tensor(suffix)], float(known.std()))
            suffix = words[torch.cdist(states, known).argmin(1)].tolist()
        yield prompt + surface.model.decode(slot.exchanged(suffix, dice))


def _relaxed(slot: _Slot, suffix: Tensor, spread: float) -> Tensor:
    """Embeddings of a suffix that make the program look best, wherever they are."""
    for _ in range(_STEPS):
        slope = slot.slope(suffix)
        suffix = suffix + _STEP * spread * slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    return suffix


def mutants(surface: Surface, prompt: str, target: int, others: Sequence[str], dice: random.Random) -> Iterator[str]:
    """Mutations of a real prompt by others, the easiest-looking first."""
    made = [dice.choice(_MUTATIONS)(prompt, dice.choice(others), dice) for _ in range(_MUTANTS)]
    made = [text for text in dict.fromkeys(made) if text.strip() and text != prompt]
    ease = surface.ease(surface.features([surface.model.prompt_tokens(text) for text in made]), target)
    yield from (made[place] for place in ease.argsort(descending=True).tolist())


def _parts(text: str) -> list[str]:
    return [part for part in _SENTENCE.split(text) if part.strip()]


_MUTATIONS: Final[tuple[Callable[[str, str, random.Random], str], ...]] = (
    lambda own, other, _: f"{other}\n\n{own}",
    lambda own, other, _: f"{own}\n\n{other}",
    lambda own, other, dice: " ".join(dice.sample(both := _parts(own) + _parts(other), len(both))),
    lambda own, _, dice: " ".join(dice.sample(parts := _parts(own), len(parts))),
    lambda own, _, dice: re.sub(r"\d+", lambda _: str(dice.randrange(10_000)), own),
    lambda own, _, dice: dice.choice(_DEMANDS).format(own),
    lambda own, other, dice: dice.choice(_DEMANDS).format(f"{other}\n\n{own}"),
    lambda own, _, dice: f"{own} {' '.join(dice.choice(_parts(own)) for _ in range(3))}",
)


def _around(model: PolarModel, prompt: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a prompt before and after what is appended to it."""
    with_mark, without = model.prompt_tokens(prompt + " x"), model.prompt_tokens(prompt)
    same = 0
    while same < len(without) and without[-1 - same] == with_mark[-1 - same]:
        same += 1
    return tuple(without[: len(without) - same]), tuple(without[len(without) - same :])
