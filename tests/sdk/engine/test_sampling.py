"""Sampling: likelihoods are Hugging Face's, though only the tokens that may be drawn are filtered."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from polar_sdk.engine import native as library
from polar_sdk.engine.sampling import Candidates, Sampler, Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

CPU = torch.device("cpu")
TIED = st.sampled_from([0.0, 0.125, 1.0])
"""The distance between logits: 1 makes many tie, as bfloat16 does; 0 leaves them as they are."""


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    """The native library, in this process from now on, where there is one for the processor."""
    library.load_library(torch.bfloat16, CPU)


@contextmanager
def unless(native: bool) -> Iterator[None]:
    """Within the block there is no native library, unless it is wanted."""
    used = dict(library._loaded)
    if not native:
        library._loaded.clear()
    try:
        yield
    finally:
        library._loaded.update(used)


def random_logits(size: int, seed: int, spread: float, grid: float) -> Tensor:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    return (logits / grid).round() * grid if grid else logits


def likelihoods_of_hugging_face(sampling: Sampling, logits: Tensor) -> Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    scores: Tensor = warpers(cast("torch.LongTensor", torch.empty((1, 0), dtype=torch.long)), logits[None])
    return scores[0].softmax(-1)


def likelihoods_of_ours(sampling: Sampling, logits: Tensor) -> Tensor:
    found = Sampler(sampling, CPU).candidates(logits)
    likelihoods = torch.from_numpy(found.weights / found.weights.sum(dtype=np.float64)).float()
    if found.tokens is None:
        return likelihoods
    return torch.zeros_like(logits).scatter(0, torch.from_numpy(found.tokens), likelihoods)


class TestLikelihoods:
    @given(
        native=st.booleans(),
        size=st.integers(1, 6000),
        seed=st.integers(0, 2**32),
        spread=st.floats(0.01, 20),
        grid=TIED,
        temperature=st.floats(0.05, 5),
        top_k=st.one_of(st.just(0), st.integers(1, 400)),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
        min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
    )
    def test_they_are_those_of_hugging_face(
        self,
        native: bool,
        size: int,
        seed: int,
        spread: float,
        grid: float,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
    ) -> None:
        sampling, logits = Sampling(temperature, top_p, top_k, min_p), random_logits(size, seed, spread, grid)
        with unless(native):
            ours = likelihoods_of_ours(sampling, logits)
        theirs = likelihoods_of_hugging_face(sampling, logits)
        if top_p == 1:
            assert torch.allclose(ours, theirs, atol=1e-6)
        # Which of several tied tokens top-p keeps is not said, and rounding may keep one more or one fewer: so the
        # likelihoods are compared in order, up to the one at the edge.
        kept = int((theirs > 0).sum())
        assert abs(int((ours > 0).sum()) - kept) <= 1
        edge = float(theirs[theirs > 0].min())
        assert torch.allclose(ours.sort().values, theirs.sort().values, atol=2 * edge + 1e-6)

    @pytest.mark.parametrize("native", [False, True])
    def test_a_token_that_is_forbidden_is_never_likely(self, native: bool) -> None:
        logits = random_logits(5000, 0, 3, 0).index_fill(0, torch.arange(0, 4990), -math.inf)
        for sampling in (Sampling(1.0), Sampling(1.0, top_k=50), Sampling(1.0, top_p=0.9), Sampling(0.5, 0.9, 50)):
            with unless(native):
                likely = likelihoods_of_ours(sampling, logits).nonzero().flatten().tolist()
            assert set(likely) <= set(range(4990, 5000))

    @pytest.mark.parametrize("native", [False, True])
    def test_top_p_keeps_as_many_of_tied_tokens_as_it_needs(self, native: bool) -> None:
        logits = torch.zeros(4000)
        logits[:10] = 3.0
        with unless(native):
            likelihoods = likelihoods_of_ours(Sampling(1.0, top_p=0.5), logits)
        likely = likelihoods.nonzero().flatten().tolist()
        reached = math.ceil((0.5 * (10 * math.exp(3) + 3990) - 10 * math.exp(3)) - 1e-6)
        assert likely == list(range(10 + reached))

    @pytest.mark.parametrize("native", [False, True])
    def test_top_p_of_tokens_that_are_all_unlikely_beside_one(self, native: bool) -> None:
        logits = torch.full((40_000,), -12.0)
        logits[7] = 0.0
        with unless(native):
            likelihoods = likelihoods_of_ours(Sampling(1.0, top_p=0.95), logits)
        kept = int((likelihoods > 0).sum())
        assert kept == pytest.approx((0.95 * (1 + 39_999 * math.exp(-12)) - 1) / math.exp(-12) + 1, abs=1)


class TestDraws:
    @pytest.mark.parametrize("native", [False, True])
    @pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.3, top_k=40), Sampling(0.9, top_p=0.8)], ids=str)
    def test_tokens_come_as_often_as_they_are_likely(self, sampling: Sampling, native: bool) -> None:
        logits, draws = random_logits(3000, 1, 3, 0), 20_000
        expected = likelihoods_of_hugging_face(sampling, logits) * draws
        sampler = Sampler(Sampling(sampling.temperature, sampling.top_p, sampling.top_k, seed=7), CPU)
        with unless(native):
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

    @given(
        weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.1, 1.0]), min_size=1, max_size=2000),
        at=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
        blocks=st.booleans(),
    )
    def test_whatever_is_drawn_is_possible(self, weights: list[float], at: float, blocks: bool) -> None:
        found = np.array([*weights, 1.0, 0.0], dtype=np.float32)
        sums = np.add.reduceat(found, np.arange(0, len(found), library.BLOCK), dtype=np.float64)
        drawn = Candidates(found, None, sums.astype(np.float32).astype(np.float64) if blocks else None).draw(at)
        assert found[drawn] > 0
        assert found[:drawn].sum(dtype=np.float64) <= (at + 1e-6) * found.sum(dtype=np.float64)

    @pytest.mark.parametrize("at", [0.0, 0.25, 0.5, 1 - 2**-53])
    def test_a_draw_at_the_edges(self, at: float) -> None:
        """Between two tokens the second one comes; the end of all is the last that may be drawn."""
        weights = np.zeros(2000, dtype=np.float32)
        weights[[3, 700, 1300]] = 1, 1, 2
        sums = np.add.reduceat(weights, np.arange(0, 2000, library.BLOCK), dtype=np.float64)
        expected = {0.0: 3, 0.25: 700, 0.5: 1300}.get(at, 1300)
        assert Candidates(weights, None).draw(at) == expected
        assert Candidates(weights, None, sums).draw(at) == expected
