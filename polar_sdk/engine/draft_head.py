"""A draft head: a small network that guesses what a model says next, token by token. No training here.

It reads the state of the last token that ran and the token sampled after it, and computes its own state, from which it
guesses a token; that state and that token give the next one, and so on (Zhang et al. 2024, "Recurrent Drafter",
arXiv:2403.09919). It has no history, so nothing has to be kept for it between passes. It guesses only tokens that are
frequent in the model's answers, with the rows of the model's own head. Knows tensors; no request.

It comes in two forms: `DraftHead` runs by torch's operations and can be trained, `NativeDraftHead` runs in the native
library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine import native
from polar_sdk.engine.large_pages import LargePages
from polar_sdk.engine.maps import normalise
from polar_sdk.engine.panels import PackedInt8
from polar_sdk.engine.products import Plain, multiply, pack, quantize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.products import Embedding, Product


MAX_GUESSES: Final = 5
"""Maximum number of tokens guessed one after another."""
MIN_PATH: Final = 0.15
"""Guesses end where all of them being right is less likely."""
Embed = Callable[["Tensor"], "Tensor"]
"""The embeddings (B, E) of tokens (B,)."""


class Guess(NamedTuple):
    """A token, and how likely it is to follow, if all guesses before it are right."""

    token: int
    chance: float


@dataclass(frozen=True, eq=False)
class DraftHead:
    """Guesses tokens, each from a state and the token after it.

    From state s and the embedding e of that token it makes u = W [n(s), n(e)], where n divides by the root mean square,
    and the state after it, u + D (silu(G n(u)) × U n(u)).

    Attributes:
        tokens: Those that it can guess, (C,), int64.
        scale: What n(state) is multiplied by before its product with `rows`, (E,).
        enter: W, (E, 2 E).
        gated: G above U, (2 H, E).
        down: D, (E, H).
        rows: What tokens are guessed by, (C + 1, E): the rows of the model's head, and last, for all other tokens
            together, one of its own.
    """

    tokens: Tensor
    scale: Tensor
    enter: Product
    gated: Product
    down: Product
    rows: Product

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rows: Tensor) -> DraftHead:
        """From tensors by the names of the attributes and `other` (E,), and the rows (C, E) of the model's head."""
        every = torch.cat((rows, tensors["other"][None]))
        matrices = (Plain(each) for each in (tensors["enter"], tensors["gated"], tensors["down"], every))
        return cls(tensors["tokens"], tensors["scale"], *matrices)

    def step(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """The states (B, E) after tokens with these embeddings (B, E)."""
        entered = multiply(torch.cat((normalise(states), normalise(embeddings)), -1), self.enter)
        gate, up = multiply(normalise(entered), self.gated).chunk(2, -1)
        return entered + multiply(F.silu(gate) * up, self.down)

    def logits(self, states: Tensor) -> Tensor:
        """Float32 logits (B, C + 1) of the token that follows each state (B, E): last, of all that are not `tokens`."""
        return multiply(normalise(states) * self.scale, self.rows).float()

    def likeliest(self, states: Tensor, embeddings: Tensor) -> tuple[Tensor, list[Guess]]:
        """The states (B, E) after tokens with these embeddings, and the likeliest token after each."""
        after = self.step(states, embeddings)
        chances, places = self.logits(after).softmax(-1)[:, :-1].max(-1)
        return after, [Guess(*each) for each in zip(self.tokens[places].tolist(), chances.tolist(), strict=True)]

    def guess(self, states: Tensor, tokens: Sequence[int], most: int, embed: Embed) -> list[list[Guess]]:
        """Guess what follows each of some tokens, one after another.

        Args:
            states: Before each token, (B, E).
            tokens: B.
            most: How many guesses for each, at most; they end where no row's are likely to be all right.
            embed: Of the model.

        Returns:
            For each token equally many guesses.
        """
        guesses: list[list[Guess]] = [[] for _ in tokens]
        while not guesses[0] or (len(guesses[0]) < most and _may_be_right(guesses)):
            states, found = self.likeliest(states, embed(torch.tensor(tokens)))
            tokens = [guess.token for guess in found]
            for row, guess in zip(guesses, found, strict=True):
                row.append(guess)
        return guesses


class NativeDraftHead:
    """A draft head that makes all guesses of a pass in one call of the native library, by matrices in int8.

    Of a guess by torch's operations, what is between its four products takes as long as these; and int8 takes two
    thirds of their time, while as many guesses are right (`benchmarks/LOG.md`).

    Args:
        head: The same by torch's operations, in bfloat16.
        embedding: The model's, (V, E).
    """

    def __init__(self, head: DraftHead, embedding: Embedding) -> None:
        memory, matrices = LargePages(), list[native.Matrix]()
        for each in (head.enter, head.gated, head.down, head.rows):
            assert isinstance(each, Plain)
            packed = memory.matrix(pack(quantize(each, "int8")))
            assert isinstance(packed, PackedInt8)
            matrices.append(packed.matrix(each.weight.shape[1]))
        width = head.scale.shape[0]
        matrices.append(
            native.Matrix("rows", embedding, head.scale.new_zeros(embedding.shape[0]), width)
            if isinstance(embedding, torch.Tensor)
            else embedding.matrix(width)
        )
        self._head = native.Guesses(head.tokens, head.scale, matrices)

    def guess(self, states: Tensor, tokens: Sequence[int], most: int) -> list[list[Guess]]:
        """`DraftHead.guess`, with its arguments and result."""
        found, chances = self._head.guess(states, tokens, most, MIN_PATH)
        return [list(map(Guess, *row)) for row in zip(found, chances, strict=True)]


def _may_be_right(guesses: Sequence[Sequence[Guess]]) -> bool:
    """Whether all guesses of a row are likely enough to be right to guess more."""
    return max(prod(guess.chance for guess in row) for row in guesses) >= MIN_PATH


def head_flops(width: int, units: int, tokens: int) -> int:
    """FLOPs of a guess by a head of these sizes (E, H, C): 2 per multiply-accumulate of its products."""
    return 2 * width * (2 * width + 3 * units + tokens + 1)
