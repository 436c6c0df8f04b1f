"""`ChatPolar`: messages in, a message out, as LangChain's `BaseChatModel`.

Tokens are in `message.usage_metadata`; model, finish reason, cost and compute in `message.response_metadata`. On
streams only the last chunk has both, because LangChain adds chunks up.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import UUID

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables.config import ensure_config

from langchain_polar._base import PolarBase
from langchain_polar._calls import Caller
from langchain_polar._messages import response_metadata, to_roles, usage_metadata
from langchain_polar.errors import langchain_errors
from polar_sdk.frameworks import CALLER_OPTIONS
from polar_sdk.usage import new_request_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.callbacks.manager import BaseRunManager
    from langchain_core.language_models import ModelProfile
    from langchain_core.language_models.base import LanguageModelInput
    from langchain_core.messages import BaseMessage
    from langchain_core.runnables import RunnableConfig

    import polar_sdk
    from langchain_polar._calls import Call


class ChatPolar(PolarBase, BaseChatModel):
    """A local chat model that runs a program of layers per prompt and is metered.

    Example:
        >>> from langchain_polar import ChatPolar
        >>> message = ChatPolar(compute="economy").invoke("What is the capital of France?")  # doctest: +SKIP
        >>> message.response_metadata["polar"]["flops"], message.response_metadata["cost"]  # doctest: +SKIP

    Text only: it calls no tools and sees no images. `batch` runs its inputs in threads, as LangChain does; use
    `PolarLLM` for rows that decode together. An answer from LangChain's cache is recorded as `outcome=cached` with 0
    FLOPs, and its message says so; its `usage_metadata` keeps the tokens of the original, as LangChain does.
    """

    @property
    def _llm_type(self) -> str:
        return "polar-chat"

    def _resolve_model_profile(self) -> ModelProfile:
        """What agents check before they call; the window is filled in once the model is loaded."""
        profile: ModelProfile = {
            "open_weights": True,
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "pdf_inputs": False,
            "tool_calling": False,
            "structured_output": False,
            "reasoning_output": False,
            "temperature": True,
        }
        if self.engine is not None:
            profile["max_input_tokens"] = self.engine.context_window
        return profile

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Input tokens that these messages would be billed for, chat template included."""
        if tools:
            raise NotImplementedError("tools= cannot be counted: this model only writes text.")
        with langchain_errors():
            return self._engine().count_tokens(to_roles(messages))

    # --- The public entry points of LangChain: it tells `_generate` about the run, but not `_stream`. ---

    def stream(  # noqa: D102  (documented by LangChain)
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        config = _with_run_id(config)
        return super().stream(input, config, stop=stop, **self._with_caller(config, kwargs))

    def astream(  # noqa: D102
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        config = _with_run_id(config)
        return super().astream(input, config, stop=stop, **self._with_caller(config, kwargs))

    def _with_caller(self, config: RunnableConfig, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a stream, including what its config says about the caller."""
        about = {**(self.metadata or {}), **(config.get("metadata") or {})}
        caller = Caller.of(about, [*(config.get("tags") or []), *(self.tags or [])], config.get("run_id"))
        named = caller.with_call(options)
        return {**options, "tenant": named.tenant, "usage_tags": named.tags, "request_id": named.request_id}

    # --- LangChain's cache. ---

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache key: who asks is not part of it."""
        bound = self._with_options(kwargs)
        relevant = {name: value for name, value in kwargs.items() if name not in CALLER_OPTIONS}
        return BaseChatModel._get_llm_string(bound, stop=stop, **relevant)

    def _replay_v2_events_for_cache_hit(
        self,
        generations: list[ChatGeneration],
        *,
        run_manager: CallbackManagerForLLMRun | None,
        **kwargs: Any,
    ) -> None:
        """LangChain calls this on every cache hit, with the list that it is about to return."""
        generations[:] = self._settle_hit(generations, run_manager, kwargs)
        super()._replay_v2_events_for_cache_hit(generations, run_manager=run_manager, **kwargs)

    async def _areplay_v2_events_for_cache_hit(
        self,
        generations: list[ChatGeneration],
        *,
        run_manager: AsyncCallbackManagerForLLMRun | None,
        **kwargs: Any,
    ) -> None:
        generations[:] = await asyncio.to_thread(self._settle_hit, generations, run_manager, kwargs)
        await super()._areplay_v2_events_for_cache_hit(generations, run_manager=run_manager, **kwargs)

    def _settle_hit(
        self,
        generations: Sequence[ChatGeneration],
        run_manager: BaseRunManager | None,
        options: Mapping[str, Any],
    ) -> list[ChatGeneration]:
        message = generations[0].message
        caller = self._caller(Caller.of_run(run_manager), options)
        settled = self._settle_cached(message.response_metadata, caller)
        copy = message.model_copy(update={"response_metadata": settled})
        return [
            ChatGeneration(message=copy, generation_info=generations[0].generation_info),
            *generations[1:],
        ]

    # --- What LangChain calls. ---

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call, roles = self._ready(messages, kwargs, stop, run_manager)
        return _result(call.answer(roles))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call, roles = await asyncio.to_thread(self._ready, messages, kwargs, stop, run_manager)
        return _result(await call.aanswer(roles))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call, roles = self._ready(messages, kwargs, stop, run_manager)
        for chunk in call.stream(roles):
            yield _piece(chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call, roles = await asyncio.to_thread(self._ready, messages, kwargs, stop, run_manager)
        async for chunk in call.astream(roles):
            yield _piece(chunk)

    def _ready(
        self,
        messages: Sequence[BaseMessage],
        options: Mapping[str, Any],
        stop: Sequence[str] | None,
        run_manager: BaseRunManager | None,
    ) -> tuple[Call, list[dict[str, str]]]:
        with langchain_errors():
            roles = to_roles(messages)
        call = self._call(options, stop, Caller.of_run(run_manager))
        if self.profile is not None and options.get("model") is None:
            self.profile.setdefault("max_input_tokens", call.engine.context_window)
        return call, roles


def _with_run_id(config: RunnableConfig | None) -> RunnableConfig:
    """A config whose run id is known before LangChain would create one, so that record and trace share it."""
    config = ensure_config(config)
    config.setdefault("run_id", UUID(new_request_id()))
    return config


def _result(generation: polar_sdk.Generation) -> ChatResult:
    message = AIMessage(
        content=generation.text,
        usage_metadata=usage_metadata(generation.usage),
        response_metadata=response_metadata(generation),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _piece(chunk: polar_sdk.Chunk) -> ChatGenerationChunk:
    if chunk.generation is None:
        return ChatGenerationChunk(message=AIMessageChunk(content=chunk.text))
    message = AIMessageChunk(
        content=chunk.text,
        usage_metadata=usage_metadata(chunk.generation.usage),
        response_metadata=response_metadata(chunk.generation),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)
