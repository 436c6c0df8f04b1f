"""Sampling: likelihoods are Hugging Face's, though only the tokens that may be drawn are filtered."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from polar_sdk.engine.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")
TIED = st.sampled_from([0.0, 0.125, 1.0])
"""The distance between logits: 1 makes many tie, as bfloat16 does; 0 leaves them as they are."""


def random_logits(size: int, seed: int, spread: float, grid: float) -> Tensor:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    return (logits / grid).round() * grid if grid else logits


def likelihoods_of_hugging_face(sampling: Sampling, logits: Tensor) -> Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    scores: Tensor = warpers(cast("torch.LongTensor", torch.empty((1, 0), dtype=torch.long)), logits[None])
    return scores[0].softmax(-1)


def likelihoods_of_ours(sampling: Sampling, logits: Tensor) -> Tensor:
    likelihoods, tokens = Sampler(sampling, CPU).likelihoods(logits)
    return likelihoods if tokens is None else torch.zeros_like(logits).scatter(0, tokens, likelihoods)


class TestLikelihoods:
    @given(
        size=st.integers(1, 6000),
        seed=st.integers(0, 2**32),
        spread=st.floats(0.01, 20),
        grid=TIED,
        temperature=st.floats(0.05, 5),
        top_k=st.one_of(st.just(0), st.integers(1, 400)),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    )
    def test_they_are_those_of_hugging_face(
        self, size: int, seed: int, spread: float, grid: float, temperature: float, top_k: int, top_p: float
    ) -> None:
        sampling, logits = Sampling(temperature, top_p, top_k), random_logits(size, seed, spread, grid)
        ours, theirs = likelihoods_of_ours(sampling, logits), likelihoods_of_hugging_face(sampling, logits)
        if top_p == 1:
            assert torch.allclose(ours, theirs, atol=1e-6)
        # Which of several tied tokens top-p keeps is not said, and rounding may keep one more or one fewer: so the
        # likelihoods are compared in order, up to the one at the edge.
        kept = int((theirs > 0).sum())
        assert abs(int((ours > 0).sum()) - kept) <= 1
        edge = float(theirs[theirs > 0].min())
        assert torch.allclose(ours.sort().values, theirs.sort().values, atol=2 * edge + 1e-6)

    def test_a_token_that_is_forbidden_is_never_likely(self) -> None:
        logits = random_logits(5000, 0, 3, 0).index_fill(0, torch.arange(0, 4990), -math.inf)
        for sampling in (Sampling(1.0), Sampling(1.0, top_k=50), Sampling(1.0, top_p=0.9), Sampling(0.5, 0.9, 50)):
            assert set(likelihoods_of_ours(sampling, logits).nonzero().flatten().tolist()) <= set(range(4990, 5000))


class TestDraws:
    @pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.3, top_k=40), Sampling(0.9, top_p=0.8)], ids=str)
    def test_tokens_come_as_often_as_they_are_likely(self, sampling: Sampling) -> None:
        logits, draws = random_logits(3000, 1, 3, 0), 20_000
        expected = likelihoods_of_hugging_face(sampling, logits) * draws
        sampler = Sampler(Sampling(sampling.temperature, sampling.top_p, sampling.top_k, seed=7), CPU)
        counts = Counter(sampler(logits) for _ in range(draws))
        often = [token for token in range(len(logits)) if expected[token] >= 10]
        seen = [float(counts[token]) for token in often] + [float(draws - sum(counts[token] for token in often))]
        due = [float(expected[token]) for token in often]
        due.append(draws - sum(due))
        if due[-1] < 1e-3:  # every token that may come comes often
            assert seen.pop() == 0
            due.pop()
            due = [count * draws / sum(due) for count in due]
        assert len(often) > 10
        assert chisquare(seen, due).pvalue > 0.001

    def test_a_seed_repeats_itself(self) -> None:
        logits = random_logits(3000, 2, 3, 0)
        first, second = (Sampler(Sampling(1.0, seed=5), CPU) for _ in range(2))
        assert [first(logits) for _ in range(20)] == [second(logits) for _ in range(20)]

    def test_what_is_impossible_is_not_drawn(self) -> None:
        logits = torch.full((4000,), -math.inf)
        logits[[17, 3999]] = 0.0
        sampler = Sampler(Sampling(1.0, seed=0), CPU)
        assert {sampler(logits) for _ in range(50)} == {17, 3999}
