"""Answers that must match something: alone, in company, streamed, stopped, cancelled, and refused."""

from __future__ import annotations

import builtins
import re
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from polar_sdk import ListSink, PolarModel
from polar_sdk.engine.maps import Bridge
from polar_sdk.errors import GrammarError, IncompleteAnswerError, InvalidRequestError, MissingExtraError
from polar_sdk.serving.places import Limits
from polar_sdk.testing import random_fill, tiny_model

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CALL_OR_TEXT = 'start: text | call\ntext: /[^{](?s:.)*/\ncall: %json {"type": "object"}'
KINDS: list[dict[str, Any]] = [
    {"schema": PERSON},
    {"regex": "[a-f]{3}-[0-9]+"},
    {"choice": ["yes", "no", "perhaps\n", "größer"]},
    {"grammar": CALL_OR_TEXT},
    {},
]


def test_no_tenant_meets_the_grammar_that_another_has_used(model: PolarModel) -> None:
    compiler = model.loaded.grammars
    before = compiler.compile.cache_info().misses
    for tenant in ("acme", "globex", "acme"):
        model.generate("hi", regex="[a-c]{2}", tenant=tenant)
    assert compiler.compile.cache_info().misses == before + 2


@pytest.fixture(scope="module")
def model() -> PolarModel:
    return tiny_model(context_window=2048)


class Person(BaseModel):
    name: str
    age: int


class Point(TypedDict):
    x: int
    y: int


class Kept(BaseModel):
    numbers: set[int]
    by_size: dict[Literal["small", "large"], float]
    raw: bytes
    lasted: timedelta


def test_a_class_may_have_what_is_no_json(model: PolarModel) -> None:
    for seed in range(2):
        answer = model.generate("Hello", schema=Kept, max_tokens=200, temperature=1.0, seed=seed)
        kept = Kept.model_validate_json(answer.text)
        assert set(kept.by_size) <= {"small", "large"}


def test_a_class_is_its_schema(model: PolarModel) -> None:
    answer = model.generate("Hello", schema=Person, max_tokens=64)
    assert Person.model_validate_json(answer.text) == Person.model_validate(answer.json())
    assert set(model.generate("Hello", schema=Point, max_tokens=64).json()) == {"x", "y"}


@pytest.mark.parametrize("fit", [True, False])
def test_a_text_may_be_one_of_several(model: PolarModel, fit: bool) -> None:
    texts = ["yes", "no", "perhaps\n", "größer", '"', "日本", "no, never"]
    for seed in range(8):
        answer = model.generate("?", choice=texts, temperature=2.0, seed=seed, max_tokens=20, fit_max_tokens=fit)
        assert answer.text in texts
        assert (answer.finish_reason, answer.complete) == ("stop", True)


def test_a_regular_expression_holds_for_the_whole_answer(model: PolarModel) -> None:
    for seed in range(8):
        answer = model.generate("?", regex="[a-f]{3}-(0|[1-9][0-9]*)x", temperature=1.5, seed=seed, max_tokens=24)
        assert re.fullmatch("[a-f]{3}-(0|[1-9][0-9]*)x", answer.text)


def test_a_grammar_may_leave_the_choice_to_the_model(model: PolarModel) -> None:
    answers = [
        model.generate("?", grammar=CALL_OR_TEXT, temperature=3.0, seed=seed, max_tokens=40) for seed in range(24)
    ]
    calls = [answer for answer in answers if answer.text.startswith("{")]
    assert all(isinstance(answer.json(), dict) for answer in calls)
    assert any(not answer.text.startswith("{") and answer.finish_reason == "length" for answer in answers)


def test_programs_of_every_kind_keep_to_a_grammar() -> None:
    plain = tiny_model(context_window=2048)
    decoder = plain.loaded.decoder
    decoder.set_fills({(3, 5): random_fill(decoder, (3, 5))})
    width = decoder.family.hidden
    decoder.set_bridges({(2, 3): Bridge((torch.eye(width) / 9,), torch.ones(width) / 9, torch.zeros(width))})
    model = PolarModel(plain.loaded, policy=plain.policy, ledger=None)
    programs = ["0-5", "0-2 (3-5:2)", "0-1 [2-3] 4-5", "0-1 3x2 4-5"]
    each: Any = [
        {**kind, "program": program, "temperature": 1.5, "seed": seed}
        for program in programs
        for seed, kind in enumerate(KINDS)
    ]
    alone = [model.generate("Hello there", max_tokens=48, **own) for own in each]
    together = model.generate_batch(["Hello there"] * len(each), each=each, max_tokens=48)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    for own, answer in zip(each, together, strict=True):
        assert answer.complete is (None if len(own) == 3 else True), own


