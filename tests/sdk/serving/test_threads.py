"""Async calls: the loop runs on, a cancelled task stops compute, errors and context variables cross the thread.

No test looks at a clock. Where two things must happen at once, an engine that waits for the loop stands in the way: a
logits hook is called once per token, so one that blocks holds the engine at a known place.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from polar_sdk.errors import EmptyPromptError, RequestTimeoutError, SinkError
from polar_sdk.serving import threads
from polar_sdk.serving.threads import AHEAD, run_apart
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink, Outcome, UsageRecord
from tests.sdk.serving.gate import LONG, Gate, never_ending

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
    from types import FrameType

    from torch import Tensor

    from polar_sdk.model import PolarModel
    from polar_sdk.serving.request import Cancel

    Hook = Callable[[Sequence[int], Tensor], Tensor]


@pytest.fixture(scope="module")
def prompt() -> str:
    return never_ending()


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.reached.wait, 60)


async def ticks(number: int = 10) -> int:
    """Let the loop run so many times."""
    ticked = 0
    for _ in range(number):
        await asyncio.sleep(0)
        ticked += 1
    return ticked


class TestGenerate:
    async def test_the_answer_is_the_synchronous_one(self, tiny: PolarModel, prompt: str) -> None:
        done = await tiny.agenerate(prompt, max_tokens=20)
        assert done.token_ids == tiny.generate(prompt, max_tokens=20).token_ids

    async def test_the_loop_ticks_while_the_engine_is_held(self, tiny: PolarModel, prompt: str) -> None:
        gate = Gate(2)
        task = asyncio.ensure_future(tiny.agenerate(prompt, max_tokens=10, logits_hook=gate))
        await reached(gate)
        ticked = await ticks(100)  # the engine stands in mid-answer all this time
        assert not task.done()
        gate.opened.set()
        assert (await task).finish_reason == "length"
        assert ticked == 100

    async def test_cancelling_the_task_stops_compute(self, tiny: PolarModel, records: ListSink, prompt: str) -> None:
        gate = Gate(5)
        task = asyncio.ensure_future(tiny.agenerate(prompt, max_tokens=LONG, logits_hook=gate))
        await reached(gate)
        task.cancel()
        await ticks()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        (record,) = records.records  # stored by the time the cancellation arrives
        assert record.outcome is Outcome.CANCELLED
        assert 5 <= record.tokens.output <= 6  # at most the token that was under way
        assert record.visits.decode[0] == record.tokens.output - 1

    async def test_the_requests_own_timeout_surfaces(self, tiny: PolarModel, records: ListSink) -> None:
        with pytest.raises(RequestTimeoutError) as caught:
            await tiny.agenerate("hello", timeout=1e-9)
        assert caught.value.usage == records.records[0]
        with pytest.raises(RequestTimeoutError):
            await tiny.agenerate_batch(["hello", "hey"], timeout=1e-9)
        with pytest.raises(RequestTimeoutError):
            await anext(tiny.astream("hello", timeout=1e-9))
        assert [record.outcome for record in records.records] == ["cancelled"] * 4

    async def test_each_reaches_its_row(self, tiny: PolarModel, records: ListSink) -> None:
        done = await tiny.agenerate_batch(["a", "b"], each=[{"tenant": "one"}, {"tenant": "two"}], max_tokens=1)
        assert [answer.usage.tenant for answer in done] == ["one", "two"]


class TestStream:
    async def test_chunks_join_to_the_answer(self, tiny: PolarModel, prompt: str) -> None:
        chunks = [chunk async for chunk in tiny.astream(prompt, max_tokens=20)]
        whole = tiny.generate(prompt, max_tokens=20)
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [chunk.generation is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]

    async def test_leaving_early_stops_compute(self, tiny: PolarModel, records: ListSink, prompt: str) -> None:
        gate = Gate(4)
        chunks = tiny.astream(prompt, max_tokens=LONG, logits_hook=gate)
        for _ in range(3):
            assert (await anext(chunks)).generation is None
        await reached(gate)
        closing = asyncio.ensure_future(chunks.aclose())  # type: ignore[attr-defined]
        await ticks()
        gate.opened.set()
        await closing
        (record,) = records.records
        assert record.outcome is Outcome.CANCELLED, (record.error, record.tokens)
        assert 4 <= record.tokens.output <= 5

    async def test_a_slow_consumer_holds_the_engine_back(
        self, tiny: PolarModel, records: ListSink, prompt: str
    ) -> None:
        chunks = tiny.astream(prompt, max_tokens=LONG)
        for _ in range(5):
            await anext(chunks)
            await asyncio.sleep(0.02)  # time enough to run away, if it could
        await chunks.aclose()  # type: ignore[attr-defined]
        (record,) = records.records
        assert record.outcome is Outcome.CANCELLED
        # What the event loop's thread, the stream and the engine may each have taken ahead.
        assert record.tokens.output <= 5 + 2 * AHEAD + 2

    async def test_many_streams_read_in_turn(self, tiny: PolarModel, records: ListSink, prompt: str) -> None:
        """More than the loop has threads, each paused while the others are read."""
        streams = [tiny.astream(prompt, max_tokens=6) for _ in range(40)]
        texts = [""] * len(streams)
        for _ in range(6):
            for index, stream in enumerate(streams):
                texts[index] += (await anext(stream)).text
        assert set(texts) == {tiny.generate(prompt, max_tokens=6).text}
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        assert {record.outcome for record in records.records} == {Outcome.COMPLETED}

    async def test_the_loop_ticks_between_chunks(self, tiny: PolarModel, prompt: str) -> None:
        gate = Gate(3)
        chunks = tiny.astream(prompt, max_tokens=8, logits_hook=gate)
        waiting = asyncio.ensure_future(anext(chunks))
        await reached(gate)
        assert await ticks(100) == 100
        await waiting
        gate.opened.set()
        assert [chunk async for chunk in chunks][-1].generation is not None


class TestErrors:
    async def test_of_a_request(self, tiny: PolarModel, records: ListSink) -> None:
        with pytest.raises(EmptyPromptError):
            await tiny.agenerate("")
        with pytest.raises(EmptyPromptError):
            await anext(tiny.astream(" "))
        assert records.records == []

    async def test_of_the_engine(self, records: ListSink) -> None:
        model = broken(records)
        with pytest.raises(RuntimeError, match="the weights are gone"):
            await model.agenerate("hello")
        with pytest.raises(RuntimeError, match="the weights are gone"):
            await anext(model.astream("hello"))
        assert [(record.outcome, record.error) for record in records.records] == [("error", "RuntimeError")] * 2

    async def test_of_a_sink_at_the_end(self, prompt: str) -> None:
        class Full(ListSink):
            def emit(self, record: UsageRecord) -> None:
                raise SinkError("the disk is full.")

        model = tiny_model(sink=Full())
        with pytest.raises(SinkError):
            await model.agenerate(prompt, max_tokens=2)
        with pytest.raises(SinkError):
            await read(model.astream(prompt, max_tokens=2))


async def read(stream: AsyncIterator[object]) -> None:
    """To its end."""
    async for _ in stream:
        pass


class TestContext:
    """Context variables of the caller are seen where the engine runs, so that tracing works."""

    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")

    async def test_a_sink_sees_them(self, prompt: str) -> None:
        seen: list[str] = []

        class Watching(ListSink):
            def emit(self, record: UsageRecord) -> None:
                seen.append(TestContext.who.get())

        self.who.set("caller")
        model = tiny_model(sink=Watching())
        await model.agenerate(prompt, max_tokens=2)
        await read(model.astream(prompt, max_tokens=2))
        assert seen == ["caller", "caller"]


def broken(records: ListSink) -> PolarModel:
    """A model whose fourth layer fails when it runs."""
    model = tiny_model(sink=records)
    finish = model.loaded.decoder.finish

    def failing(index: int, *args: object) -> object:
        if index == 4:
            raise RuntimeError("the weights are gone")
        return finish(index, *args)  # type: ignore[arg-type]

    model.loaded.decoder.finish = failing  # type: ignore[method-assign,assignment]
    return model


class SlowSink(ListSink):
    """Takes its time to store a record."""

    def emit(self, record: UsageRecord) -> None:
        time.sleep(0.3)
        super().emit(record)


class TestCancelledOften:
    """However often a task is cancelled, its call returns when the work has stopped and the record is stored."""

    @staticmethod
    def call(model: PolarModel, way: str, prompt: str, hook: Hook) -> Coroutine[object, object, object]:
        if way == "generate":
            return model.agenerate(prompt, max_tokens=LONG, logits_hook=hook)
        if way == "batch":
            return model.agenerate_batch([prompt, "b"], max_tokens=LONG, logits_hook=hook)
        return read(model.astream(prompt, max_tokens=LONG, logits_hook=hook))

    @pytest.mark.parametrize("way", ["generate", "stream", "batch"])
    async def test_a_task_cancelled_twice(self, prompt: str, way: str) -> None:
        sink, gate = SlowSink(), Gate(2)
        task = asyncio.ensure_future(self.call(tiny_model(sink=sink), way, prompt, gate))
        await reached(gate)
        gate.opened.set()
        task.cancel("first")
        await asyncio.sleep(0.02)
        task.cancel("second")
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert {record.outcome for record in sink.records} == {Outcome.CANCELLED}
        assert len(sink.records) == (2 if way == "batch" else 1)
        assert caught.value.args == ("first",)


def slowly(tokens: Sequence[int], logits: Tensor) -> Tensor:
    """A logits hook that makes an answer long."""
    time.sleep(0.01)
    return logits


def interrupt(frame: FrameType, event: str, arg: object) -> None:
    """A trace or profile function: a signal comes as a function of the module is entered. Each raises once."""
    if event == "call" and frame.f_code.co_filename == threads.__file__:
        raise KeyboardInterrupt


@pytest.mark.parametrize("signals", [False, True])
def test_a_stream_whose_loop_is_gone_ends_and_is_recorded(
    signals: bool, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its loop, nothing closes the asynchronous generator, and its thread would wait for a reader for ever."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's would keep the frames of the stream
    sink = ListSink()
    model = tiny_model(sink=sink)
    waits = threading.Event()

    def counting(tokens: Sequence[int], logits: Tensor) -> Tensor:
        if len(tokens) == 2 * AHEAD + 1:  # as many as are computed before the reader takes its second
            waits.set()
        return logits

    loop = asyncio.new_event_loop()
    chunks = model.astream(prompt, max_tokens=LONG, logits_hook=counting)
    loop.run_until_complete(anext(chunks))
    assert waits.wait(20)
    (producer,) = [thread for thread in threading.enumerate() if thread.name == "polar-stream"]
    loop.close()
    traced, profiled = sys.gettrace(), sys.getprofile()
    if signals:
        sys.settrace(interrupt)
        sys.setprofile(interrupt)
    del chunks
    gc.collect()
    sys.setprofile(profiled)
    sys.settrace(traced)
    producer.join(20)
    assert not producer.is_alive()
    assert len(sink.records) == 1


def test_work_apart_is_told_of_an_interruption_and_waited_for() -> None:
    """A process that ended meanwhile would be torn down under torch."""
    begun, ended = threading.Event(), threading.Event()

    def work(stop: Cancel) -> None:
        begun.set()
        while not stop.is_set():
            time.sleep(0.001)
        ended.set()

    def interrupt() -> None:
        assert begun.wait(20)
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does: the main thread gets it

    interrupter = threading.Thread(target=interrupt, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            run_apart(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.is_set()
    assert "polar-load" not in {thread.name for thread in threading.enumerate()}


def test_work_apart_hands_its_result_or_its_error_over() -> None:
    assert run_apart(lambda _: threading.current_thread().name) == "polar-load"
    with pytest.raises(ZeroDivisionError):
        run_apart(lambda _: 1 // 0)
