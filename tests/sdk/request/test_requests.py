"""Every bad input is refused before compute: the right error, one line that names value, limit and fix, no record."""

from __future__ import annotations

import copy
import threading
import time
from itertools import repeat
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
import pytest

from polar_sdk.errors import (
    ContextWindowError,
    EmptyPromptError,
    InvalidRequestError,
    PolarError,
    ProgramDepthError,
    ProgramSyntaxError,
    ProtectedLayerError,
    SamplingError,
    TagError,
    ToleranceError,
    UnknownTierError,
)
from polar_sdk.model import PolarModel
from polar_sdk.programs.program import Program
from polar_sdk.router.base import StaticRouter
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from polar_sdk.request.options import Prompt
    from polar_sdk.usage import ListSink

HELLO = [{"role": "user", "content": "hello"}]

BAD_OPTIONS: list[tuple[dict[str, Any], type[PolarError], list[str]]] = [
    # option, error, words of its message
    ({"max_tokens": 0}, SamplingError, ["max_tokens=0", "1 or more"]),
    ({"max_tokens": -5}, SamplingError, ["max_tokens=-5", "1 or more"]),
    ({"max_tokens": 1.5}, SamplingError, ["max_tokens=1.5", "whole number"]),
    ({"max_tokens": "9"}, SamplingError, ["max_tokens='9'", "whole number"]),
    ({"max_tokens": 5000}, ContextWindowError, ["max_tokens=5000", "512", "at most 505"]),
    ({"temperature": -0.1}, SamplingError, ["temperature=-0.1", "0 (greedy) to 100"]),
    ({"temperature": 101}, SamplingError, ["temperature=101", "0 (greedy) to 100"]),
    ({"temperature": float("nan")}, SamplingError, ["temperature=nan", "0 (greedy) to 100"]),
    ({"temperature": float("inf")}, SamplingError, ["temperature=inf", "0 (greedy) to 100"]),
    ({"temperature": "hot"}, SamplingError, ["temperature='hot'", "number"]),
    ({"temperature": None}, SamplingError, ["temperature=None", "number"]),
    ({"top_p": 0}, SamplingError, ["top_p=0", "above 0 and at most 1"]),
    ({"top_p": 1.01}, SamplingError, ["top_p=1.01", "above 0 and at most 1"]),
    ({"top_p": float("nan")}, SamplingError, ["top_p=nan", "above 0 and at most 1"]),
    ({"top_k": -1}, SamplingError, ["top_k=-1", "0 (off) or more"]),
    ({"top_k": 1.5}, SamplingError, ["top_k=1.5", "whole number"]),
    ({"min_p": 1.5}, SamplingError, ["min_p=1.5", "from 0 (off) to 1"]),
    ({"repetition_penalty": 0}, SamplingError, ["repetition_penalty=0", "0.01 to 100"]),
    ({"presence_penalty": 3}, SamplingError, ["presence_penalty=3", "-2 to 2"]),
    ({"frequency_penalty": "a"}, SamplingError, ["frequency_penalty='a'", "number"]),
    ({"logit_bias": {"x": 1, "y": 1}}, SamplingError, ["logit_bias", "'x', 'y'", "token id"]),
    ({"logit_bias": {1_000_000: 1}}, SamplingError, ["logit_bias", "token 1000000", "ids of this model are 0 to"]),
    ({"logit_bias": {3: 101}}, SamplingError, ["logit_bias[3]=101", "-100 to 100"]),
    ({"stop_repeats": 1}, InvalidRequestError, ["stop_repeats=1", "2 to 1,000"]),
    ({"stop_repeats": True}, InvalidRequestError, ["stop_repeats=True", "whole number"]),
    ({"ignore_eos": 1}, InvalidRequestError, ["ignore_eos=1", "True nor False"]),
    ({"ignore_eos": True, "regex": "a"}, InvalidRequestError, ["ignore_eos", "grammar"]),
    ({"seed": 2**63}, SamplingError, ["seed=9223372036854775808", "64-bit"]),
    ({"seed": 0.5}, SamplingError, ["seed=0.5", "whole number"]),
    ({"logprobs": -1}, SamplingError, ["logprobs=-1", "0 to 20"]),
    ({"logprobs": 21}, SamplingError, ["logprobs=21", "0 to 20"]),
    ({"logprobs": True}, SamplingError, ["logprobs=True", "0 to 20"]),
    ({"logits_hook": 5}, InvalidRequestError, ["logits_hook is 5", "a function"]),
    ({"stop": ""}, InvalidRequestError, ["stop string is empty", "remove it"]),
    ({"stop": ["a", ""]}, InvalidRequestError, ["stop string is empty", "remove it"]),
    ({"stop": [7]}, InvalidRequestError, ["stop 7", "str()"]),
    ({"stop": 5}, InvalidRequestError, ["stop=5"]),
    ({"stop": "a" * 1_001}, InvalidRequestError, ["1,001", "1,000"]),
    ({"stop": ["a"] * 100_000}, InvalidRequestError, ["256"]),
    ({"stop": repeat("a")}, InvalidRequestError, ["256"]),
    ({"tenant": ""}, TagError, ["tenant ''", "1 to 200"]),
    ({"tenant": " \t"}, TagError, ["tenant ' \\t'", "not only blanks"]),
    ({"tenant": "x" * 201}, TagError, ["tenant 'xxx", "201 characters", "1 to 200"]),
    ({"tenant": 5}, TagError, ["tenant is 5", "str()"]),
    ({"tenant": "\ud800"}, TagError, ["tenant '\\ud800'", "lone surrogate U+D800"]),
    ({"tenant": "a\x00b"}, TagError, ["tenant 'a\\x00b'", "control character U+0000"]),
    ({"request_id": ""}, TagError, ["request_id ''", "1 to 200"]),
    ({"request_id": "x" * 201}, TagError, ["request_id 'xxx", "1 to 200"]),
    ({"request_id": "\udfff"}, TagError, ["request_id '\\udfff'", "lone surrogate U+DFFF"]),
    ({"tags": {"a": 1}}, TagError, ["tag 'a' is 1", "str()"]),
    ({"tags": {1: "a"}}, TagError, ["tag is 1", "str()"]),
    ({"tags": {" ": "a"}}, TagError, ["tag ' '", "not only blanks"]),
    ({"tags": {"a": "\ud800"}}, TagError, ["tag 'a'", "lone surrogate U+D800"]),
    ({"tags": ["a"]}, TagError, ["tags is ['a']", "mapping"]),
    ({"compute": "econmy"}, UnknownTierError, ["'econmy'", "economy, standard, premium, exact", "mean 'economy'"]),
    ({"compute": ""}, UnknownTierError, ["''", "economy, standard, premium, exact"]),
    ({"compute": 5}, ToleranceError, ["compute=5", "no certified router", "use a tier"]),
    ({"program": ""}, ProgramSyntaxError, ["empty", "'0-29'"]),
    ({"program": "0-b"}, ProgramSyntaxError, ["'0-b'", "'0-11 15x2 18-29'"]),
    ({"program": 5}, ProgramSyntaxError, ["program 5", "'0-11 15x2 18-29'"]),
    ({"program": "0-6"}, ProgramDepthError, ["layer 6", "6 layers, numbered 0 to 5"]),
    ({"program": "1-5"}, ProtectedLayerError, ["skips layer 0", "protected: 0, -1"]),
    ({"template": "jinja"}, InvalidRequestError, ["'jinja'", "auto, chat or raw"]),
    ({"cancel": True}, InvalidRequestError, ["cancel is True", "threading.Event()"]),
    ({"max_token": 5}, InvalidRequestError, ["'max_token'", "did you mean 'max_tokens'?"]),
    ({"xyz": 5}, InvalidRequestError, ["'xyz'", "choose from: cancel, choice, compute", "top_p."]),
    ({"timeout": 0}, InvalidRequestError, ["timeout=0", "more than 0 seconds"]),
    ({"timeout": -1.5}, InvalidRequestError, ["timeout=-1.5", "more than 0 seconds"]),
    ({"timeout": float("inf")}, InvalidRequestError, ["timeout=inf", "or None"]),
    ({"timeout": float("nan")}, InvalidRequestError, ["timeout=nan", "or None"]),
    ({"timeout": "5"}, InvalidRequestError, ["timeout='5'", "not a number"]),
    # integers that are no float, and some that Python does not write
    ({"temperature": 10**400}, SamplingError, ["temperature=1000"]),
    ({"timeout": 10**400}, InvalidRequestError, ["timeout=1000"]),
    ({"compute": 10**400}, ToleranceError, ["compute=1000"]),
    *(
        ({name: 10**5_000}, SamplingError, [f"{name}=a value"])
        for name in ("temperature", "top_p", "top_k", "seed", "logprobs")
    ),
    ({"max_tokens": 10**5_000}, ContextWindowError, ["max_tokens=a value"]),
    ({"timeout": 10**5_000}, InvalidRequestError, ["timeout=a value"]),
    ({"stop": [10**5_000]}, InvalidRequestError, ["is not text"]),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS, ids=[next(iter(each[0])) for each in BAD_OPTIONS])
