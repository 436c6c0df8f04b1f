"""One call of the engine for a LangChain run: who it is for, and how it is answered, whole or streamed, sync or async.

LangChain says who asks as `config={"metadata": …, "tags": …, "run_id": …}`; here that becomes tenant, tags and request
id. Knows no messages and no callbacks. Nothing is metered here: the engine records every request in its own `finally`,
also where a stream is closed or a task is cancelled.
"""

from __future__ import annotations

from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from langchain_core.runnables.config import ensure_config

from langchain_polar.errors import langchain_errors
from polar_sdk.frameworks.tracing import CallSpan
from polar_sdk.usage import flaw_of_name, flaw_of_text

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
    from uuid import UUID

    from langchain_core.callbacks.manager import BaseRunManager
    from langchain_core.runnables import RunnableConfig

    from polar_sdk import Chunk, Generation, PolarModel
    from polar_sdk.request.options import Prompt, RequestOptions


_FRAMEWORK_KEYS: Final = ("ls_", "lc_", "langgraph_", "checkpoint_", "__")
"""Prefixes of metadata that frameworks add themselves: run bookkeeping, of no use on a bill."""
_FRAMEWORK_TAGS: Final = ("seq:step:", "map:key:", "branch:", "condition:", "graph:step:", "retry:attempt:")
_SCALAR: Final = (str, int, float, bool)
MAX_LABEL_LENGTH: Final = 200
"""Longer metadata values are payload, not labels. Unit: characters."""


@dataclass(frozen=True)
class Caller:
    """Who one request is for; where a field is None or empty, the model object decides."""

    tenant: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    request_id: str | None = None

    @classmethod
    def of_run(cls, manager: BaseRunManager | None) -> Caller:
        """Read LangChain's run manager; its run id becomes the request id, so traces and ledger meet."""
        return cls() if manager is None else cls.of(manager.metadata, manager.tags, manager.run_id)

    @classmethod
    def of(
        cls, metadata: Mapping[str, Any] | None, tags: Sequence[str] | None, run_id: UUID | str | None = None
    ) -> Caller:
        """Read the parts of a LangChain config.

        The metadata key `tenant` is the tenant; other short scalar values without control characters become tags under
        their own key; LangChain's tags become one tag, `langchain_tags`, joined by commas.
        """
        named = (metadata or {}).get("tenant")
        tenant = str(named) if isinstance(named, _SCALAR) and named != "" else None  # the engine checks it
        labels = {key: str(value) for key, value in (metadata or {}).items() if _is_label(key, value)}
        labels.pop("tenant", None)
        if names := [tag for tag in tags or () if not tag.startswith(_FRAMEWORK_TAGS) and flaw_of_text(tag) is None]:
            labels["langchain_tags"] = ",".join(dict.fromkeys(names))
        return cls(tenant, labels, None if run_id is None else str(run_id))

    def over(self, tenant: str, tags: Mapping[str, str]) -> Caller:
        """This caller, with tenant and tags of the engine where it names none."""
        return Caller(self.tenant or tenant, {**tags, **self.tags}, self.request_id)

    def as_options(self) -> RequestOptions:
        """Who asks, as the engine takes it."""
        return {"tenant": self.tenant, "tags": self.tags, "request_id": self.request_id}

    def with_call(self, options: Mapping[str, Any]) -> Caller:
        """This caller, overridden by what the call itself names."""
        return Caller(
            options.get("tenant") or self.tenant,
            {**self.tags, **(options.get("usage_tags") or {})},
            options.get("request_id") or self.request_id,
        )


def _is_label(key: str, value: object) -> bool:
    if key.startswith(_FRAMEWORK_KEYS) or flaw_of_name(key) is not None or not isinstance(value, _SCALAR):
        return False
    text = str(value)
    return len(text.strip()) > 0 and len(text) <= MAX_LABEL_LENGTH and flaw_of_text(text) is None


def with_thread(config: RunnableConfig | None) -> RunnableConfig:
    """A config with its thread id among its metadata, which is all that LangChain tells a model of a config."""
    config = ensure_config(config)
    thread = (config.get("configurable") or {}).get("thread_id")
    about = config.get("metadata") or {}
    if thread is not None and "thread_id" not in about:
        config["metadata"] = {**about, "thread_id": str(thread)}
    return config


@dataclass(frozen=True)
class Call:
    """An engine, and the options of one call."""

    engine: PolarModel
    options: Mapping[str, Any]
    """Engine options that determine the answer."""
    caller: Caller
    tracing: bool = False
    """Whether OpenTelemetry's current span is told of the answers."""

    def answer(self, prompt: Prompt) -> Generation:
        """Answer one prompt."""
        with langchain_errors():
            span = CallSpan(self.tracing)
            return _noted(span, self.engine.generate(prompt, **self._options()))

    async def aanswer(self, prompt: Prompt) -> Generation:
        """As `answer`, without blocking the event loop."""
        with langchain_errors():
            span = CallSpan(self.tracing)
            return _noted(span, await self.engine.agenerate(prompt, **self._options()))

    def stream(self, prompt: Prompt) -> Iterator[Chunk]:
        """Chunks as they come; closing this iterator closes the engine's, which ends the request."""
        with langchain_errors():
            span = CallSpan(self.tracing)
            with closing(self.engine.stream(prompt, **self._options())) as chunks:
                for chunk in chunks:
                    if chunk.generation is not None:
                        _noted(span, chunk.generation)
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    async def astream(self, prompt: Prompt) -> AsyncIterator[Chunk]:
        """As `stream`, without blocking the event loop."""
        with langchain_errors():
            span = CallSpan(self.tracing)
            chunks = self.engine.astream(prompt, **self._options())
            async with aclosing(cast("AsyncGenerator[Chunk]", chunks)):
                async for chunk in chunks:
                    if chunk.generation is not None:
                        _noted(span, chunk.generation)
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    def answer_batch(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """Answer several prompts, which decode together, each for its own caller."""
        with langchain_errors():
            span, each = CallSpan(self.tracing), [caller.as_options() for caller in callers]
            return [_noted(span, one) for one in self.engine.generate_batch(prompts, each=each, **self.options)]

    async def aanswer_batch(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """As `answer_batch`, without blocking the event loop; a cancelled task stops every row within one pass."""
        with langchain_errors():
            span, each = CallSpan(self.tracing), [caller.as_options() for caller in callers]
            return [_noted(span, one) for one in await self.engine.agenerate_batch(prompts, each=each, **self.options)]

    def _options(self) -> dict[str, Any]:
        return {**self.options, **self.caller.as_options()}


def _noted(span: CallSpan, generation: Generation) -> Generation:
    span.note(generation.usage, generation.receipt)
    return generation
