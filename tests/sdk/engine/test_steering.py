"""Biases, penalties, answers that must not end, and answers that repeat themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from polar_sdk import ListSink
from polar_sdk.engine.steering import Repeats, Steering
from polar_sdk.frameworks.cost import cost_facts
from polar_sdk.testing import tiny_model


@given(
    prompt=st.lists(st.integers(0, 19), min_size=1, max_size=30),
    answer=st.lists(st.integers(0, 19), max_size=30),
    penalty=st.floats(0.1, 3),
)
def test_repetition_is_that_of_hugging_face(prompt: list[int], answer: list[int], penalty: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(len(prompt)))
    ids: Any = torch.tensor([[*prompt, *answer]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()[None])[0]
    assert torch.equal(Steering(repetition=penalty)(prompt, answer, logits), expected)


def test_penalties_of_openai_are_of_the_answer_alone() -> None:
    steered = Steering({3: 5.0, 99: 1.0}, presence=1.0, frequency=0.5)([0, 1], [1, 1, 2], torch.zeros(5))
    assert steered.tolist() == [0, -2.0, -1.5, 5.0, 0]


@given(
    lead=st.lists(st.integers(0, 3), max_size=40),
    part=st.lists(st.integers(0, 3), min_size=1, max_size=64),
    times=st.integers(2, 6),
)
def test_repeats_are_seen_at_the_token_that_completes_them(lead: list[int], part: list[int], times: int) -> None:
    tokens = lead + part * (times + 16)
    repeats, seen = Repeats(times), None
    for count in range(1, len(tokens) + 1):
        if repeats.follow(tokens[:count]):
            seen = count
            break

    def ends_repeated(count: int) -> bool:
        for length in range(1, 65):
            span = max(times * length, 16)
            tail = tokens[count - span : count]
            if count >= span and all(tail[i] == tail[i - length] for i in range(length, span)):
                return True
        return False

    assert seen == next(count for count in range(1, len(tokens) + 1) if ends_repeated(count))


@pytest.mark.parametrize("times", [2, 20])
def test_an_answer_that_goes_round_ends_and_says_so(times: int) -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    options: Any = {"max_tokens": 200, "logit_bias": {65: 100.0}}
    whole = model.generate("hi", **options)
    ended = model.generate("hi", stop_repeats=times, **options)
    assert (whole.finish_reason, ended.finish_reason) == ("length", "stop")
    assert whole.text.startswith(ended.text)
    assert len(ended.token_ids) == max(16, times)
    assert "polar.stopped_by" not in whole.usage.tags
    assert sink.records[1].tags["polar.stopped_by"] == "repeats"
    assert cost_facts(ended.usage, None)["polar"]["stopped_by"] == "repeats"


def test_an_answer_goes_on_where_ends_are_ignored() -> None:
    model = tiny_model()
    (end, *_) = model.loaded.end_tokens
    options: Any = {"max_tokens": 12, "logit_bias": {end: 100.0}}
    assert len(model.generate("hi", **options).token_ids) == 1
    ignored = model.generate("hi", ignore_eos=True, **options)
    assert (len(ignored.token_ids), ignored.finish_reason) == (12, "length")
    assert end not in ignored.token_ids