def test_bad_options(
    tiny: PolarModel, records: ListSink, options: dict[str, Any], error: type[PolarError], words: list[str]
) -> None:
    start = time.process_time()
    with pytest.raises(PolarError) as caught:
        tiny.generate("hello", **options)
    assert time.process_time() - start < 5
    assert type(caught.value) is error
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2
    assert not caught.value.retryable
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert records.records == []
    with pytest.raises(error):  # a stream is checked at once, not at its first chunk
        tiny.stream("hello", **options)


BAD_PROMPTS: list[tuple[Any, type[PolarError], list[str]]] = [
    ("", EmptyPromptError, ["empty", "give it some text"]),
    (" \n\t ", EmptyPromptError, ["4 blank characters", "give it some text"]),
    ([], EmptyPromptError, ["0 messages", "give it some text"]),
    ([{"role": "user", "content": "  "}], EmptyPromptError, ["1 messages without text"]),
    (None, InvalidRequestError, ["NoneType", "a text or a list of messages"]),
    (5, InvalidRequestError, ["int", "a text or a list of messages"]),
    (b"hello", InvalidRequestError, ["bytes", "a text or a list of messages"]),
    ({"role": "user", "content": "x"}, InvalidRequestError, ["dict", "a list of messages"]),
    (["hello"], InvalidRequestError, ["message 0 is 'hello'", "'role' and 'content'"]),
    ([*HELLO, {"role": "user"}], InvalidRequestError, ["message 1", "'role' and 'content'"]),
    ([{"content": "x"}], InvalidRequestError, ["message 0", "'role' and 'content'"]),
    ([{"role": "user", "content": None}], InvalidRequestError, ["message 0", "content None", "must be text"]),
    ([{"role": "user", "content": [{"text": "x"}]}], InvalidRequestError, ["message 0", "must be text"]),
    ([{"role": 5, "content": "x"}], InvalidRequestError, ["message 0", "role 5", "must be text"]),
    ("ab\ud800", InvalidRequestError, ["lone surrogate at character 2", "valid Unicode"]),
    ([{"role": "user", "content": "\udcff"}], InvalidRequestError, ["lone surrogate at character 0"]),
    ([{"role": "\udcff", "content": "x"}], InvalidRequestError, ["lone surrogate at character 0"]),
    ("x" * 600, ContextWindowError, ["602 tokens", "512", "shorten the prompt"]),
]