def test_a_row_that_gave_way_and_runs_again_is_where_it_was_in_its_grammar() -> None:
    model = tiny_model(kv_memory=6 * 2 * 2 * 64 * 12 * 4 * 4)  # four blocks of 64 tokens in each of six layers
    model.scheduler.limits = Limits(max_rows=2, prefix_share=0)
    schema = {"type": "string", "minLength": 90, "maxLength": 100}
    options: Any = {"schema": schema, "max_tokens": 150, "tenant": "noisy", "temperature": 1.0, "seed": 3}
    expected = [tiny_model().generate(f"{number}", **options) for number in range(2)]
    streams = [model.stream(f"{number}", **options) for number in range(2)]
    for stream in streams:
        next(stream)
    for _ in range(2):
        model.generate("b" * 150, max_tokens=20, tenant="quiet")
    for stream, right in zip(streams, expected, strict=True):
        last = list(stream)[-1].generation
        assert last is not None
        assert (last.token_ids, last.complete) == (right.token_ids, True)
    assert model.scheduler.replayed_flops > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_same_answer(model: PolarModel, kind: Any) -> None:
    whole = model.generate("Hello", temperature=1.0, seed=1, max_tokens=48, **kind)
    chunks = list(model.stream("Hello", temperature=1.0, seed=1, max_tokens=48, **kind))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    last = chunks[-1].generation
    assert last is not None
    assert (last.token_ids, last.complete) == (whole.token_ids, whole.complete)


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), spare=st.integers(0, 40), temperature=st.floats(0.1, 4))
def test_a_list_fits_the_tokens_that_its_shortest_answer_needs(seed: int, spare: int, temperature: float) -> None:
    schema = {"type": "array", "items": PERSON, "minItems": 3}
    tokens = spare + len('[{"name": "", "age": 0}, {"name": "", "age": 0}, {"name": ".", "age": 0}]')  # one per letter
    answer = _SHARED.generate("Hi", schema=schema, seed=seed, max_tokens=tokens, temperature=temperature)
    assert len(TypeAdapter(list[Person]).validate_json(answer.text)) >= 3
    assert answer.complete


_SHARED = tiny_model()


def test_no_token_is_spent_on_an_end_that_is_certain(model: PolarModel) -> None:
    answer = model.generate("Hello", choice=["abcd"])
    assert model.decode(answer.token_ids) == answer.text == "abcd"
    assert answer.usage.tokens.output == 4


def test_log_probabilities_are_those_of_what_is_allowed(model: PolarModel) -> None:
    answer = model.generate("Hello", regex="(ab|ac)z", logprobs=5)
    assert answer.logprobs is not None
    assert [len(entry.top) for entry in answer.logprobs] == [1, 2, 1]
    assert answer.logprobs[0].logprob == 0
    assert sum(torch.tensor([value for _, value in answer.logprobs[1].top]).exp()) == pytest.approx(1)


