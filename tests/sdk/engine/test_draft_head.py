"""A draft head: its arithmetic, what it costs, and answers that are the same with it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk import PolarModel
from polar_sdk.engine.compiled import load_kernels
from polar_sdk.engine.draft_head import DraftHead, Guess, head_flops
from polar_sdk.engine.products import Int8, Plain, quantize, rows_of
from polar_sdk.serving.drafts import most_wasted
from polar_sdk.testing import random_draft_head, tiny_llama, tiny_policy, tiny_tokenizer
from tests.sdk.serving.test_drafts import PROGRAMS, WideAsNarrow, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

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


def _model(dtype: torch.dtype = torch.float32, hidden_size: int = 64) -> PolarModel:
    network: Any = tiny_llama(hidden_size=hidden_size, tie_word_embeddings=True, max_position_embeddings=512)
    network = copy.deepcopy(network).to(dtype)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    policy = tiny_policy(6).model_copy(update={"cost_ceiling": 3.0})
    return PolarModel.from_hf(network, tiny_tokenizer(), policy=policy, ledger=None, compile=False)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PolarModel:
    """A tiny model with a draft head, for which wide passes are as good as narrow ones."""
    model = _model()
    model.decoder.set_draft_head(random_draft_head(64, range(200)))
    monkeypatch.setattr(model.scheduler._drafting, "costs", WideAsNarrow())
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

    monkeypatch.setattr(model.scheduler, "_guessed", right)
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

    def noted(states: torch.Tensor, tokens: Sequence[int]) -> tuple[torch.Tensor, list[Guess]]:
        assert len(states) == len(tokens)
        rows.append(len(tokens))
        return guess(states, tokens)

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


def test_with_the_native_library_it_guesses_the_same(packages: Path) -> None:
    model = _model(torch.bfloat16, 128)
    model.decoder.set_draft_head(random_draft_head(128, range(200)))
    plain = model.decoder.draft_head
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kernels = load_kernels(model.decoder, packages, build=True)
    finally:
        torch.set_num_threads(threads)
    assert kernels is not None
    packed = model.decoder.draft_head
    assert plain is not None
    assert packed is not None
    if isinstance(packed.rows, Plain):
        pytest.skip("there is no native library for this processor")
    states = torch.randn(4, 128).bfloat16()
    before, guesses = plain.likeliest(states, states.flip(0))
    after, same_guesses = packed.likeliest(states, states.flip(0))
    assert torch.allclose(before.float(), after.float(), atol=0.05, rtol=0.05)
    assert [each.chance for each in guesses] == pytest.approx([each.chance for each in same_guesses], rel=0.2)
