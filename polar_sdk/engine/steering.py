"""How the tokens so far influence the next one, by a request's options: biases, penalties, forbidden ends, repetition.

Penalties mean the same as for OpenAI (`presence`, `frequency`: of the answer) and for Hugging Face and vLLM
(`repetition`: of prompt and answer). Knows token ids and logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_LONGEST: Final = 64
"""Longest part that is looked for. Unit: tokens."""
_SHORTEST: Final = 16
"""Repeated parts end an answer once they have N tokens together: shorter ones, such as digits, are common."""


@dataclass(frozen=True, slots=True)
class Steering:
    """A change of logits.

    Attributes:
        bias: Added to the logits of tokens, by their ids.
        presence: Taken off the logit of a token that was sampled.
        frequency: Taken off for each time that it was.
        repetition: Divides the logit of a token of prompt or answer, or multiplies it where negative; 1 = nothing.
        forbidden: Tokens that are never chosen.
    """

    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    forbidden: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return self != Steering()

    def __call__(self, prompt: Sequence[int], tokens: Sequence[int], logits: Tensor) -> Tensor:
        """Change logits (V,), in place, after a prompt and the tokens of its answer so far."""
        if self.repetition != 1:
            seen = torch.tensor(list({*prompt, *tokens}), device=logits.device)
            found = logits[seen]
            logits[seen] = torch.where(found > 0, found / self.repetition, found * self.repetition)
        if tokens and (self.presence or self.frequency):
            sampled = torch.tensor(tokens, device=logits.device)
            counts = torch.zeros_like(logits).index_add_(0, sampled, torch.ones_like(sampled, dtype=logits.dtype))
            logits -= self.frequency * counts + self.presence * (counts > 0)
        for token, bias in self.bias.items():
            if token < len(logits):
                logits[token] += bias
        if self.forbidden:
            logits[list(self.forbidden)] = -torch.inf
        return logits


class Repeats:
    """Sees when the last tokens of an answer are one part, repeated.

    Args:
        times: How often it must be there.
    """

    def __init__(self, times: int) -> None:
        self._least = np.maximum(times * np.arange(1, _LONGEST + 1), _SHORTEST) - np.arange(1, _LONGEST + 1)
        self._runs = np.zeros(_LONGEST, dtype=np.int64)
        """For each length of a part, how many of the last tokens are as that many before them."""

    def follow(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens end so; called after each token."""
        before = np.full(_LONGEST, -1)
        earlier = tokens[-_LONGEST - 1 : -1]
        before[: len(earlier)] = earlier[::-1]
        self._runs = (self._runs + 1) * (before == tokens[-1])
        return bool((self._runs >= self._least).any())
