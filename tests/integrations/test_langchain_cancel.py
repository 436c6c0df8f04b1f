"""Streams that are left, tasks that are cancelled, and an event loop that goes on meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler

from langchain_polar import ChatPolar, PolarLLM

if TYPE_CHECKING:
    from polar_sdk import PolarModel

BOTH = pytest.mark.parametrize("kind", [PolarLLM, ChatPolar])


class _KeepsErrors(BaseCallbackHandler):
    """As debug handlers do: the traceback keeps the frames of the stream, and what they hold, alive."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.errors.append(error)


@BOTH
def test_a_stream_that_is_left_stops_and_is_recorded(kind: Any, engine: PolarModel, contract: Any) -> None:
    model = kind(engine=engine, max_tokens=200, callbacks=[_KeepsErrors()])
    contract.check_left_stream(model.stream("Hello"), pieces=2, max_computed=8)  # text may be held back


@BOTH
def test_a_stream_collected_in_the_engines_thread_hangs_nobody(kind: Any, engine: PolarModel, contract: Any) -> None:
    contract.check_collected_stream(engine, lambda: kind(engine=engine, max_tokens=200).stream("Hello"))


@BOTH
async def test_an_async_stream_that_is_left_stops_and_is_recorded(kind: Any, engine: PolarModel, contract: Any) -> None:
    model = kind(engine=engine, max_tokens=400, callbacks=[_KeepsErrors()])
    await contract.check_left_async_stream(model.astream("Hello"), max_tokens=400)


@BOTH
@pytest.mark.parametrize("way", ["ainvoke", "abatch"])
async def test_a_cancelled_task_stops_compute_and_is_recorded(
    kind: Any, engine: PolarModel, contract: Any, way: str
) -> None:
    model = kind(engine=engine, max_tokens=450)
    if way == "ainvoke":
        await contract.check_cancelled_task(model.ainvoke("Hello"), max_tokens=450)
    else:
        checks = 2 if kind is ChatPolar else 1  # it asks for each input alone
        call = model.abatch(["Hello", "Hey"])
        await contract.check_cancelled_task(call, max_tokens=450, requests=2, checks=checks)


@BOTH
async def test_the_event_loop_runs_while_the_model_answers(kind: Any, engine: PolarModel, contract: Any) -> None:
    await contract.check_loop_runs(kind(engine=engine, max_tokens=60).ainvoke("Hello"))
    await contract.check_loop_runs(kind(engine=engine, max_tokens=60).abatch(["Hello", "Hey"]))