@pytest.mark.parametrize(
    ("prompt", "error", "words"), BAD_PROMPTS, ids=lambda value: str(value)[:40].encode("ascii", "replace").decode()
)
def test_bad_prompts(
    tiny: PolarModel, records: ListSink, prompt: Any, error: type[PolarError], words: list[str]
) -> None:
    with pytest.raises(PolarError) as caught:
        tiny.generate(prompt)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert records.records == []


def test_one_bad_prompt_stops_a_batch_before_compute(tiny: PolarModel, records: ListSink) -> None:
    with pytest.raises(EmptyPromptError):
        tiny.generate_batch(["hello", ""], max_tokens=2)
    assert records.records == []


def test_batches_that_make_no_sense(tiny: PolarModel, records: ListSink) -> None:
    with pytest.raises(InvalidRequestError):
        tiny.generate_batch("hello")
    with pytest.raises(InvalidRequestError, match="'x'"):
        tiny.generate_batch(["a", "b"], request_id="x")
    with pytest.raises(InvalidRequestError, match=r"1 .* 2 "):
        tiny.generate_batch(["a", "b"], each=[{}])
    with pytest.raises(InvalidRequestError, match="'x'"):
        tiny.generate_batch(["a", "b", "c"], each=[{"request_id": "x"}, {}, {"request_id": "x"}])
    wrong: list[Any] = [{}, {"sed": 1}]
    with pytest.raises(InvalidRequestError, match=r"'sed'.*'seed'"):
        tiny.generate_batch(["a", "b"], each=wrong)
    wrong[1] = "x"
    with pytest.raises(InvalidRequestError, match="'x'"):
        tiny.generate_batch(["a", "b"], each=wrong)
    with pytest.raises(InvalidRequestError, match="timeout"):
        tiny.generate_batch(["a", "b"], each=[{}, {"timeout": 1}])
    with pytest.raises(InvalidRequestError, match="cancel"):
        tiny.generate_batch(["a", "b"], each=[{"cancel": threading.Event()}, {}])
    with pytest.raises(TagError, match=r"\['a'\]"):
        wrong[1] = {"tags": ["a"]}
        tiny.generate_batch(["a", "b"], each=wrong, tags={"c": "d"})
    assert tiny.generate_batch([]) == tiny.generate_batch([], each=[]) == []
    assert records.records == []


