"""Generation through the public class: decoding, sampling, stopping, streaming, cancelling, batches, threads."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk import ListSink, Policy, Program, StaticRouter
from polar_sdk.errors import PolicyError, ProgramError, RequestTimeoutError, SinkError, UnsupportedArchitectureError
from polar_sdk.router.base import Route, Router
from polar_sdk.serving.places import Limits
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer
from polar_sdk.usage import UsageSink

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


def test_prompts_run_a_few_at_a_time(model: PolarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.scheduler, "limits", Limits(prefill_alone=20, prefill_beside=7))
    prompts = ["x" * length for length in (3, 30, 8, 8, 1)]
    together = model.generate_batch(prompts, max_tokens=6)
    assert [d.token_ids for d in together] == [model.generate(p, max_tokens=6).token_ids for p in prompts]


def test_an_empty_batch_is_no_answer(model: PolarModel) -> None:
    assert model.generate_batch([]) == []


def test_a_seed_repeats_and_another_differs(model: PolarModel) -> None:
    def run(seed: int) -> tuple[int, ...]:
        return model.generate("sample", temperature=1.0, seed=seed, max_tokens=20).token_ids

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(5)}) == 5


def test_top_k_of_one_is_greedy(model: PolarModel) -> None:
    greedy = model.generate("sample", max_tokens=20).token_ids
    assert model.generate("sample", temperature=3.0, top_k=1, max_tokens=20).token_ids == greedy
    assert model.generate("sample", temperature=3.0, top_p=1e-9, max_tokens=20).token_ids == greedy


def test_sampling_follows_the_distribution(model: PolarModel) -> None:
    """Top-k of two: over many seeds both of the two likeliest tokens come, and no third."""
    first = {model.generate("x", temperature=2.0, top_k=2, seed=s, max_tokens=1).token_ids[0] for s in range(40)}
    assert len(first) == 2


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


def test_cancel_from_another_thread() -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    stop = threading.Event()
    chunks = []
    for chunk in model.stream("hello", max_tokens=200, cancel=stop):
        chunks.append(chunk)
        if len(chunks) == 5:
            threading.Thread(target=stop.set).start()
            stop.wait()
    done = chunks[-1].generation
    assert done is not None
    assert done.finish_reason == "cancelled"
    assert 5 <= len(done.token_ids) <= 8  # two are computed ahead, and one may be under way
    assert [record.outcome for record in sink.records] == ["cancelled"]


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


def test_rows_of_a_batch_differ_in_what_each_says() -> None:
    model = tiny_model()
    each: list[RequestOptions] = [
        {"compute": "economy", "tenant": "acme"},
        {"program": "0-1 3x2 4-5", "max_tokens": 4},
        {"temperature": 0.8, "seed": 5},
    ]
    prompts = ["a", "b", "c"]
    together = model.generate_batch(prompts, each=each, max_tokens=9)
    for done, prompt, one in zip(together, prompts, each, strict=True):
        own: RequestOptions = {"max_tokens": 9, **one}
        alone = model.generate(prompt, **own)
        assert (done.token_ids, done.usage.program) == (alone.token_ids, alone.usage.program)
        assert (done.usage.tenant, done.usage.tier) == (alone.usage.tenant, alone.usage.tier)


def test_a_stream_never_started_leaves_no_record() -> None:
    sink = ListSink()
    tiny_model(sink=sink).stream("hello").close()
    assert sink.records == []


def test_threads_with_different_programs_do_not_touch_each_other(model: PolarModel) -> None:
    programs = ["0-5", "0-1 3-5", LOOP, "0 5"]
    alone = [model.generate("hello", program=text, max_tokens=12).token_ids for text in programs]
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(model.generate, "hello", program=text, max_tokens=12) for text in programs * 5]
    assert [run.result().token_ids for run in runs] == alone * 5


def test_interleaved_streams_do_not_touch_each_other(model: PolarModel) -> None:
    streams = [model.stream("hello", program=text, max_tokens=10) for text in ("0-5", LOOP)]
    texts = ["", ""]
    for pair in zip(*streams, strict=True):
        texts = [text + chunk.text for text, chunk in zip(texts, pair, strict=True)]
    assert texts == [model.generate("hello", program=p, max_tokens=10).text for p in ("0-5", LOOP)]


def test_tiers_run_their_programs_and_program_wins() -> None:
    model = tiny_model()
    runs = [
        (model.generate("x", max_tokens=1).usage, "standard", "0 2-5", "static"),
        (model.generate("x", max_tokens=1, compute="economy").usage, "economy", "0 3-5", "static"),
        (model.generate("x", max_tokens=1, compute="exact").usage, "exact", "0-5", "identity"),
        (model.generate("x", max_tokens=1, compute="economy", program="0-4 5").usage, None, "0-5", "identity"),
    ]
    for usage, tier, program, router in runs:
        assert (usage.tier, usage.program, usage.router) == (tier, program, router)


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


def test_a_router_is_bound_by_the_policy() -> None:
    model = tiny_model(router=StaticRouter("1-5"))  # layer 0 is protected
    with pytest.raises(ProgramError, match="layer 0"):
        model.generate("x")


def test_a_policy_of_another_model_is_refused() -> None:
    with pytest.raises(PolicyError, match="polar lab scan"):
        tiny_model(policy=Policy(model="other", fingerprint="f" * 64))


def test_an_unsupported_architecture_says_what_is_supported() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from polar_sdk import PolarModel

    bloom = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=260))
    with pytest.raises(UnsupportedArchitectureError, match=r"bloom.*llama"):
        PolarModel.from_hf(bloom, tiny_tokenizer())


class FullSink(UsageSink):
    """A store that has no room."""

    def check(self) -> None:
        raise SinkError("the disk is full.")

    def emit(self, record: UsageRecord) -> None:
        raise AssertionError("nothing ran, so there is nothing to record")


def test_nothing_runs_when_usage_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(sink=FullSink())
    monkeypatch.setattr(model.loaded.decoder, "embed", None)  # a call would be a TypeError
    with pytest.raises(SinkError, match="full"):
        model.generate("hello")


def test_a_record_lost_at_a_timeout_is_not_hidden_by_it() -> None:
    class Full(ListSink):
        def emit(self, record: UsageRecord) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left") as caught:
        tiny_model(sink=Full()).generate("hello", timeout=1e-9)
    assert isinstance(caught.value.__context__, RequestTimeoutError)


def test_score_is_the_references_log_likelihood(model: PolarModel) -> None:
    reference = tiny_llama()
    prompt, tails = model.encode("once upon"), [" a time", "!"]
    for tail, ours in zip(tails, model.score("once upon", tails), strict=True):
        ids = model.encode(tail)
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(ids))
        assert ours == pytest.approx(expected, abs=1e-3)


def test_score_of_a_program_is_that_of_its_layers(model: PolarModel) -> None:
    reference = tiny_llama()
    reference.model.layers = torch.nn.ModuleList([reference.model.layers[i] for i in (0, 1, 3, 4, 5)])
    reference.config.num_hidden_layers = 5
    prompt, tail = model.encode("once"), model.encode("x")
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + tail]), use_cache=False).logits[0].log_softmax(-1)
    (ours,) = model.score("once", ["x"], program="0-1 3-5")
    assert ours == pytest.approx(float(logits[len(prompt) - 1, tail[0]]), abs=1e-3)
