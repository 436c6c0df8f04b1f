"""Log-probabilities of a prompt's own tokens: right, metered to the FLOP, in any company; and prompts of token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import ListSink, Program
from polar_sdk.errors import InvalidRequestError, LogitsError
from polar_sdk.programs.cost import CHUNK
from polar_sdk.testing import random_fill, tiny_llama, tiny_model

if TYPE_CHECKING:
    from polar_sdk import Generation, PolarModel

TEXT = "The end. " * 3


@pytest.fixture
def sink() -> ListSink:
    return ListSink()


@pytest.fixture
def model(sink: ListSink) -> PolarModel:
    return tiny_model(sink=sink, context_window=1_500)


def reference(ids: list[int], program: str | None = None) -> list[float]:
    """By the untouched Hugging Face model, its layers picked as the program has them."""
    llama = tiny_llama(max_position_embeddings=1_500)
    if program is not None:
        layers = llama.model.layers
        llama.model.layers = torch.nn.ModuleList(layers[index] for index in Program.of(program).layers)
    with torch.inference_mode():
        scores = llama(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(ids[1:])]


def score(model: PolarModel, prompt: Any, **options: Any) -> Generation:
    return model.generate(prompt, template="raw", prompt_logprobs=2, **{"max_tokens": 2, **options})


@pytest.mark.parametrize(
    ("program", "length"), [("0-5", 2), ("0 2-5", 30), ("0-5", CHUNK), ("0 4-5", CHUNK + 1), ("0 2-5", 1_300)]
)
def test_they_are_those_of_hugging_face(model: PolarModel, program: str, length: int) -> None:
    ids = [(7 * place + place // 3) % 250 for place in range(length)]
    answer = score(model, ids, program=program)
    assert answer.prompt_ids == tuple(ids)
    assert answer.prompt_logprobs is not None
    assert [entry.token for entry in answer.prompt_logprobs] == ids[1:]
    found = [entry.logprob for entry in answer.prompt_logprobs]
    assert found == pytest.approx(reference(ids, program), abs=1e-4)
    for entry in answer.prompt_logprobs:
        assert len(entry.top) == 2
        assert entry.top[0][1] >= max(entry.top[1][1], entry.logprob)


@pytest.mark.parametrize("length", [1, 30, CHUNK + 1])
@pytest.mark.parametrize("max_tokens", [1, 3])
def test_what_ran_is_what_was_planned(model: PolarModel, sink: ListSink, length: int, max_tokens: int) -> None:
    def go_on(_: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[256] = -1e9
        return logits

    options: Any = {"program": "0 2-5", "max_tokens": max_tokens, "logits_hook": go_on}
    ids = list(range(50, 200))[:length] if length < 150 else [60] * length
    bound = model.bound(ids, template="raw", prompt_logprobs=0, **options)
    plain = model.bound(ids, template="raw", **options)
    score(model, ids, **options)
    (record,) = sink.records
    assert record.tokens.output == max_tokens
    assert record.flops.total == bound.offers[0].flops_bound
    cost = model.decoder.cost
    assert record.flops.head == cost.head * (length - 1 + max_tokens)
    last = cost.layers[5]
    beyond = cost.head * (length - 1)  # and the last visit, which all tokens now run to its end
    pairs = sum(min(start + CHUNK, length) * min(CHUNK, length - start) for start in range(0, length, CHUNK)) - length
    beyond += (last.linear - last.keys_values) * (length - 1) + last.attention * pairs
    assert record.flops.total == plain.offers[0].flops_bound + beyond
    identity = cost.request(Program.identity(6), length, max_tokens, scored=True)
    assert record.identity_flops == identity.total


def test_no_start_is_taken_from_another_request(model: PolarModel, sink: ListSink) -> None:
    first = score(model, TEXT * 10)
    again = score(model, TEXT * 10)
    model.generate(TEXT * 10, template="raw", max_tokens=1)
    assert [record.tokens.cached > 0 for record in sink.records] == [False, False, True]
    assert first.prompt_logprobs == again.prompt_logprobs
    assert first.token_ids == again.token_ids


def test_in_company_they_are_the_same(model: PolarModel) -> None:
    alone = [score(model, TEXT + letter) for letter in "abc"]
    each: Any = [{"prompt_logprobs": 2}, {}, {"prompt_logprobs": 2, "program": "0 4-5"}]
    together = model.generate_batch([TEXT + letter for letter in "abc"], each=each, template="raw", max_tokens=2)
    assert together[1].prompt_logprobs is None
    first = together[0].prompt_logprobs
    assert first is not None
    assert alone[0].prompt_logprobs is not None
    assert [entry.logprob for entry in first] == pytest.approx(
        [entry.logprob for entry in alone[0].prompt_logprobs], abs=1e-4
    )
    assert [answer.token_ids for answer in together[:2]] == [answer.token_ids for answer in alone[:2]]


def test_the_answer_is_what_it_is_without(model: PolarModel) -> None:
    assert score(model, TEXT).token_ids == model.generate(TEXT, template="raw", max_tokens=2).token_ids


def test_a_program_that_fills_gives_none(sink: ListSink) -> None:
    model = tiny_model(sink=sink)
    model.decoder.set_fills({(3, 4): random_fill(model.decoder, (3, 4))})
    with pytest.raises(InvalidRequestError, match="prompt"):
        score(model, TEXT, program="0-2 (3-4) 5")
    assert sink.records == []
    assert score(model, TEXT, program="0-5").prompt_logprobs is not None


def test_nan_ends_the_request_alone(model: PolarModel, sink: ListSink, monkeypatch: pytest.MonkeyPatch) -> None:
    head = model.decoder.head
    monkeypatch.setattr(model.decoder, "head", lambda states: head(states) * (torch.nan if len(states) > 1 else 1))
    with pytest.raises(LogitsError):
        score(model, TEXT)
    assert sink.records[0].outcome == "error"
    assert model.generate(TEXT, template="raw", max_tokens=2).token_ids


@pytest.mark.parametrize("count", [-1, 21, True, 1.5, "2"])
def test_a_number_out_of_range_is_refused(model: PolarModel, count: Any) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs"):
        model.generate("a", prompt_logprobs=count)


# -- token ids ---------------------------------------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are(model: PolarModel, sink: ListSink) -> None:
    ids = model.encode(TEXT)
    assert model.generate(ids, max_tokens=3).token_ids == model.generate(TEXT, template="raw", max_tokens=3).token_ids
    assert model.prompt_tokens(ids) == ids
    assert sink.records[0].tokens.input == len(ids)


@pytest.mark.parametrize("ids", [[1, -1], [260], [1, 2**70], [1, True], [1, "a"], [1, None]])
def test_what_is_no_token_is_refused(model: PolarModel, ids: Any) -> None:
    with pytest.raises(InvalidRequestError, match="259"):
        model.generate(ids)


def test_token_ids_are_no_chat(model: PolarModel) -> None:
    with pytest.raises(InvalidRequestError, match="token ids"):
        model.generate([1, 2], template="chat")
    with pytest.raises(InvalidRequestError, match="bytes"):
        model.generate(b"ab")
