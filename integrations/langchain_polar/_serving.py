"""One call of the engine: run it, stream it, off or on an event loop, within its deadline.

Knows prompts and engine options, no LangChain messages and no callbacks. Metering is not here: the engine records every
request in its own `finally`, also where a stream is closed or a task is cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from langchain_polar.errors import PolarTimeoutError, langchain_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from langchain_polar._caller import Caller
    from polar_sdk import Chunk, Generation, PolarModel

    Prompt = str | Sequence[Mapping[str, str]]

__all__ = ["Call", "Deadline"]


class Deadline:
    """Sets `cancel` after `seconds`; the engine then stops within one token.

    A timer thread and no check between tokens, so that a long prefill is stopped too.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.cancel = threading.Event()
        self._expired = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if self.seconds is not None:
            self._timer = threading.Timer(self.seconds, self._expire)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        self.cancel.set()

    def check(self, generations: Sequence[Generation]) -> None:
        """Raise where the deadline cut an answer short.

        Raises:
            PolarTimeoutError: It carries the usage records of the requests that were stopped.
        """
        cut = [generation.usage for generation in generations if generation.finish_reason == "cancelled"]
        if self._expired and cut:
            tokens = max(record.tokens.output for record in cut)
            raise PolarTimeoutError(
                f"the answer was stopped after timeout={self.seconds} s and {tokens} tokens.",
                hint="Raise timeout, lower max_tokens, or use a cheaper tier.",
                usage=cut,
            )


@dataclass(frozen=True)
class Call:
    """An engine, and the options of one call."""

    engine: PolarModel
    options: Mapping[str, Any]
    """Engine options that say how to answer."""
    caller: Caller
    timeout: float | None
    """Longest time from here to the last token. Unit: seconds."""

    def rows(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """Answer several prompts; rows with the same tenant and tags decode together."""
        with langchain_errors(), Deadline(self.timeout) as deadline:
            return self._rows(prompts, callers, deadline)

    async def arows(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """As `rows`, off the event loop; a cancelled task stops every row within one token."""
        with langchain_errors(), Deadline(self.timeout) as deadline:
            work = asyncio.ensure_future(asyncio.to_thread(self._rows, prompts, callers, deadline))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                deadline.cancel.set()
                await asyncio.wait([work])  # when the task ends, the records are written
                raise

    def _rows(self, prompts: Sequence[Prompt], callers: Sequence[Caller], deadline: Deadline) -> list[Generation]:
        found: dict[int, Generation] = {}
        for group in _alike(callers):
            first = callers[group[0]]
            ids = [callers[index].request_id for index in group]
            answers = self.engine.generate_batch(
                [prompts[index] for index in group],
                **self.options,
                tenant=first.tenant,
                tags=first.tags,
                request_ids=ids if all(ids) else None,
                cancel=deadline.cancel,
            )
            deadline.check(answers)
            found.update(zip(group, answers, strict=True))
        return [found[index] for index in range(len(prompts))]

    def one(self, prompt: Prompt) -> Generation:
        """Answer one prompt."""
        with langchain_errors(), Deadline(self.timeout) as deadline:
            generation = self.engine.generate(prompt, **self._single(deadline))
            deadline.check([generation])
            return generation

    async def aone(self, prompt: Prompt) -> Generation:
        """As `one`, without blocking the event loop."""
        with langchain_errors(), Deadline(self.timeout) as deadline:
            generation = await self.engine.agenerate(prompt, **self._single(deadline))
            deadline.check([generation])
            return generation

    def stream(self, prompt: Prompt) -> Iterator[Chunk]:
        """Chunks as they come; closing this iterator closes the engine's, which ends the request."""
        with langchain_errors(), Deadline(self.timeout) as deadline:
            with closing(self.engine.stream(prompt, **self._single(deadline))) as chunks:
                for chunk in chunks:
                    if chunk.generation is not None:
                        deadline.check([chunk.generation])
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    async def astream(self, prompt: Prompt) -> AsyncIterator[Chunk]:
        """As `stream`, without blocking the event loop."""
        with langchain_errors(), Deadline(self.timeout) as deadline:
            async with aclosing(self.engine.astream(prompt, **self._single(deadline))) as chunks:
                async for chunk in chunks:
                    if chunk.generation is not None:
                        deadline.check([chunk.generation])
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    def _single(self, deadline: Deadline) -> dict[str, Any]:
        who = self.caller
        return {
            **self.options,
            "tenant": who.tenant,
            "tags": who.tags,
            "request_id": who.request_id,
            "cancel": deadline.cancel,
        }


def _alike(callers: Sequence[Caller]) -> list[list[int]]:
    """Indices of the callers, grouped by what the engine takes once per batch."""
    groups: dict[object, list[int]] = {}
    for index, caller in enumerate(callers):
        groups.setdefault((caller.tenant, tuple(sorted(caller.tags.items()))), []).append(index)
    return list(groups.values())
