"""A model that computes nan or infinity: that request ends with a clear error and its record, the others go on."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk.engine.sampling import likeliest_tokens
from polar_sdk.errors import LogitsError, ModelDamagedError
from polar_sdk.model import PolarModel
from polar_sdk.serving.places import Limits
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer
from polar_sdk.usage import ListSink
from tests.sdk.serving.gate import run_together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.request.generation import Generation

BAD = ord("!")
"""A prompt with this token gets a state that is not finite."""


def poisoned(value: float, **settings: Any) -> PolarModel:
    """A model whose embedding of BAD holds `value`, as damage in memory after loading would leave it."""
    model = tiny_model(**settings)
    (token,) = model.encode(chr(BAD))
    embedding = model.decoder.start["embedding"] = model.decoder.start["embedding"].clone()
    embedding[token, 3] = value
    return model


def answer_or_error(model: PolarModel, call: dict[str, Any]) -> Generation | LogitsError:
    try:
        return model.generate(max_tokens=20, **call)
    except LogitsError as error:
        return error


@pytest.mark.parametrize(
    ("value", "sampling"),
    [(math.nan, {}), (math.inf, {"temperature": 0.8, "seed": 1}), (-math.inf, {"logprobs": 2}), (math.inf, {})],
)
def test_it_ends_that_request_alone(value: float, sampling: dict[str, Any]) -> None:
    sink = ListSink()
    model = poisoned(value, sink=sink)
    calls = [{"prompt": "hello", **sampling}, {"prompt": "oh!", "request_id": "it", **sampling}, {"prompt": "you"}]
    first, error, last = run_together([partial(answer_or_error, model, call) for call in calls])
    alone = tiny_model()
    for answer, call in ((first, calls[0]), (last, calls[2])):
        assert not isinstance(answer, LogitsError)
        assert answer.token_ids == alone.generate(max_tokens=20, **call).token_ids
    assert isinstance(error, LogitsError)
    for part in ("nan", model.name, "'it'", "after 0 tokens"):
        assert part in str(error)
    assert "\n" not in str(error)
    (record,) = [record for record in sink.records if record.request_id == "it"]
    assert (record.outcome, record.error, record.tokens.output) == ("error", "LogitsError", 0)
    assert record.flops.total == model.cost(record.program, prompt=record.tokens.input, output=1).total


def test_its_pages_are_clean_when_others_get_them() -> None:
    model = poisoned(math.nan)
    model.scheduler.limits = Limits(prefix_share=0.5)
    with pytest.raises(LogitsError):
        model.generate("!" * 150, max_tokens=5)
    assert not any(store.isnan().any() for store in model.decoder.pool.stores)
    assert model.decoder.pool.free == model.decoder.pool.size
    assert model.generate("x" * 150, max_tokens=5).usage.tokens.cached == 0


def test_behind_a_start_that_others_use_its_pages_are_clean_too() -> None:
    model = poisoned(math.nan)
    good, bad = model.encode("a" + chr(BAD))

    def choose(tokens: Sequence[int], logits: Tensor) -> Tensor:
        chosen = torch.tensor(bad if len(tokens) == 3 else good)
        return torch.full_like(logits, -math.inf).index_fill_(0, chosen, 0.0)

    with pytest.raises(LogitsError, match="4"):
        model.generate("x" * 40, max_tokens=9, logits_hook=choose)
    assert model.decoder.pool.free < model.decoder.pool.size
    assert not any(store.isnan().any() for store in model.decoder.pool.stores)
    assert model.scheduler.prefixes._kept  # in the page where the answer went on
    shared, alone = (each.generate("x" * 30 + "y" * 10, max_tokens=9) for each in (model, tiny_model()))
    assert (shared.usage.tokens.cached, shared.token_ids) == (31, alone.token_ids)


def test_it_ends_in_the_middle_of_an_answer_too() -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    head, passes = model.decoder.head, 0

    def failing(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        logits = head(x)
        return torch.full_like(logits, math.nan) if passes == 5 else logits

    model.decoder.head = failing  # type: ignore[method-assign]
    stream = model.stream("hello", max_tokens=50)
    with pytest.raises(LogitsError, match="4"):
        list(stream)
    assert sink.records[0].tokens.output == 4


def test_the_likeliest_token_shows_every_row_that_is_not_finite() -> None:
    logits = torch.randn(5, 300)
    logits[1, 7], logits[2, 299], logits[3, 0] = math.nan, math.inf, -math.inf
    logits[4] = -math.inf
    tokens, highest = likeliest_tokens(logits)
    assert [math.isfinite(value) for value in highest] == [True, False, False, True, False]
    assert tokens[0] == int(logits[0].argmax())


def test_a_configuration_that_makes_nan_is_refused_in_memory_too() -> None:
    model = tiny_llama(rms_norm_eps=math.nan)
    with pytest.raises(ModelDamagedError, match="rms_norm_eps = nan"):
        PolarModel.from_hf(model, tiny_tokenizer(), ledger=None)
