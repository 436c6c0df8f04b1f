"""Rate limiters of both frameworks are asked once per call, before it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.rate_limiters import BaseRateLimiter
from llama_index.core.llms import ChatMessage
from llama_index.core.rate_limiter import BaseRateLimiter as LlamaIndexRateLimiter

import llama_index_polar
from langchain_polar import ChatPolar

if TYPE_CHECKING:
    from polar_sdk import ListSink, PolarModel

HELLO = [ChatMessage("Hello")]


class _Counted(BaseRateLimiter):
    """Counts, and notes how many records there were when it was asked."""

    def __init__(self, sink: ListSink) -> None:
        self._sink = sink
        self.asked: list[int] = []

    def acquire(self, *, blocking: bool = True) -> bool:
        assert blocking
        self.asked.append(len(self._sink.records))
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        return self.acquire(blocking=blocking)


async def test_langchains_is_asked_before_every_call(engine: PolarModel, sink: ListSink) -> None:
    limiter = _Counted(sink)
    chat = ChatPolar(engine=engine, max_tokens=2, rate_limiter=limiter)
    chat.invoke("Hello")
    await chat.ainvoke("Hello")
    list(chat.stream("Hello"))
    _ = [piece async for piece in chat.astream("Hello")]
    assert limiter.asked == [0, 1, 2, 3]
    chat.batch(["a", "b"])
    await chat.abatch(["a", "b"])
    assert len(limiter.asked) == len(sink.records) == 8


def test_an_answer_from_the_cache_asks_no_limiter(engine: PolarModel, sink: ListSink) -> None:
    limiter = _Counted(sink)
    chat = ChatPolar(engine=engine, max_tokens=2, rate_limiter=limiter, cache=InMemoryCache())
    chat.invoke("Hello")
    chat.invoke("Hello")
    assert (len(limiter.asked), len(sink.records)) == (1, 2)


class _LlamaIndexCounted(LlamaIndexRateLimiter):
    def __init__(self) -> None:
        self.asked = 0

    def acquire(self, num_tokens: int = 0) -> None:
        self.asked += 1

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.asked += 1


@pytest.mark.parametrize("way", ["complete", "chat", "stream_complete", "stream_chat"])
async def test_llama_indexs_is_asked_once_per_call(engine: PolarModel, sink: ListSink, way: str) -> None:
    limiter = _LlamaIndexCounted()
    llm = llama_index_polar.PolarLLM(engine=engine, max_tokens=2, rate_limiter=limiter)
    question: Any = HELLO if way.endswith("chat") else "Hello"
    answer = getattr(llm, way)(question)
    later = await getattr(llm, f"a{way}")(question)
    if way.startswith("stream"):
        list(answer)
        _ = [response async for response in later]
    assert limiter.asked == len(sink.records) == 2
