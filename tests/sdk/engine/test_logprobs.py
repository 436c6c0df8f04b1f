"""Hooks that change logits, and log-probabilities that are reported: greedy and sampled, alone and together."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk import ListSink, Policy
from polar_sdk.engine.sampling import read_logprobs
from polar_sdk.errors import LogitsHookError
from polar_sdk.testing import tiny_llama, tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from polar_sdk.model import PolarModel
    from polar_sdk.request.options import RequestOptions

A, Z = ord("A"), ord("Z")


@pytest.fixture(scope="module")
def model() -> PolarModel:
    return tiny_model(policy=Policy.permissive())


def letters(model: PolarModel) -> list[int]:
    return [model.encode(chr(code))[0] for code in range(A, Z + 1)]


def only(allowed: Sequence[int]) -> Any:
    """A hook that forbids all other tokens."""

    def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
        kept = torch.full_like(logits, float("-inf"))
        kept[list(allowed)] = logits[list(allowed)]
        return kept

    return hook


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.0, "top_k": 5}])
def test_a_hook_bounds_what_is_chosen(model: PolarModel, options: dict[str, Any]) -> None:
    allowed = letters(model)
    done = model.generate("hello", max_tokens=12, logits_hook=only(allowed), **options)
    assert set(done.token_ids) <= set(allowed)
    assert not set(model.generate("hello", max_tokens=12, **options).token_ids) <= set(allowed)


def test_a_hook_gets_the_tokens_so_far_and_float32_logits(model: PolarModel) -> None:
    seen: list[tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]] = []

    def watch(tokens: Sequence[int], logits: Tensor) -> Tensor:
        seen.append((tuple(tokens), logits.dtype, tuple(logits.shape)))
        return logits

    done = model.generate("hello", max_tokens=5, logits_hook=watch)
    assert done.token_ids == model.generate("hello", max_tokens=5).token_ids
    assert seen == [(done.token_ids[:count], torch.float32, (260,)) for count in range(5)]


def test_rows_with_and_without_a_hook_decode_together(model: PolarModel) -> None:
    allowed = letters(model)
    prompts = ["one", "two", "three", "four"]
    each: list[RequestOptions] = [
        {},
        {"logits_hook": only(allowed), "logprobs": 2},
        {"temperature": 0.9, "seed": 4},
        {"logits_hook": only(allowed[:1])},
    ]
    together = model.generate_batch(prompts, each=each, max_tokens=9)
    for done, prompt, options in zip(together, prompts, each, strict=True):
        own: RequestOptions = {"max_tokens": 9, **options}
        alone = model.generate(prompt, **own)
        assert (done.token_ids, done.usage.flops) == (alone.token_ids, alone.usage.flops)
    assert together[3].text == "A" * 9
    assert [done.logprobs is None for done in together] == [True, False, True, True]


class UnhappyError(Exception):
    """An error of a caller's own code."""


def failing(after: int) -> Any:
    def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
        if len(tokens) == after:
            raise UnhappyError("no grammar")
        return logits

    return hook


@pytest.mark.parametrize("after", [0, 3])
def test_an_error_in_a_hook_ends_its_request_and_no_other(after: int) -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    expected = model.generate("hello", max_tokens=40).token_ids
    sink.records.clear()
    started = threading.Event()

    def wait(tokens: Sequence[int], logits: Tensor) -> Tensor:
        started.set()
        while not tokens and len(model.scheduler) < 2:  # both run together from the second token on
            time.sleep(0.001)
        return logits

    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(model.generate, "hello", max_tokens=40, request_id="good", logits_hook=wait)
        started.wait()
        with pytest.raises(UnhappyError, match="no grammar"):
            model.generate("hello", max_tokens=9, request_id="bad", logits_hook=failing(after))
        assert neighbour.result().token_ids == expected
    records = {record.request_id: record for record in sink.records}
    bad = records["bad"]
    assert [bad.outcome, bad.error, records["good"].outcome] == ["error", "UnhappyError", "completed"]
    assert bad.tokens.output == after
    assert bad.flops == model.cost(bad.program, prompt=bad.tokens.input, output=after + 1)
    assert model.generate("hello", max_tokens=40).token_ids == expected  # the engine serves on


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (lambda logits: None, r"NoneType.*\(260,\)"),
        (lambda logits: logits[:-1], r"\(259,\).*\(260,\)"),
        (lambda logits: logits.fill_(float("-inf")), "is -inf"),
        (lambda logits: logits * float("nan"), "is nan"),
        (lambda logits: logits + float("inf"), "is inf"),
    ],
    ids=["nothing", "another shape", "no token", "nan", "+inf"],
)
def test_a_hook_that_returns_no_valid_logits_is_refused(model: PolarModel, returned: Any, told: str) -> None:
    with pytest.raises(LogitsHookError, match=told):
        model.generate("hello", max_tokens=3, logits_hook=lambda tokens, logits: returned(logits))


