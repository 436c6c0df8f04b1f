"""Task groups of anyio, which Starlette and FastAPI cancel when a client leaves, at random moments.

An anyio scope cancels its tasks again at every await, until they have ended. When control returns, exactly one record
is stored, with what was computed, and nothing computes any more: at most the token that was on its way.
"""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from llama_index.core.llms import ChatMessage

import llama_index_polar
from langchain_polar import ChatPolar, PolarLLM
from polar_sdk import ListSink
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk import PolarModel

PROGRAM = "0 2-5"
MOST = 40
PATIENCE = 60.0
"""Before a try counts as hung. Unit: seconds."""
WAYS = [
    *((kind, way) for kind in (ChatPolar, PolarLLM) for way in ("ainvoke", "astream", "abatch")),
    *((llama_index_polar.PolarLLM, way) for way in ("achat", "acomplete", "astream_chat", "astream_complete")),
]


class _Gate:
    """Holds the engine before each token until it may go on, and counts."""

    def __init__(self) -> None:
        self.tokens = 0
        self._permits = threading.Semaphore(0)
        self._open = False

    def hook(self, _: Any, logits: Any) -> Any:
        """As a logits hook: the layers have run, and the token is chosen when this returns."""
        self.tokens += 1
        if not self._open:
            assert self._permits.acquire(timeout=PATIENCE)
        return logits

    def allow(self, tokens: int) -> None:
        if tokens:
            self._permits.release(tokens)

    def open(self) -> None:
        self._open = True
        self._permits.release(1000)


def _gated(gate: _Gate, sink: ListSink) -> PolarModel:
    """A tiny model whose tokens all pass the gate, whoever asks for them."""
    model = tiny_model(sink=sink)

    def gated(ask: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: ask(*arguments, **{**options, "logits_hook": gate.hook})

    for name in ("generate", "stream", "generate_batch"):
        setattr(model, name, gated(getattr(model, name)))
    return model


async def _ask(model: Any, way: str) -> None:
    llama_index = isinstance(model, llama_index_polar.PolarLLM)
    question: Any = [ChatMessage("Hello")] if way.endswith("chat") else ["Hello"] if way == "abatch" else "Hello"
    answer = getattr(model, way)(question)
    if way.startswith("astream"):
        async for _ in await answer if llama_index else answer:
            pass
    else:
        await answer


async def _try(kind: Any, way: str, chance: random.Random) -> None:
    """Cancel one call, some tokens after it began, or at one of its first steps."""
    gate, sink = _Gate(), ListSink()
    engine = _gated(gate, sink)
    model = kind(engine=engine, max_tokens=MOST, program=PROGRAM)
    tokens, steps = chance.choice([(chance.randrange(8), 0), (0, chance.randrange(1, 30))])
    scopes: list[anyio.CancelScope] = []
    stored: list[int] = []

    async def group() -> None:
        async with anyio.create_task_group() as tasks:
            scopes.append(tasks.cancel_scope)
            tasks.start_soon(_ask, model, way)
        stored.append(len(sink.records))  # control has returned: no await in between

    async def cancel() -> None:
        gate.allow(tokens)
        for _ in range(steps):
            await anyio.sleep(0)
        while not steps and gate.tokens <= tokens:
            await anyio.sleep(0.001)
        scopes[0].cancel()
        for _ in range(10):  # until the task has heard of it; the engine stands at the gate
            await anyio.sleep(0)
        before.append(gate.tokens)
        gate.open()

    before: list[int] = []
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as both:
            both.start_soon(group)
            await anyio.sleep(0)
            await cancel()
    computed = gate.tokens
    assert computed <= before[0] + 1, f"{computed - before[0]} tokens after the cancellation"
    assert len(sink.records) == stored[0] == (1 if computed else stored[0]) <= 1
    for record in sink.records:
        assert record.outcome == "cancelled"
        assert record.tokens.output <= computed <= record.tokens.output + 1
        expected = engine.cost(PROGRAM, prompt=record.tokens.input, output=computed).total if computed else 0
        assert record.flops.total == expected
    await anyio.sleep(0.002)
    assert (gate.tokens, len(sink.records)) == (computed, stored[0]), "something went on after control had returned"
    assert len(engine.scheduler) == 0


@pytest.mark.parametrize("tries", [3, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize(("kind", "way"), WAYS)
async def test_a_cancelled_task_group_leaves_one_exact_record(kind: Any, way: str, tries: int) -> None:
    chance = random.Random(f"{kind.__module__} {way}")
    for _ in range(tries):
        await _try(kind, way, chance)
