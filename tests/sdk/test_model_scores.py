"""Scores of many questions under many programs, and hidden states of early layers, against transformers itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import ListSink, PolarModel, Policy, Program
from polar_sdk.errors import (
    ContextWindowError,
    EmptyPromptError,
    InvalidRequestError,
    MissingMapError,
    ProgramDepthError,
    ProtectedLayerError,
)
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

QUESTIONS = [("once upon", [" a time", "!", " an"]), ("x", ["y"]), ("the sea", []), ("one plus one is", [" two", " 3"])]
PROMPTS = ["a", "the sea was calm that day", "mid size"]


@pytest.fixture(scope="module")
def model() -> PolarModel:
    return tiny_model(policy=Policy.permissive())


class TestScoreBatch:
    def test_every_number_is_that_of_the_question_alone(self, model: PolarModel) -> None:
        programs = [None, "0-1 3-5", "0-2 3x2 4-5", "0-2 3~2 4-5", "0-5", "0-1 3-5"]
        together = model.score_batch(QUESTIONS, programs)
        for program, scores in zip(programs, together, strict=True):
            for (prompt, tails), found in zip(QUESTIONS, scores, strict=True):
                assert found == pytest.approx(model.score(prompt, tails, program=program), abs=1e-4)
        assert together[0] == together[4]
        assert together[0] != together[1]

    def test_it_is_the_references_log_likelihood(self, model: PolarModel) -> None:
        reference = tiny_llama()
        (scores,) = model.score_batch(QUESTIONS)
        for (prompt, tails), found in zip(QUESTIONS, scores, strict=True):
            start = model.encode(prompt)
            for tail, ours in zip(map(model.encode, tails), found, strict=True):
                with torch.inference_mode():
                    logits = reference(torch.tensor([start + tail])).logits[0].log_softmax(-1)
                expected = sum(float(logits[len(start) - 1 + at, token]) for at, token in enumerate(tail))
                assert ours == pytest.approx(expected, abs=1e-3)

    def test_nothing_is_metered(self, tiny: PolarModel, records: ListSink) -> None:
        tiny.score_batch(QUESTIONS, ["0-5", "0 2-5"])
        tiny.hidden_states(PROMPTS, 2)
        assert records.records == []

    def test_empty_lists_have_empty_answers(self, model: PolarModel) -> None:
        assert model.score_batch([], ["0-5", "0 5"]) == [[], []]
        assert model.score_batch(QUESTIONS, []) == []

    @pytest.mark.parametrize(
        ("questions", "programs", "error", "words"),
        [
            ([("a", ["b"]), ("a", ["b", ""])], [None], InvalidRequestError, "continuation is empty"),
            ([("a", ["b"]), ("", ["b"])], [None], EmptyPromptError, "empty"),
            ([("x" * 500, ["z", "y" * 13])], [None], ContextWindowError, "have 513 tokens; the context window is 512"),
            ([("x" * 600, [])], [None], ContextWindowError, "600"),
            ([("a", ["b"])], [None, "0-6"], ProgramDepthError, "layer 6"),
            ([("a", ["b"])], [None, "1-5"], ProtectedLayerError, "layer 0"),
            ([("a", ["b"])], ["0-1 [2-3] 4-5"], MissingMapError, "2-3"),
        ],
    )
    def test_refused_before_compute(
        self,
        tiny: PolarModel,
        monkeypatch: pytest.MonkeyPatch,
        questions: Any,
        programs: Any,
        error: type[Exception],
        words: str,
    ) -> None:
        monkeypatch.setattr(tiny.loaded.decoder, "embed", None)  # a call would be a TypeError
        with pytest.raises(error, match=words):
            tiny.score_batch(questions, programs)


class TestHiddenStates:
    def test_after_any_number_of_layers_they_are_the_references(
        self, family: str, tiny_family: Callable[..., PreTrainedModel]
    ) -> None:
        reference = tiny_family(family)
        model = PolarModel.from_hf(reference, tiny_tokenizer(), policy=Policy.permissive(), ledger=None)
        for layer in (0, 1, 4, 5):  # the last entry of transformers' list stands behind the final norm
            ours = model.hidden_states(PROMPTS, layer, "none", template="raw")
            for prompt, found in zip(PROMPTS, ours, strict=True):
                with torch.inference_mode():
                    states = reference(torch.tensor([model.encode(prompt)]), output_hidden_states=True).hidden_states
                torch.testing.assert_close(found, states[layer][0], atol=1e-4, rtol=1e-4)

    def test_all_layers_and_the_head_make_the_logits(self, model: PolarModel) -> None:
        states = model.hidden_states(["hello"], 6, "last", template="raw")
        with torch.inference_mode():
            expected = tiny_llama()(torch.tensor([model.encode("hello")])).logits[0, -1:]
        torch.testing.assert_close(model.loaded.decoder.head(states), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("program", [None, "0 2 4-5", "0-2 3x2 4-5", "0-2 3~2 4-5"])
    def test_pooling_of_a_programs_states(self, model: PolarModel, program: str | None) -> None:
        tokens = model.hidden_states(PROMPTS, 4, "none", program)
        assert [len(one) for one in tokens] == [model.count_tokens(prompt) for prompt in PROMPTS]
        assert {one.dtype for one in tokens} == {torch.float32}
        means = model.hidden_states(PROMPTS, 4, program=program)
        lasts = model.hidden_states(PROMPTS, 4, "last", program)
        assert means.shape == lasts.shape == (3, 48)
        torch.testing.assert_close(means, torch.stack([one.mean(0) for one in tokens]))
        torch.testing.assert_close(lasts, torch.stack([one[-1] for one in tokens]))

    def test_a_program_counts_its_own_steps(self, model: PolarModel) -> None:
        one = model.hidden_states(PROMPTS, 3, program="0 2 4-5")
        other = model.hidden_states(PROMPTS, 3, program=Program.parse("0 2 4"))
        assert torch.equal(one, other)
        assert not torch.equal(one, model.hidden_states(PROMPTS, 3))

    def test_they_can_be_trained_on(self, model: PolarModel) -> None:
        weight = torch.zeros(48, requires_grad=True)
        (model.hidden_states(PROMPTS, 2) @ weight).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert bool(weight.grad.any())

    def test_no_prompts(self, model: PolarModel) -> None:
        assert model.hidden_states([], 2).shape == (0, 48)
        assert model.hidden_states([], 2, "none") == []

    @pytest.mark.parametrize(
        ("prompts", "layer", "options", "error", "words"),
        [
            (["a"], 7, {}, ProgramDepthError, r"layer=7 is out of range; the program has 6 steps"),
            (["a"], -1, {}, ProgramDepthError, r"layer=-1 is out of range"),
            (["a"], 3, {"program": "0 5"}, ProgramDepthError, r"layer=3 .* has 2 steps"),
            (["a"], 1, {"pool": "max"}, InvalidRequestError, r"pool='max' is unknown; use 'mean', 'last' or 'none'"),
            (["a", " "], 1, {}, EmptyPromptError, "blank"),
            (["x" * 513], 1, {"template": "raw"}, ContextWindowError, r"has 513 tokens; the context window is 512"),
            (["a"], 1, {"program": "1-5"}, ProtectedLayerError, "layer 0"),
        ],
    )
    def test_refused(
        self, tiny: PolarModel, prompts: Any, layer: int, options: Any, error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            tiny.hidden_states(prompts, layer, **options)


def test_greedy_answers_of_more_prompts_than_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    together = model.greedy_answers([*PROMPTS, "e"], max_tokens=3)
    monkeypatch.setattr("polar_sdk.model._QUEUED", 3)
    assert model.greedy_answers([*PROMPTS, "e"], max_tokens=3) == together