def test_logprobs_are_the_references(model: PolarModel) -> None:
    reference = tiny_llama()
    prompt = model._encoder.encode("hello")
    done = model.generate("hello", max_tokens=6, logprobs=4, program="0-5")
    assert done.logprobs is not None
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt + list(done.token_ids)])).logits[0].log_softmax(-1)
    for at, (logprobs, token) in enumerate(zip(done.logprobs, done.token_ids, strict=True)):
        row = expected[len(prompt) - 1 + at]
        assert logprobs.token == token
        assert logprobs.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [token for token, _ in logprobs.top] == row.topk(4).indices.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_logprobs_are_taken_before_temperature_and_after_the_hook(model: PolarModel) -> None:
    cold = model.generate("hello", max_tokens=1, logprobs=20).logprobs
    hot = model.generate("hello", max_tokens=1, logprobs=20, temperature=3.0, top_k=7, top_p=0.5, seed=1).logprobs
    assert cold is not None
    assert hot is not None
    assert hot[0].top == cold[0].top
    (forced,) = model.generate("hello", max_tokens=1, logprobs=1, logits_hook=only([7])).logprobs or ()
    assert (forced.token, forced.logprob, forced.top) == (7, 0.0, ((7, 0.0),))


def test_chunks_report_what_the_generation_reports(model: PolarModel) -> None:
    chunks = list(model.stream("hello", max_tokens=7, logprobs=2))
    last = chunks[-1].generation
    assert last is not None
    assert last.logprobs is not None
    assert tuple(logprobs for chunk in chunks for logprobs in chunk.logprobs or ()) == last.logprobs
    assert [len(chunk.logprobs or ()) for chunk in chunks] == [1] * 7
    assert [chunk.logprobs for chunk in model.stream("hello", max_tokens=3)] == [None] * 3


def test_a_cancelled_stream_reports_what_it_sampled(model: PolarModel) -> None:
    stop = threading.Event()
    chunks = []
    for chunk in model.stream("hello", max_tokens=200, logprobs=0, cancel=stop):
        chunks.append(chunk)
        stop.set()
    last = chunks[-1].generation
    assert last is not None
    assert last.finish_reason == "cancelled"
    assert [(logprobs.token, logprobs.top) for logprobs in last.logprobs or ()] == [
        (token, ()) for token in last.token_ids
    ]
    assert tuple(logprobs for chunk in chunks for logprobs in chunk.logprobs or ()) == last.logprobs
    assert chunks[-1].logprobs == ()


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30), st.data())
def test_log_probabilities_add_up(values: list[float], data: st.DataObject) -> None:
    logits = torch.tensor(values)
    token = data.draw(st.integers(0, len(values) - 1))
    logprobs = read_logprobs(logits, token, 20)
    assert len(logprobs.top) == min(20, len(values))
    assert [value for _, value in logprobs.top] == sorted((value for _, value in logprobs.top), reverse=True)
    assert sum(torch.tensor([value for _, value in logprobs.top]).exp().tolist()) <= 1 + 1e-4
    assert logprobs.logprob <= logprobs.top[0][1]
    assert dict(logprobs.top).get(token, logprobs.logprob) == logprobs.logprob
