"""Streams that are left, tasks that are cancelled, and an event loop that goes on meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, cast

import pytest
from langchain_core.callbacks import BaseCallbackHandler

from langchain_polar import ChatPolar, PolarLLM
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from polar_sdk import ListSink, PolarModel

BOTH = pytest.mark.parametrize("kind", [PolarLLM, ChatPolar])


class _KeepsErrors(BaseCallbackHandler):
    """As debug handlers do: the traceback keeps the frames of the stream, and what they hold, alive."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.errors.append(error)


@BOTH
def test_a_broken_off_stream_stops_and_is_recorded(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine, max_tokens=200, callbacks=[_KeepsErrors()])
    stream = cast("Generator[Any]", model.stream("Hello"))
    with closing(stream):
        next(stream)
        next(stream)
        assert sink.records == []
    (record,) = sink.records
    assert record.outcome is Outcome.CANCELLED
    assert 2 <= record.tokens.output <= 8  # two are computed ahead, and text may be held back
    assert record.flops.total > 0


@BOTH
async def test_a_broken_off_async_stream_stops_and_is_recorded(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine, max_tokens=400, callbacks=[_KeepsErrors()])
    stream = cast("AsyncGenerator[Any]", model.astream("Hello"))
    async with aclosing(stream):
        await anext(stream)
    await _until(lambda: bool(sink.records))
    assert sink.records[0].outcome is Outcome.CANCELLED
    assert sink.records[0].tokens.output < 400


@BOTH
@pytest.mark.parametrize("way", ["ainvoke", "abatch"])
async def test_a_cancelled_task_stops_compute_and_is_recorded(
    kind: Any, engine: PolarModel, sink: Any, way: str
) -> None:
    model = kind(engine=engine, max_tokens=450)
    call = model.ainvoke("Hello") if way == "ainvoke" else model.abatch(["Hello", "Hey"])
    task = asyncio.ensure_future(call)
    await _until(lambda: sink.asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _until(lambda: len(sink.records) == (1 if way == "ainvoke" else 2))
    assert {record.outcome for record in sink.records} == {Outcome.CANCELLED}
    assert all(record.tokens.output < 450 for record in sink.records)


async def _until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nothing was recorded within 5 s")


@BOTH
async def test_the_event_loop_ticks_while_the_model_answers(kind: Any, engine: PolarModel) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticker = asyncio.ensure_future(tick())
    for call in (kind(engine=engine, max_tokens=60).ainvoke, kind(engine=engine, max_tokens=60).abatch):
        ticks = 0
        await call("Hello" if "invoke" in call.__name__ else ["Hello", "Hey"])
        assert ticks >= 5, f"the loop stood still during {call.__name__}"
    ticker.cancel()
