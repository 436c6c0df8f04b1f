"""What a request may ask of its own logits: a hook that changes them, and the log-probabilities that result.

Both act on one row before temperature, top-k and top-p. Rows that ask for neither never come here. Knows logits and
token ids, no text and no requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from polar_sdk.errors import LogitsHookError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MOST_ALTERNATIVES", "LogitsHook", "TokenLogprobs", "apply_hook", "read_logprobs"]

LogitsHook = Callable[[Sequence[int], "Tensor"], "Tensor"]
"""Given the token ids sampled so far and the float32 logits (V,) of the next one, returns the logits (V,) to use.

−inf forbids a token; at least one must stay possible. It runs in the engine's thread between two tokens, so all rows
wait for it, and it must not call the model. The logits given are its own to change.
"""
MOST_ALTERNATIVES: Final = 20
"""Most alternatives per token that `logprobs` may ask for."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a sampled token was, by the logits after the hook and before temperature, top-k and top-p.

    Attributes:
        token: Id of the sampled token.
        logprob: Its log-probability. Unit: nats.
        top: The likeliest tokens at that place and their log-probabilities, likeliest first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def apply_hook(hook: LogitsHook, tokens: Sequence[int], logits: Tensor) -> Tensor:
    """Let a hook change the logits (V,) of the token that follows `tokens`.

    Raises:
        LogitsHookError: What it returned is no logits, or allows no token. An error of its own passes through.
    """
    changed: Any = hook(tuple(tokens), logits)
    if not isinstance(changed, torch.Tensor) or changed.shape != logits.shape:
        what = tuple(changed.shape) if isinstance(changed, torch.Tensor) else type(changed).__name__
        raise LogitsHookError(f"the logits_hook returned {what}; it must return logits of shape {tuple(logits.shape)}.")
    usable: Tensor = changed.to(device=logits.device, dtype=torch.float32)
    if not math.isfinite(highest := float(usable.max())):  # nan and +inf win a maximum
        raise LogitsHookError(
            f"after {len(tokens)} tokens the logits_hook left {highest} as the highest logit; it must leave at least "
            "one finite logit, and none that is nan or +inf."
        )
    return usable


def read_logprobs(logits: Tensor, token: int, alternatives: int) -> TokenLogprobs:
    """Log-probabilities of a sampled token and of the likeliest tokens, from logits (V,)."""
    likelihoods = logits.log_softmax(-1)
    best = likelihoods.topk(min(alternatives, likelihoods.shape[0]))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(token, float(likelihoods[token]), top)
