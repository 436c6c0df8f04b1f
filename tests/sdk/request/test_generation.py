"""Generation through the public class: decoding, sampling, stopping, streaming, cancelling, batches, threads."""

from __future__ import annotations

import pickle
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk import ListSink, Policy, Program
from polar_sdk.errors import RequestTimeoutError
from polar_sdk.router.base import Route, Router
from polar_sdk.serving.places import Limits
from polar_sdk.testing import tiny_llama, tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.model import PolarModel
    from polar_sdk.request.options import RequestOptions
    from polar_sdk.usage import UsageRecord

LOOP = "0-2 3x2 4-5"


@pytest.fixture(scope="module")
def model() -> PolarModel:
    return tiny_model(policy=Policy.permissive())


@pytest.mark.parametrize("program", ["0-5", "0-1 3-5", LOOP])
def test_greedy_tokens_with_the_cache_are_those_without_it(model: PolarModel, program: str) -> None:
    done = model.generate("the sea", program=program, max_tokens=40)
    decoder, prompt = model.loaded.decoder, model._encoder.encode("the sea")
    from polar_sdk.engine.forward import next_logits
    from polar_sdk.engine.row import Row

    tokens: list[int] = []
    while len(tokens) < len(done.token_ids):  # everything again from the start for each token
        with torch.inference_mode():
            row = Row(decoder, Program.parse(program))
            tokens.append(int(next_logits(decoder, [row], [[*prompt, *tokens]])[0].argmax()))
    assert tuple(tokens) == done.token_ids


def test_greedy_identity_is_hugging_faces_generate(model: PolarModel) -> None:
    reference = tiny_llama()
    ids = torch.tensor([model._encoder.encode("hello there")])
    out = reference.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    ours = model.generate("hello there", program="0-5", max_tokens=30)
    assert ours.token_ids == tuple(out[0, ids.shape[1] :].tolist())


def test_stream_is_generate_in_pieces(model: PolarModel) -> None:
    chunks = list(model.stream("hello", max_tokens=20))
    whole = model.generate("hello", max_tokens=20)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.generation is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    last = chunks[-1].generation
    assert last is not None
    assert (last.text, last.token_ids, last.finish_reason) == (whole.text, whole.token_ids, "length")


def test_the_first_piece_waits_for_no_second_token(model: PolarModel) -> None:
    """It would take another pass, which is long where many rows run."""
    read, seen = threading.Event(), []

    def hook(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if len(tokens) == 1:
            seen.append(read.wait(20))
        return logits

    stream = model.stream("hello", max_tokens=5, logits_hook=hook)
    assert next(stream).generation is None
    read.set()
    assert len(list(stream)) == 4
    assert seen == [True]


@pytest.mark.parametrize("sampled", [False, True])
def test_rows_of_a_batch_answer_as_they_do_alone(
    model: PolarModel, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.scheduler, "limits", Limits(prefix_share=0))
    model.scheduler.prefixes.make_room(model.decoder.pool.sizes)
    prompts = ["a", "a longer prompt than the first", "mid size", "a"]
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 5} if sampled else {}
    together = model.generate_batch(prompts, max_tokens=15, **options)  # type: ignore[arg-type]
    alone = [model.generate(prompt, max_tokens=15, **options) for prompt in prompts]  # type: ignore[arg-type]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]
    assert [done.usage.flops for done in together] == [done.usage.flops for done in alone]


def test_a_seed_repeats_and_another_differs(model: PolarModel) -> None:
    def run(seed: int) -> tuple[int, ...]:
        return model.generate("sample", temperature=1.0, seed=seed, max_tokens=20).token_ids

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(5)}) == 5


def test_top_k_of_one_is_greedy(model: PolarModel) -> None:
    greedy = model.generate("sample", max_tokens=20).token_ids
    assert model.generate("sample", temperature=3.0, top_k=1, max_tokens=20).token_ids == greedy
    assert model.generate("sample", temperature=3.0, top_p=1e-9, max_tokens=20).token_ids == greedy


def test_stop_strings_across_token_borders(model: PolarModel) -> None:
    whole = model.generate("hello", max_tokens=40)
    for start in (0, 3, 11):
        stop = whole.text[start : start + 4]  # one token per byte: every stop spans several
        at = whole.text.find(stop)
        chunks = list(model.stream("hello", max_tokens=40, stop=[stop, "never comes"]))
        assert "".join(chunk.text for chunk in chunks) == whole.text[:at]
        done = chunks[-1].generation
        assert done is not None
        assert (done.text, done.finish_reason) == (whole.text[:at], "stop")
        assert done.usage.tokens.output == len(done.token_ids) > len(done.text)  # executed, not shown


def test_a_stop_string_found_at_the_very_end_is_a_stop() -> None:
    """A longer stop string could still come, so the shorter one is decided only when the last token is there."""
    model = tiny_model()
    whole = model.generate("hello", max_tokens=8, program="0-5").text
    done = model.generate("hello", max_tokens=8, program="0-5", stop=[whole[5:8], whole[4:8] + "\x00"])
    assert (done.text, done.finish_reason, done.usage.finish_reason) == (whole[:5], "stop", "stop")


