"""Packed scoring beside the plain way: one pass of the Hugging Face model per continuation, prompt and all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import Program
from polar_sdk.engine.attention import attend_seen
from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.pack import Question
from polar_sdk.engine.scoring import Score, score_questions

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

LONG = ((300, (5, 140, 1)), (129, (128,)), (128, (1, 1)), (1, (200, 3)))
"""Tokens of each prompt and of its continuations: they begin and end within blocks of attention, and at their edges."""


def questions(rng: random.Random) -> list[Question]:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(count))

    return [Question(tokens(prompt), tuple(map(tokens, tails))) for prompt, tails in LONG]


@torch.no_grad()
def plain(model: PreTrainedModel, question: Question) -> Score:
    """Each continuation in a pass of its own."""
    sums, greedy = [], []
    for tail in question.continuations:
        call: Any = model
        logits = call(input_ids=torch.tensor([[*question.prompt, *tail]]), use_cache=False).logits[0]
        logits = logits[len(question.prompt) - 1 : -1].float()
        sums.append(float(logits.log_softmax(-1)[range(len(tail)), list(tail)].sum()))
        greedy.append(tuple(logits.argmax(-1).tolist()))
    return Score(tuple(sums), tuple(greedy))


def test_long_questions_score_as_in_passes_of_their_own(
    family: str, tiny_family: Callable[..., PreTrainedModel]
) -> None:
    """With windows and soft caps, where the family has them."""
    model, batch = tiny_family(family), questions(random.Random(0))
    scores = score_questions(build_decoder(model), batch, Program.identity(6))
    for question, ours in zip(batch, scores, strict=True):
        theirs = plain(model, question)
        assert ours.loglikelihoods == pytest.approx(theirs.loglikelihoods, rel=2e-5, abs=1e-3)
        assert ours.greedy == theirs.greedy


@pytest.mark.parametrize("continuations", [((8,) * 100,), ((8,) * 60, (9,) * 40)])
def test_a_mask_never_grows_with_the_square_of_the_question(
    continuations: tuple[tuple[int, ...], ...],
    tiny_family: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One continuation attends as a prompt does, several by masks of their own."""
    sizes: list[int] = []

    def spied(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def attended(query: torch.Tensor, keys: torch.Tensor, *others: Any) -> torch.Tensor:
            sizes.append(query.shape[0] * keys.shape[1])
            return attend(query, keys, *others)

        return attended

    decoder = build_decoder(tiny_family("llama"))
    monkeypatch.setattr("polar_sdk.engine.pack.attend_seen", spied(attend_seen))
    monkeypatch.setattr(decoder.kernels, "attend", spied(decoder.kernels.attend))
    long = Question((7,) * 400, continuations)
    score_questions(decoder, [long], Program.identity(6))
    assert len(sizes) == 4 * 5 + 1  # blocks of 128 tokens, in six layers; in the last one, only those that predict
    assert max(sizes) <= 128 * long.tokens
