"""Choose the next token from logits: first what a request may do to its own logits, then greedy or random sampling.

A hook may change the logits of a row, and the resulting log-probabilities may be read; both happen before temperature,
top-k and top-p, which mean the same as for Hugging Face's logits warpers. Every row has its own generator, so that a
seed gives the same answer alone and in a batch. Knows logits and token ids, no text and no requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch

from polar_sdk.engine import native
from polar_sdk.errors import LogitsHookError, SamplingError
from polar_sdk.reading import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import LogitsProcessor

LogitsHook = Callable[[Sequence[int], "Tensor"], "Tensor"]
"""Given the token ids sampled so far and the float32 logits (V,) of the next one, returns the logits (V,) to use.

−inf forbids a token; at least one must stay possible. The hook runs in the engine's thread between two tokens, so all
rows wait for it, and it must not call the model. It may change the logits in place.
"""
MAX_ALTERNATIVES: Final = 20
"""Maximum number of alternatives per token that `logprobs` may request."""
_GREEDY_BELOW: Final = 1e-5
"""Lower temperatures choose greedily: logits divided by less could leave the range of float32."""
_TYPES: Final[tuple[tuple[str, type, str], ...]] = (
    ("temperature", Real, "a number"),
    ("top_p", Real, "a number"),
    ("top_k", Integral, "a whole number"),
    ("min_p", Real, "a number"),
    ("seed", Integral, "a whole number"),
)
_UNSURE: Final = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.125}
"""Logits that differ by less may change places where sums are rounded differently, by the dtype of activations."""
_LIKELY: Final = (1e-4, 1e-5, 1e-35)
"""Top-p looks among tokens at least so likely beside the likeliest; by the next one, where one leaves too few."""
_NEARLY: Final = 1e-4
"""By so much the likeliest tokens must exceed top-p, so that rounding leaves none of them out."""
_MARGINS: Final = (6.0, 12.0, 24.0)
"""So far below the highest logit the likeliest tokens are looked for, the nearest first. Unit: nats."""
_NO_IDS: Final = torch.empty((1, 0), dtype=torch.long)
"""The warpers' signature requires the tokens so far; none of those used here reads them."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a sampled token was, by the logits after the hook and before temperature, top-k and top-p.

    Attributes:
        token: Id of the sampled token.
        logprob: Its log-probability. Unit: nats.
        top: The likeliest tokens at that place with their log-probabilities, likeliest first; as many as requested, or
            as are possible.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def apply_hook(hook: LogitsHook, tokens: Sequence[int], logits: Tensor) -> Tensor:
    """Let a hook change the logits (V,) of the token that follows `tokens`.

    Raises:
        LogitsHookError: It did not return logits, or allows no token. Its own errors pass through.
    """
    changed: Any = hook(tuple(tokens), logits)
    if not isinstance(changed, torch.Tensor) or changed.shape != logits.shape:
        what = f"shape {tuple(changed.shape)}" if isinstance(changed, torch.Tensor) else type(changed).__name__
        raise LogitsHookError(f"logits_hook returned {what}; it must return logits of shape {tuple(logits.shape)}.")
    # A copy, since a grammar strikes tokens out, and the hook may return the same tensor again.
    usable: Tensor = changed.to(device=logits.device, dtype=torch.float32, copy=True)
    if not math.isfinite(highest := float(usable.max())):  # nan and +inf win a maximum
        raise LogitsHookError(
            f"after {len(tokens)} tokens the highest logit that logits_hook returned is {highest}; it must leave at "
            "least one finite logit, and none that is nan or +inf."
        )
    return usable


def likeliest_tokens(logits: Tensor) -> tuple[list[int], list[float]]:
    """The likeliest token of each row of logits (B, V), and its logit: nan where any is nan, for nan wins a maximum."""
    if logits.device.type == "cpu":  # numpy takes half of torch's time, and wakes no threads
        values = logits.numpy()
        places = values.argmax(-1)
        return places.tolist(), values[np.arange(len(places)), places].tolist()
    tokens = logits.argmax(-1, keepdim=True)
    return tokens.squeeze(-1).tolist(), logits.gather(-1, tokens).squeeze(-1).tolist()


def near_ties(logits: Tensor, highest: Sequence[float], dtype: torch.dtype) -> list[bool]:
    """For each row of logits (B, V), whether another token comes so near to the likeliest that it might win elsewhere.

    Sums are rounded differently in passes of different sizes.

    Args:
        logits: They.
        highest: The highest of each row.
        dtype: In which the model computes.
    """
    bounds = torch.tensor(highest, device=logits.device) - _UNSURE.get(dtype, _UNSURE[torch.bfloat16])
    near: list[int] = (logits >= bounds.unsqueeze(1)).sum(-1).tolist()
    return [count > 1 for count in near]