def test_the_end_token_ends_the_answer() -> None:
    first = tiny_model().generate("hi", max_tokens=8).token_ids
    model = tiny_model()
    model.loaded.generation_config.eos_token_id = [first[3]]
    done = model.generate("hi", max_tokens=8)
    assert (done.token_ids, done.finish_reason) == (first[: first.index(first[3]) + 1], "stop")
    assert done.text == model.loaded.tokenizer.decode(list(done.token_ids[:-1]))


def test_a_request_cancelled_before_it_begins_computes_nothing() -> None:
    model = tiny_model()
    stop = threading.Event()
    stop.set()
    done = model.generate("hello", cancel=stop)
    assert (done.finish_reason, done.text, done.usage.flops.total) == ("cancelled", "", 0)


class Clock:
    """The time as requests see it; it can be put forward."""

    def __init__(self) -> None:
        self.ahead_ns = 0

    def perf_counter_ns(self) -> int:
        return time.perf_counter_ns() + self.ahead_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("polar_sdk.serving.request.time", clock)
    return clock


def test_a_timeout_ends_the_request_before_its_next_pass(clock: Clock) -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    stream = model.stream("hello", max_tokens=200, timeout=1000)
    for _ in range(3):
        next(stream)
    clock.ahead_ns = 10**12
    with pytest.raises(RequestTimeoutError, match=r"[3-6] .*timeout=1000.0") as caught:
        list(stream)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.retryable
    assert [caught.value.usage] == sink.records
    (record,) = sink.records
    assert (record.outcome, record.finish_reason, record.error) == ("cancelled", "cancelled", None)
    assert 3 <= record.tokens.output <= 6  # two are computed ahead, and one may be under way
    assert record.flops == model.cost(record.program, prompt=record.tokens.input, output=record.tokens.output)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.hint, again.usage) == (str(caught.value), caught.value.hint, record)


def test_time_that_is_up_at_once_computes_nothing(model: PolarModel) -> None:
    with pytest.raises(RequestTimeoutError) as caught:
        model.generate("hello", timeout=1e-9)
    assert caught.value.usage is not None
    assert caught.value.usage.flops.total == 0


def test_an_answer_that_is_done_in_time_stays(model: PolarModel, clock: Clock) -> None:
    *_, last = model.stream("hello", max_tokens=3, timeout=1000)
    clock.ahead_ns = 10**12
    assert last.generation is not None
    assert last.generation.text == model.generate("hello", max_tokens=3).text


def test_a_caller_that_has_said_stop_gets_what_there_is(model: PolarModel) -> None:
    stop = threading.Event()
    stop.set()
    assert model.generate("hello", cancel=stop, timeout=1e-9).finish_reason == "cancelled"


def test_a_timeout_ends_a_batch_and_its_finished_rows_stay_completed(clock: Clock) -> None:
    class Late(ListSink):
        """Puts the clock forward when the first row is done."""

        def emit(self, record: UsageRecord) -> None:
            super().emit(record)
            clock.ahead_ns = 10**12

    sink = Late()
    each: list[RequestOptions] = [{"request_id": "a", "max_tokens": 50}, {"request_id": "b", "max_tokens": 3}]
    each.append({"request_id": "c", "max_tokens": 50})
    with pytest.raises(RequestTimeoutError) as caught:
        tiny_model(sink=sink).generate_batch(["one", "two", "three"], each=each, timeout=1000)
    found = [(record.request_id, record.outcome) for record in sink.records]
    assert found == [("b", "completed"), ("a", "cancelled"), ("c", "cancelled")]
    assert all(3 <= record.tokens.output < 50 for record in sink.records)
    assert caught.value.usage in sink.records[1:]


def test_a_stream_never_started_leaves_no_record() -> None:
    sink = ListSink()
    tiny_model(sink=sink).stream("hello").close()
    assert sink.records == []


class ByLength(Router):
    """A router that really looks at the prompt."""

    kind = "by-length"
    version = "7"

    def route(self, tokens: Sequence[int]) -> Route:
        return Route(Program.parse("0-5" if len(tokens) > 10 else "0 5"), flops=len(tokens))


def test_a_router_of_ones_own_chooses_per_prompt_and_is_billed() -> None:
    model = tiny_model(router=ByLength())
    short, long = model.generate("x", max_tokens=1).usage, model.generate("x" * 30, max_tokens=1).usage
    assert (short.program, long.program) == ("0 5", "0-5")
    assert (short.router, short.router_version, short.flops.router) == ("by-length", "7", short.tokens.input)


def test_a_record_lost_at_a_timeout_is_not_hidden_by_it() -> None:
    class Full(ListSink):
        def emit(self, record: UsageRecord) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left") as caught:
        tiny_model(sink=Full()).generate("hello", timeout=1e-9)
    assert isinstance(caught.value.__context__, RequestTimeoutError)
