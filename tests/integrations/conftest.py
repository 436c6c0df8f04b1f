"""A tiny real engine for the integration tests, a sink that shows what it got, and what both frameworks promise."""

from __future__ import annotations

import asyncio
import gc
import threading
from contextlib import aclosing, closing
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk import ListSink, UsageRecord
from polar_sdk.request import recorder
from polar_sdk.testing import tiny_model
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

    from polar_sdk import PolarModel


class _WatchedSink(ListSink):
    """Shows when the engine has accepted a request: it calls `check` right before it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.checks = 0

    def check(self) -> None:
        self.checks += 1


@pytest.fixture
def sink() -> ListSink:
    return _WatchedSink()


@pytest.fixture
def engine(sink: ListSink) -> PolarModel:
    return tiny_model(sink=sink)


class PricedSink(ListSink):
    """Prices a request at a tenth of a cent per output token, as a meter would: with a receipt."""

    def __init__(self, currency: str = "EUR") -> None:
        super().__init__()
        self._currency = currency

    def emit(self, record: UsageRecord) -> Any:
        super().emit(record)
        return {"cost": str(Decimal("0.001") * record.tokens.output), "currency": self._currency, "price_book": "t1"}


@pytest.fixture
def priced_sink() -> ListSink:
    return PricedSink()


@pytest.fixture
def priced(priced_sink: ListSink) -> PolarModel:
    return tiny_model(sink=priced_sink)


class FrameworkContract:
    """The contract of every framework on answers that are left, and on the event loop while one is computed."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def check_left_stream(self, stream: Generator[Any], pieces: int, max_computed: int) -> None:
        """A stream that is closed after some pieces stops and is recorded; two tokens are computed ahead."""
        with closing(stream):
            for _ in range(pieces):
                next(stream)
            assert self._sink.records == []
        (record,) = self._sink.records
        assert record.outcome is Outcome.CANCELLED
        assert pieces <= record.tokens.output <= max_computed
        assert record.flops.total > 0

    def check_collected_stream(self, engine: PolarModel, start: Callable[[], Generator[Any]]) -> None:
        """A stream in a cycle, collected in the engine's thread: generators of the framework close ours there."""

        def collect(tokens: Any, logits: Any) -> Any:
            gc.collect()
            return logits

        leave_in_a_cycle(start, lambda: engine.generate("other", max_tokens=2, logits_hook=collect))
        assert sorted(record.outcome for record in self._sink.records) == ["cancelled", "completed"]

    async def check_left_async_stream(self, stream: AsyncGenerator[Any], max_tokens: int) -> None:
        """The same for an async stream, which ends a little later."""
        async with aclosing(stream):
            await anext(stream)
        await self._until(lambda: bool(self._sink.records))
        self._check_cancelled(max_tokens)

    async def check_cancelled_task(
        self, call: Awaitable[Any], max_tokens: int, requests: int = 1, checks: int = 1
    ) -> None:
        """A cancelled task stops compute, and every request that it had made is recorded."""
        task = asyncio.ensure_future(call)
        await self._until(lambda: self._sink.checks >= checks)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await self._until(lambda: len(self._sink.records) == requests)
        self._check_cancelled(max_tokens)

    async def check_loop_runs(self, call: Awaitable[Any]) -> None:
        """The event loop goes on while an answer is computed."""
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.ensure_future(tick())
        await call
        ticker.cancel()
        assert ticks >= 5, "the event loop stood still"

    def _check_cancelled(self, max_tokens: int) -> None:
        for record in self._sink.records:
            assert record.outcome is Outcome.CANCELLED
            assert record.tokens.output < max_tokens

    @staticmethod
    async def _until(condition: Callable[[], Any]) -> None:
        for _ in range(3000):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("nothing was recorded within 30 s")


@pytest.fixture
def contract(sink: ListSink) -> FrameworkContract:
    return FrameworkContract(sink)


def leave_in_a_cycle(start: Callable[[], Generator[Any]], ask: Callable[[], object]) -> None:
    """Leave a stream in a cycle, which is collected while something else is asked; neither waits for the other."""
    gc.disable()
    try:
        cycle: list[Any] = [start()]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(20)
    finally:
        gc.enable()
    assert not asking.is_alive(), "one thread waits for itself"
    assert recorder.flush()


def paths_of(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    within = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(path for key, part in within for path in paths_of(part, (*before, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another one at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy
