"""One call of the engine: run it, stream it, off or on an event loop, with LangChain's errors.

Knows prompts and engine options, no LangChain messages and no callbacks. Metering is not here: the engine
records every request in its own `finally`, also where a stream is closed or a task is cancelled.
"""

from __future__ import annotations

from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from langchain_polar.errors import langchain_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence

    from langchain_polar._caller import Caller
    from polar_sdk import Chunk, Generation, PolarModel
    from polar_sdk.request.options import Prompt


@dataclass(frozen=True)
class Call:
    """An engine, and the options of one call."""

    engine: PolarModel
    options: Mapping[str, Any]
    """Engine options that say how to answer."""
    caller: Caller

    def one(self, prompt: Prompt) -> Generation:
        """Answer one prompt."""
        with langchain_errors():
            return self.engine.generate(prompt, **self._single())

    async def aone(self, prompt: Prompt) -> Generation:
        """As `one`, without blocking the event loop."""
        with langchain_errors():
            return await self.engine.agenerate(prompt, **self._single())

    def stream(self, prompt: Prompt) -> Iterator[Chunk]:
        """Chunks as they come; closing this iterator closes the engine's, which ends the request."""
        with langchain_errors(), closing(self.engine.stream(prompt, **self._single())) as chunks:
            for chunk in chunks:
                if chunk.text or chunk.generation is not None:
                    yield chunk

    async def astream(self, prompt: Prompt) -> AsyncIterator[Chunk]:
        """As `stream`, without blocking the event loop."""
        with langchain_errors():
            chunks = self.engine.astream(prompt, **self._single())
            async with aclosing(cast("AsyncGenerator[Chunk]", chunks)):
                async for chunk in chunks:
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    def rows(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """Answer several prompts, which decode together, each for its own caller."""
        with langchain_errors():
            return self.engine.generate_batch(prompts, each=[one.as_options() for one in callers], **self.options)

    async def arows(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """As `rows`, off the event loop; a cancelled task stops every row within one token."""
        with langchain_errors():
            each = [one.as_options() for one in callers]
            return await self.engine.agenerate_batch(prompts, each=each, **self.options)

    def _single(self) -> dict[str, Any]:
        return {**self.options, **self.caller.as_options()}