def read_logprobs(logits: Tensor, token: int, alternatives: int) -> TokenLogprobs:
    """Log-probabilities of a sampled token and of the likeliest tokens, from logits (V,)."""
    likelihoods = logits.log_softmax(-1)
    best = likelihoods.topk(min(alternatives, likelihoods.shape[0]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = tuple((index, value) for index, value in pairs if value > -math.inf)  # a grammar may allow fewer
    return TokenLogprobs(token, float(likelihoods[token]), top)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings.

    Attributes:
        temperature: 0 (or less than 0.00001) chooses greedily; otherwise logits are divided by it.
        top_p: Keep the most likely tokens that together reach this probability; 1 keeps all.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        min_p: Keep tokens that are at least so likely beside the likeliest; 0 keeps all.
        seed: Makes sampling repeatable on one device; None draws a new one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, what in _TYPES:
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "seed" and value is None):
                raise SamplingError(f"{name}={shown(value)} is not {what}; pass one.")
        if not 0 <= self.temperature <= 100:  # nan is not either
            raise SamplingError(f"temperature={shown(self.temperature)} is out of range; use 0 (greedy) to 100.")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p={shown(self.top_p)} is out of range; use a number above 0 and at most 1.")
        if not 0 <= self.top_k < 2**63:
            raise SamplingError(f"top_k={shown(self.top_k)} is out of range; use 0 (off) or more.")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p={shown(self.min_p)} is out of range; use a number from 0 (off) to 1.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise SamplingError(f"seed={shown(self.seed)} is out of range; use a 64-bit integer.")


class Sampler:
    """The sampling state of one row.

    On a CPU the tokens that top-k or top-p can leave are picked out first, so that the rest works on a few hundred
    numbers and not on the whole vocabulary; which may be drawn, and how likely each is, stays the same. It is done by a
    native kernel and in numpy: torch would wake its threads for every step, which takes longer.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.greedy = sampling.temperature < _GREEDY_BELOW
        if self.greedy:
            return
        self._sampling = sampling
        self._filters = _filters(sampling)
        self._generator = torch.Generator(device=device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(int(sampling.seed))

    def __call__(self, logits: Tensor, allowed: NDArray[np.bool_] | None = None) -> int:
        """Choose one of V tokens.

        Args:
            logits: Float32, (V,); what is not allowed may be struck out of them.
            allowed: For each token whether it may be chosen, (V,); None = all may.

        Returns:
            A number below V.
        """
        if self.greedy:
            return int((logits if allowed is None else strike_out(logits, allowed)).argmax())
        at = torch.rand(1, generator=self._generator, dtype=torch.float64, device=logits.device)
        if logits.device.type == "cpu":
            return self.candidates(logits, allowed).draw(at.item())
        # A GPU filters all of them sooner than it is waited for to pick some.
        likelihoods = self._filtered(logits if allowed is None else strike_out(logits, allowed))
        sums = likelihoods.cumsum(-1, dtype=torch.float64)
        drawn = int(torch.searchsorted(sums, at * sums[-1], right=True))
        return drawn if drawn < len(likelihoods) else int(likelihoods.nonzero()[-1])  # rounded up to the whole sum

    def candidates(self, logits: Tensor, allowed: NDArray[np.bool_] | None = None) -> Candidates:
        """The tokens that may be drawn, and how likely each is; arguments as of a call, on a CPU."""
        settings, picked = self._sampling, None
        if settings.top_k:
            picked = _likeliest(logits.numpy(), settings, allowed)
        if picked is None and allowed is not None:
            strike_out(logits, allowed)
        if not settings.top_k and settings.top_p < 1:
            picked = _nucleus(logits, settings)
        elif not settings.top_k and settings.min_p:
            picked = Candidates(*_picked(logits, float(settings.temperature), float(settings.min_p))[:2])
        elif not settings.top_k:
            picked = _whole(logits, settings)
        if picked is None:
            return Candidates(self._filtered(logits).numpy(), None)
        if settings.min_p:
            picked = picked._replace(weights=picked.weights * (picked.weights >= settings.min_p))
        return picked

    def _filtered(self, logits: Tensor) -> Tensor:
        """The likelihoods (V,) that Hugging Face's warpers leave."""
        scores = logits.unsqueeze(0)
        for apply in self._filters:
            scores = apply(_NO_IDS, scores)
        return scores[0].softmax(-1)


class Candidates(NamedTuple):
    """N tokens that may be drawn."""

    weights: NDArray[np.float32]
    """How likely each is, (N,), in parts of their sum; what top-p leaves out has 0."""
    tokens: NDArray[np.int_] | None
    """Their ids, (N,); None = all V in order."""
    sums: NDArray[np.float64] | None = None
    """Sum of each block of weights; None = not known."""

    def draw(self, at: float) -> int:
        """The token where the sum of weights first exceeds a part of the whole, from 0 to below 1."""
        weights, begin = self.weights, 0
        if self.sums is not None:
            ends = self.sums.cumsum()
            place = at * float(ends[-1])
            block = _first_beyond(ends, place)
            at = max(0.0, place - float(ends[block] - self.sums[block])) / float(self.sums[block])
            begin = block * native.BLOCK
            weights = weights[begin : begin + native.BLOCK]
        sums = weights.cumsum(dtype=np.float64)
        drawn = begin + _first_beyond(sums, at * float(sums[-1]))
        return drawn if self.tokens is None else int(self.tokens[drawn])


def _first_beyond(sums: NDArray[np.float64], bound: float) -> int:
    """Index of the first of ascending sums (N,) that exceeds a bound, or where the last was reached by rounding."""
    return int(min(np.searchsorted(sums, bound, side="right"), np.searchsorted(sums, sums[-1])))


def _likeliest(scores: NDArray[np.float32], settings: Sampling, allowed: NDArray[np.bool_] | None) -> Candidates | None:
    """Keep what top-k, then top-p, leave of the allowed tokens, from logits (V,); as many more as tie with the last.

    None if no margin below the highest logit leaves k. torch's search for the k highest takes two to three times as
    long as comparing all.
    """
    count, highest = int(settings.top_k), scores.max()
    for margin in _MARGINS:
        near = scores >= highest - margin
        if allowed is not None:
            near &= allowed
        if np.count_nonzero(near) < count:
            continue
        tokens = np.flatnonzero(near)
        found = scores[tokens]
        kept = found >= np.partition(found, -count)[-count]
        weights, tokens = _weights(found[kept], float(settings.temperature)), tokens[kept]
        return _reaching(float(settings.top_p), tokens, weights, float(weights.sum(dtype=np.float64)))
    return None


def strike_out(logits: Tensor, allowed: NDArray[np.bool_]) -> Tensor:
    """Logits (V,) with −inf for what is not allowed, in place."""
    return logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), -torch.inf)