def test_a_hook_comes_before_the_grammar(model: PolarModel) -> None:
    b, c = model.encode("bc")

    def forbid_b(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[b] = -torch.inf
        return logits

    assert model.generate("Hello", regex="a[bc]", logits_hook=forbid_b).text == "ac"

    def forbid_both(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[[b, c]] = -torch.inf
        return logits

    with pytest.raises(GrammarError):
        model.generate("Hello", regex="a[bc]", logits_hook=forbid_both)
    assert model.generate("Hello", regex="a[bc]").text in {"ab", "ac"}  # the model serves on


def test_a_hook_keeps_its_tensor(model: PolarModel) -> None:
    """A hook may give back the same logits again and again: the grammar must not leave its marks on them."""
    logits = torch.zeros(model.loaded.decoder.vocab)
    answers = {
        model.generate("Hello", regex="[ab]{3}", temperature=1.0, seed=seed, logits_hook=lambda *_: logits).text
        for seed in range(20)
    }
    assert len(answers) > 4
    assert logits.count_nonzero() == 0


def test_an_answer_that_was_cut_off_says_so(model: PolarModel) -> None:
    answer = model.generate("Hello", schema=PERSON, max_tokens=5, fit_max_tokens=False)
    assert (answer.finish_reason, answer.complete) == ("length", False)
    with pytest.raises(IncompleteAnswerError, match="5") as caught:
        answer.json()
    assert caught.value.text == answer.text


def test_a_stop_string_ends_it_too_early(model: PolarModel) -> None:
    answer = model.generate("Hello", schema=PERSON, stop="age", max_tokens=100)
    assert (answer.finish_reason, answer.complete) == ("stop", False)
    with pytest.raises(IncompleteAnswerError):
        answer.json()


def test_a_number_may_be_as_long_as_python_reads(tiny: PolarModel) -> None:
    generation = replace(tiny.generate("Hello", max_tokens=1), complete=True)
    for digits in (101, 4300):
        assert replace(generation, text="9" * digits).json() == 10**digits - 1
    with pytest.raises(IncompleteAnswerError, match="4,301"):
        replace(generation, text="9" * 4301).json()


def test_a_schema_that_cannot_fit_is_refused_before_compute() -> None:
    sink = ListSink()
    with pytest.raises(GrammarError, match="max_tokens=10"):
        tiny_model(sink=sink).generate("Hello", schema=PERSON, max_tokens=10)
    assert sink.records == []


@pytest.mark.parametrize(
    ("texts", "least"),
    [(["abcdefgh"], 8), (["abcdefgh", "zzzzzzz"], 7), (["yes", "abracadabra"], 3), (["yes", "yes, always"], 3)],
)
def test_a_text_of_several_is_refused_exactly_where_none_fits(model: PolarModel, texts: list[str], least: int) -> None:
    for seed in range(6):
        answer = model.generate("?", choice=texts, temperature=2.0, seed=seed, max_tokens=least)
        assert (answer.text in texts, answer.complete) == (True, True)
    with pytest.raises(GrammarError, match=f"max_tokens={least - 1} .* {least}:"):
        model.generate("?", choice=texts, max_tokens=least - 1)


def test_a_cancelled_answer_is_incomplete() -> None:
    sink, cancel = ListSink(), threading.Event()
    stream = tiny_model(sink=sink).stream("Hello", schema={"type": "string", "minLength": 300}, cancel=cancel)
    next(stream)
    cancel.set()
    last = list(stream)[-1].generation
    assert last is not None
    assert (last.finish_reason, last.complete) == ("cancelled", False)
    assert [record.outcome for record in sink.records] == ["cancelled"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": PERSON, "regex": "a"}, "schema= and regex= exclude each other"),
        ({"schema": "{"}, "not valid JSON"),
        ({"schema": "[1]"}, "not a JSON schema"),
        ({"schema": 3}, "not a JSON schema"),
        ({"schema": {"minimum": float("nan")}}, "not a JSON document"),
        ({"schema": {"a": {1, 2}}}, "not a JSON document"),
        ({"schema": type("Odd", (), {})}, "has no JSON schema"),
        ({"schema": {"required": [["a" + 100 * "é"]]}}, "not supported"),  # llguidance 1.9 panics at this one
        ({"regex": "("}, "not supported.*unclosed group"),
        ({"regex": ""}, "not a text of 1"),
        ({"regex": 1}, "not a text of 1"),
        ({"grammar": "start: nothing"}, "not supported.*unknown name"),
        ({"choice": []}, "has 0 texts"),
        ({"choice": "abc"}, "not a list of texts"),
        ({"choice": ["a", ""]}, "at least one character"),
        ({"choice": ["a", 1]}, "at least one character"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_compute(options: Any, message: str) -> None:
    sink = ListSink()
    with pytest.raises(InvalidRequestError, match=message):
        tiny_model(sink=sink).generate("Hello", **options)
    assert sink.records == []


def test_a_deep_schema_is_refused(model: PolarModel) -> None:
    schema: dict[str, Any] = {}
    for _ in range(20_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError):
        model.generate("Hello", schema=schema)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "llguidance":
            raise ImportError(name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.split(".")[0] == "llguidance"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    model = tiny_model()
    assert model.generate("Hello", max_tokens=1).text is not None
    with pytest.raises(MissingExtraError, match=r"polar-llm\[structured\]"):
        model.generate("Hello", choice=["a"])