def test_what_a_prompt_of_a_batch_has_of_its_own_lies_over_what_all_share(tiny: PolarModel) -> None:
    one, two = tiny._maker.make_batch(
        ["a", "b"],
        [{"tenant": "globex", "tags": {"row": "1"}, "compute": "economy", "max_tokens": 5, "request_id": "r-1"}, {}],
        {"tenant": "house", "tags": {"row": "?", "job": "7"}, "compute": "premium", "max_tokens": 9, "seed": 3},
    )
    assert (one.tenant, one.tier, one.max_tokens, one.sampling.seed) == ("globex", "economy", 5, 3)
    assert (two.tenant, two.tier, two.max_tokens, two.sampling.seed) == ("house", "premium", 9, 3)
    assert one.tags == {"team": "search", "stage": "test", "row": "1", "job": "7"}
    assert two.tags == {"team": "search", "stage": "test", "row": "?", "job": "7"}
    assert one.request_id == "r-1" != two.request_id


class TestWindow:
    """Prompt and answer share the context window, here 512 tokens; a chat turn of n letters has n + 2."""

    def test_default_is_256(self, tiny: PolarModel) -> None:
        assert made(tiny, "hello").max_tokens == 256

    def test_default_is_what_the_window_leaves(self, tiny: PolarModel) -> None:
        assert tiny.count_tokens("x" * 400) == 402
        assert made(tiny, "x" * 400).max_tokens == 110

    def test_the_last_token_of_the_window_can_be_asked_for(self, tiny: PolarModel) -> None:
        prompt = "x" * 509
        assert tiny.count_tokens(prompt) == 511
        assert made(tiny, prompt).max_tokens == 1
        assert made(tiny, prompt, max_tokens=1).max_tokens == 1
        with pytest.raises(ContextWindowError, match=r"max_tokens=2 and a prompt of 511.*512.*at most 1"):
            made(tiny, prompt, max_tokens=2)
        done = tiny.generate(prompt)
        assert (done.usage.tokens.input, done.usage.tokens.output) == (511, 1)

    def test_a_prompt_that_fills_the_window_leaves_no_answer(self, tiny: PolarModel) -> None:
        with pytest.raises(ContextWindowError, match="512"):
            made(tiny, "x" * 510)