def _whole(logits: Tensor, settings: Sampling) -> Candidates:
    """All tokens, from logits (V,)."""
    temperature = float(settings.temperature)
    if native.is_loaded():
        weights, sums = native.weigh(logits, temperature)
        return Candidates(weights.numpy(), None, sums.numpy())
    found = _weights(logits.numpy(), temperature)
    return Candidates(found, None, np.add.reduceat(found, np.arange(0, len(found), native.BLOCK), dtype=np.float64))


def _nucleus(logits: Tensor, settings: Sampling) -> Candidates:
    """Keep what top-p leaves, from logits (V,)."""
    temperature, top_p = float(settings.temperature), float(settings.top_p)
    for least in _LIKELY:
        weights, tokens, total = _picked(logits, temperature, least)
        if weights.sum(dtype=np.float64) >= (top_p + _NEARLY) * total:
            break
    return _reaching(top_p, tokens, weights, total)


def _picked(logits: Tensor, temperature: float, least: float) -> tuple[NDArray[np.float32], NDArray[np.int_], float]:
    """Weights (N,) and ids (N,) of tokens that are at least so likely beside the likeliest; and the sum of all V."""
    if native.is_loaded():
        picked, numbers, total = native.pick(logits, temperature, least)
        return picked.numpy(), numbers.numpy(), total
    weights = _weights(logits.numpy(), temperature)
    tokens = np.flatnonzero(weights >= least)
    return weights[tokens], tokens, float(weights.sum())  # float32 will do, as numpy adds pairs of sums


def _weights(scores: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """How likely each token is beside the likeliest, (N,), from logits (N,)."""
    weights: NDArray[np.float32] = scores - scores.max()
    weights /= temperature
    np.exp(weights, out=weights)
    return weights


def _reaching(top_p: float, tokens: NDArray[np.int_], weights: NDArray[np.float32], total: float) -> Candidates:
    """The likeliest of N tokens that together reach a share of all tokens' weight, `total`; all N where that is 1."""
    if top_p < 1:
        falling = np.sort(weights)[::-1]
        count = int(np.searchsorted(falling.cumsum(dtype=np.float64), top_p * total)) + 1
        least = falling[min(count, len(falling)) - 1]
        kept = weights >= least
        if np.count_nonzero(kept) > count:  # of tokens that tie there, the first stay
            kept[np.flatnonzero(weights == least)[count - np.count_nonzero(weights > least) :]] = False
        weights = weights * kept
    return Candidates(weights, tokens)


def _filters(sampling: Sampling) -> list[LogitsProcessor]:
    """The processors of logits, in this order."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]  # it refuses the int 1
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(int(sampling.top_k)))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(float(sampling.min_p)))
    return warpers
