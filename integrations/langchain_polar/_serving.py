"""One call of the engine: run it, stream it, off or on an event loop, within its deadline.

Knows prompts and engine options, no LangChain messages and no callbacks. Metering is not here: the engine
records every request in its own `finally`, also where a stream is closed or a task is cancelled.
"""

from __future__ import annotations

import time
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from langchain_polar.errors import PolarTimeoutError, langchain_errors
from polar_sdk.aio import run_in_thread
from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence

    from langchain_polar._caller import Caller
    from polar_sdk import Chunk, Generation, PolarModel
    from polar_sdk.requests import Cancel, Prompt

__all__ = ["Call"]


class _Deadline:
    """A `cancel` that is set once the time is up; the engine looks at it before every pass."""

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and seconds <= 0:
            raise InvalidRequestError(f"timeout={seconds} is out of range; use more than 0 seconds, or None.")
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def is_set(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def check(self, generation: Generation) -> Generation:
        """Return the answer, unless the time was up before it was finished."""
        if generation.finish_reason == "cancelled" and self.is_set():
            tokens = generation.usage.tokens.output
            raise PolarTimeoutError(
                f"the answer was stopped by timeout={self._seconds} s after {tokens} tokens.",
                hint="Raise timeout, lower max_tokens, or use a cheaper tier.",
                usage=generation.usage,
            )
        return generation


@dataclass(frozen=True)
class Call:
    """An engine, and the options of one call."""

    engine: PolarModel
    options: Mapping[str, Any]
    """Engine options that say how to answer."""
    caller: Caller
    timeout: float | None
    """Longest time from the start to the last token. Unit: seconds."""

    def one(self, prompt: Prompt) -> Generation:
        """Answer one prompt."""
        with langchain_errors():
            deadline = _Deadline(self.timeout)
            return deadline.check(self.engine.generate(prompt, **self._single(deadline)))

    async def aone(self, prompt: Prompt) -> Generation:
        """As `one`, without blocking the event loop."""
        with langchain_errors():
            deadline = _Deadline(self.timeout)
            return deadline.check(await self.engine.agenerate(prompt, **self._single(deadline)))

    def stream(self, prompt: Prompt) -> Iterator[Chunk]:
        """Chunks as they come; closing this iterator closes the engine's, which ends the request."""
        with langchain_errors():
            deadline = _Deadline(self.timeout)
            with closing(self.engine.stream(prompt, **self._single(deadline))) as chunks:
                for chunk in chunks:
                    if chunk.generation is not None:
                        deadline.check(chunk.generation)
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    async def astream(self, prompt: Prompt) -> AsyncIterator[Chunk]:
        """As `stream`, without blocking the event loop."""
        with langchain_errors():
            deadline = _Deadline(self.timeout)
            chunks = self.engine.astream(prompt, **self._single(deadline))
            async with aclosing(cast("AsyncGenerator[Chunk]", chunks)):
                async for chunk in chunks:
                    if chunk.generation is not None:
                        deadline.check(chunk.generation)
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    def rows(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """Answer several prompts; those with the same tenant and tags decode together."""
        with langchain_errors():
            deadline = _Deadline(self.timeout)
            return [deadline.check(one) for one in self._rows(prompts, callers, deadline)]

    async def arows(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """As `rows`, off the event loop; a cancelled task stops every row within one token."""
        with langchain_errors():
            deadline = _Deadline(self.timeout)
            rows = await run_in_thread(lambda cancel: self._rows(prompts, callers, cancel), deadline)
            return [deadline.check(one) for one in rows]

    def _single(self, cancel: Cancel) -> dict[str, Any]:
        who = self.caller
        return {
            **self.options,
            "tenant": who.tenant,
            "tags": who.tags,
            "request_id": who.request_id,
            "cancel": cancel,
        }

    def _rows(self, prompts: Sequence[Prompt], callers: Sequence[Caller], cancel: Cancel) -> list[Generation]:
        found: dict[int, Generation] = {}
        for group in _alike(callers):
            first = callers[group[0]]
            ids = [one for index in group if (one := callers[index].request_id) is not None]
            answers = self.engine.generate_batch(
                [prompts[index] for index in group],
                request_ids=ids or None,
                tenant=first.tenant,
                tags=first.tags,
                cancel=cancel,
                **self.options,
            )
            found.update(zip(group, answers, strict=True))
        return [found[index] for index in range(len(prompts))]


def _alike(callers: Sequence[Caller]) -> list[list[int]]:
    """Indices of the callers, grouped by what the engine takes once per batch."""
    groups: dict[object, list[int]] = {}
    for index, caller in enumerate(callers):
        groups.setdefault((caller.tenant, tuple(sorted(caller.tags.items()))), []).append(index)
    return list(groups.values())