class TestTemplates:
    def test_auto_makes_one_user_message(self, tiny: PolarModel) -> None:
        assert made(tiny, "hello").tokens == made(tiny, HELLO).tokens == made(tiny, "hello", template="chat").tokens

    def test_raw_refuses_messages(self, tiny: PolarModel) -> None:
        with pytest.raises(InvalidRequestError, match="'raw'"):
            made(tiny, HELLO, template="raw")

    def test_a_model_without_template(self) -> None:
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.chat_template = None
        model = PolarModel.from_hf(tiny_llama(), tokenizer, ledger=None)
        assert list(made(model, "hello").tokens) == tokenizer.encode("hello")
        for options in ({"prompt": "hello", "template": "chat"}, {"prompt": HELLO}):
            with pytest.raises(InvalidRequestError, match="template='raw'"):
                made(model, **options)


class TestWho:
    def test_the_calls_come_over_them(self, tiny: PolarModel) -> None:
        request = made(tiny, "hello", tenant="globex", tags={"stage": "live", "job": "7"})
        assert request.tenant == "globex"
        assert request.tags == {"team": "search", "stage": "live", "job": "7"}
        assert made(tiny, "hello").tags == {"team": "search", "stage": "test"}

    def test_none_means_not_given(self, tiny: PolarModel) -> None:
        request = made(tiny, "hello", tenant=None, tags=None, request_id=None, stop=None, seed=None, cancel=None)
        assert request.tenant == "acme"
        assert UUID(request.request_id).version == 7
        assert request.stops == ()

    @pytest.mark.parametrize("settings", [{"tags": {"a": 1}}, {"tenant": " acme"}])
    def test_a_bad_name_of_the_object_stops_the_call(self, settings: Any) -> None:
        with pytest.raises(TagError):
            tiny_model(**settings).generate("hello")

    def test_the_record_says_who(self, tiny: PolarModel, records: ListSink) -> None:
        tiny.generate("hello", max_tokens=1, tenant="globex", tags={"job": "7"}, request_id="mine")
        (record,) = records.records
        assert (record.tenant, record.request_id) == ("globex", "mine")
        assert record.tags == {"team": "search", "stage": "test", "job": "7"}


class TestPrecedence:
    """Program by hand, else tier, else the object's router, else the default tier."""

    def test_default_tier(self, tiny: PolarModel) -> None:
        request = made(tiny, "hello")
        assert (request.tier, request.program.text) == ("standard", "0 2-5")

    def test_program_over_tier(self, tiny: PolarModel) -> None:
        request = made(tiny, "hello", compute="economy", program="0 5")
        assert (request.tier, request.program.text, request.router) == (None, "0 5", "static")

    def test_router_over_default_tier(self) -> None:
        model = tiny_model(router=StaticRouter("0 4-5"))
        assert made(model, "hello").program.text == "0 4-5"
        assert made(model, "hello", compute="premium").program == Program.identity(6)
        assert made(model, "hello", program="0 5").program.text == "0 5"

    def test_full_depth_is_named_identity(self, tiny: PolarModel) -> None:
        assert made(tiny, "hello", compute="exact").router == "identity"
        assert made(tiny, "hello", program="0-5").router == "identity"

    def test_a_routers_program_is_bounded_too(self) -> None:
        with pytest.raises(ProtectedLayerError):
            tiny_model(router=StaticRouter("1-5")).generate("hello")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1},  # a whole number is a number
        {"temperature": 100, "top_k": 1},
        {"temperature": 1e-42},
        {"temperature": 0.7, "top_p": 1},
        {"temperature": 0.7, "top_p": 1e-9},
        {"temperature": 0.7, "top_k": 10**9},
        {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.int64(4), "max_tokens": np.int64(3)},
        {"temperature": 1.0, "seed": -(2**63)},
        {"temperature": 1.0, "seed": 2**63 - 1},
        {"tenant": "x" * 200},
        {"stop": [], "tags": {}},
        {"stop": ["\x01" * 1_000] * 256},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_lies_just_inside_the_limits(tiny: PolarModel, options: dict[str, Any]) -> None:
    done = tiny.generate("hello", **{"max_tokens": 3, **options})
    assert done.usage.tokens.output <= 3
    assert type(done.usage.tokens.output) is int


def made(model: PolarModel, prompt: Prompt, **options: Any) -> Any:
    """The request as the engine would run it."""
    return model._maker.make(prompt, options)  # type: ignore[arg-type]
