"""A draft head: its arithmetic, what it costs, and answers that are the same with it."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk import PolarModel
from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.draft_head import MIN_PATH, DraftHead, Guess, NativeDraftHead, head_flops
from polar_sdk.engine.panels import Packed
from polar_sdk.engine.products import Int8, Plain, quantize, rows_of
from polar_sdk.serving.drafts import most_wasted
from polar_sdk.testing import random_draft_head, tiny_llama, tiny_policy, tiny_tokenizer
from tests.sdk.repeating import repeating_llama
from tests.sdk.serving.test_drafts import PROGRAMS, WideAsNarrow, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.engine.draft_head import Embed
    from polar_sdk.serving.job import Job

WIDTH, UNITS, TOKENS = 16, 24, 10


def _head() -> tuple[DraftHead, dict[str, torch.Tensor]]:
    tensors = random_draft_head(WIDTH, range(5, 5 + TOKENS), units=UNITS)
    return DraftHead.of(tensors, torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))), tensors


def _normal(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


def test_a_guess_is_by_the_formula() -> None:
    head, tensors = _head()
    states, embeddings = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    entered = torch.cat((_normal(states), _normal(embeddings)), -1) @ tensors["enter"].T
    gate, up = (_normal(entered) @ tensors["gated"].T).chunk(2, -1)
    after = entered + (torch.nn.functional.silu(gate) * up) @ tensors["down"].T
    assert isinstance(head.rows, Plain)
    chances = ((_normal(after) * tensors["scale"]) @ head.rows.weight.T).softmax(-1)
    found, guesses = head.likeliest(states, embeddings)
    assert torch.allclose(found, after, atol=1e-5)
    for guess, own in zip(guesses, chances, strict=True):
        assert guess.token == 5 + int(own[:-1].argmax())
        assert guess.chance == pytest.approx(float(own[:-1].max()), abs=1e-5)


def test_chances_leave_room_for_tokens_that_it_cannot_guess() -> None:
    head, tensors = _head()
    states, embeddings = torch.randn(1, WIDTH), torch.randn(1, WIDTH)
    (guess,) = head.likeliest(states, embeddings)[1]
    assert isinstance(head.rows, Plain)
    after = head.step(states, embeddings)
    direction = _normal(after)[0] / tensors["scale"]
    highest = float(head.logits(after)[0, :-1].max())
    tensors["other"] = direction * (highest + 8) / float((direction * _normal(after)[0] * tensors["scale"]).sum())
    (unsure,) = DraftHead.of(tensors, head.rows.weight[:-1]).likeliest(states, embeddings)[1]
    assert unsure.token == guess.token
    assert unsure.chance < 1e-3 < guess.chance


def test_flops_are_torchs_own() -> None:
    head, _ = _head()
    with FlopCounterMode(display=False) as counter:
        head.likeliest(torch.randn(1, WIDTH), torch.randn(1, WIDTH))
    assert counter.get_total_flops() == head_flops(WIDTH, UNITS, TOKENS)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_of_a_matrix_are_its_own(precision: str) -> None:
    weight = torch.randn(64, 32)
    matrix, which = quantize(Plain(weight), precision), torch.tensor([3, 60, 3])
    assert torch.allclose(rows_of(matrix, which, 32), weight[which], atol=0.05)
    assert isinstance(matrix, Int8 if precision == "int8" else Plain)


# -- answers ---------------------------------------------------------------------------------------------------------


def _model() -> PolarModel:
    policy = tiny_policy(6).model_copy(update={"cost_ceiling": 3.0})
    network = repeating_llama(0.3, hidden_size=64, tie_word_embeddings=True)
    return PolarModel.from_hf(network, tiny_tokenizer(), policy=policy, ledger=None)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PolarModel:
    """A tiny model with a draft head, for which wide passes are as good as narrow ones."""
    model = _model()
    model.decoder.set_draft_head(random_draft_head(64, range(200)))
    monkeypatch.setattr(model.scheduler._passes.drafting, "costs", WideAsNarrow())
    return PolarModel(model.loaded, policy=model.policy, ledger=None)


def test_a_pass_counts_what_was_guessed_beside_what_the_answer_needs(model: PolarModel) -> None:
    plain = model.generate("Hello", max_tokens=30, speculate="off", tenant="plain")
    drafted = model.generate("Hello", max_tokens=30, speculate="auto", tenant="drafted")
    same(plain, drafted)
    assert drafted.usage.tokens.drafted > 0
    assert drafted.usage.flops.drafts > 0
    bound = model.bound("Hello", max_tokens=30, speculate="auto").offers[0]
    assert drafted.usage.flops.executed <= bound.flops_bound + bound.drafts_bound


def test_budgets_hold_the_most_that_it_can_guess(model: PolarModel) -> None:
    cost, program = model.decoder.cost, model.policy.tiers["standard"].program
    assert cost.guess == head_flops(64, 32, 200)
    without = most_wasted(_model().decoder.cost, program, 10, 20)
    assert most_wasted(cost, program, 10, 20) - without == 20 * 5 * cost.guess


def test_guesses_that_are_right_spare_passes(model: PolarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model.generate("Hello", max_tokens=40, speculate="off", tenant="plain")

    def right(counts: Mapping[Job, int]) -> dict[Job, list[Guess]]:
        rest = {job: plain.token_ids[len(job.tokens) :][:5] for job, count in counts.items() if count}
        return {job: [Guess(token, 0.99) for token in tokens] for job, tokens in rest.items()}

    monkeypatch.setattr(model.scheduler._passes, "_guessed", right)
    drafted = model.generate("Hello", max_tokens=40, speculate="auto", tenant="drafted")
    same(plain, drafted)
    assert drafted.usage.tokens.accepted > 25
    assert max(drafted.usage.visits.decode) == 39 - drafted.usage.tokens.accepted


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    prompt=st.text("abcd e", min_size=1, max_size=60).filter(lambda text: text.strip()),
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
    program=st.sampled_from(PROGRAMS),
)
def test_an_answer_is_the_same_with_a_draft_head(model: PolarModel, prompt: str, **options: Any) -> None:
    plain = model.generate(prompt, speculate="off", tenant="plain", **options)
    drafted = model.generate(prompt, speculate="auto", tenant="drafted", **options)
    same(plain, drafted)


def test_rows_together_are_guessed_together(model: PolarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, guess = list[int](), model.decoder.guess

    def noted(states: torch.Tensor, tokens: Sequence[int], most: int) -> list[list[Guess]]:
        assert len(states) == len(tokens)
        rows.append(len(tokens))
        return guess(states, tokens, most)

    monkeypatch.setattr(model.decoder, "guess", noted)
    prompts = ["abc", "Hello there", "xyz", "one two three"]
    plain = [model.generate(prompt, max_tokens=20, speculate="off", tenant="plain") for prompt in prompts]
    drafted = model.generate_batch(prompts, max_tokens=20, speculate="auto", tenant="drafted")
    for one, other in zip(plain, drafted, strict=True):
        same(one, other)
    assert max(rows) == 4


def test_nobody_asks_it_for_what_is_not_drafted(model: PolarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.decoder, "guess", lambda *_: pytest.fail("asked"))
    for speculate in ("off", "prompt"):
        model.generate("Hello", max_tokens=20, speculate=speculate)
    model.generate("Hello", max_tokens=2, speculate="auto")  # the last token needs no guess


# -- the native library ----------------------------------------------------------------------------------------------


def _rounded(matrix: Plain) -> Plain:
    """A matrix as int8 leaves it."""
    outputs, inputs = matrix.weight.shape
    return Plain(rows_of(quantize(matrix, "int8"), torch.arange(outputs), inputs))


def _random_heads(width: int, units: int, tokens: int, *, tied: bool) -> tuple[DraftHead, NativeDraftHead, Embed]:
    """By torch's operations, with numbers that int8 holds, and by the library.

    The model's matrix is in panels where its embedding and its head are one.
    """
    tensors = random_draft_head(width, range(5, 5 + tokens), units=units)
    tensors = {name: value if name == "tokens" else value.bfloat16() for name, value in tensors.items()}
    embedding = torch.randn(tokens + 40, width, generator=torch.Generator().manual_seed(1)).mul_(2 / width**0.5)
    embedding = embedding.bfloat16()
    head = DraftHead.of(tensors, embedding[tensors["tokens"]])
    names = ("enter", "gated", "down", "rows")
    head = replace(head, **{name: _rounded(getattr(head, name)) for name in names})  # type: ignore[arg-type]
    return head, NativeDraftHead(head, Packed.of(embedding, None) if tied else embedding), embedding.__getitem__


@pytest.mark.usefixtures("native")
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    width=st.integers(8, 80).map(lambda half: 2 * half),
    units=st.integers(1, 70),
    tokens=st.integers(1, 90),
    rows=st.integers(1, 12),
    most=st.integers(1, 5),
    tied=st.booleans(),
)
def test_the_native_library_guesses_as_torch_does(
    width: int, units: int, tokens: int, rows: int, most: int, tied: bool
) -> None:
    head, in_library, embed = _random_heads(width, units, tokens, tied=tied)
    states = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).bfloat16()
    after = [(7 * row) % (tokens + 40) for row in range(rows)]
    found = in_library.guess(states, after, most)
    assert {len(row) for row in found} == {len(found[0])}
    assert 1 <= len(found[0]) <= most
    # A row is the same whatever rows are beside it, except that it is guessed further while any of them goes on.
    for row in range(rows):
        (alone,) = in_library.guess(states[row : row + 1], after[row : row + 1], most)
        assert found[row][: len(alone)] == alone
        assert len(alone) == most or prod(guess.chance for guess in alone) < MIN_PATH
    # Each guess is torch's, given those before it, or one as likely; from guess to guess, states round more apart.
    for place in range(len(found[0])):
        relative, absolute = (0.1, 0.01) if place == 0 else (0.5, 0.05)
        states, expected = head.likeliest(states, embed(torch.tensor(after)))
        chances = head.logits(states).softmax(-1)
        for row, guess in enumerate(found):
            chance = float(chances[row, guess[place].token - 5])
            assert chance == pytest.approx(expected[row].chance, rel=relative, abs=absolute)
            assert guess[place].chance == pytest.approx(chance, rel=relative, abs=absolute)
        after = [guess[place].token for guess in found]


@pytest.mark.usefixtures("native")
def test_what_is_no_number_is_no_likely_guess() -> None:
    _, in_library, _ = _random_heads(32, 16, 20, tied=True)
    (guesses,) = in_library.guess(torch.full((1, 32), torch.nan).bfloat16(), [3], 5)
    assert [guess.chance for guess in guesses] == [0.0]
    assert 5 <= guesses[0].token < 25


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_panels_guesses_by_the_library(tied: bool) -> None:
    decoder = build_decoder(tiny_llama(hidden_size=128, tie_word_embeddings=tied).bfloat16())
    tensors = random_draft_head(128, range(200))
    decoder.set_draft_head(tensors)
    states, tokens = torch.randn(3, 128).bfloat16(), [3, 40, 41]
    expected = decoder.guess(states, tokens, 5)
    decoder.use_library()
    assert isinstance(decoder.draft_head, NativeDraftHead)
    assert isinstance(decoder.start["embedding"], Packed) == tied
    found = decoder.guess(states, tokens, 5)
    for own, same_row in zip(expected, found, strict=True):
        assert own[0].chance == pytest.approx(same_row[0].chance, rel=0.2)
    decoder.set_draft_head(tensors)  # now that its matrices are in panels
    assert decoder.guess(states, tokens, 5) == found
