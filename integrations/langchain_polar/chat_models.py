"""`ChatPolar`: messages in, a message out, as LangChain's `BaseChatModel`.

Tokens are in `message.usage_metadata`; model, finish reason, cost and compute in `message.response_metadata`. On
streams only the last chunk has both, because LangChain adds chunks up.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final
from uuid import UUID

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.outputs import ChatGeneration
from langchain_core.runnables.config import get_config_list

from langchain_polar._base import Caller, PolarBase, with_thread
from langchain_polar._messages import AnswerReader, to_roles
from langchain_polar._structured import Method, openai_tool, structured
from langchain_polar.errors import langchain_errors
from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.forms import FORM_OPTIONS, AnswerForm
from polar_sdk.frameworks.settings import CALLER_OPTIONS
from polar_sdk.usage import new_request_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.callbacks.manager import BaseRunManager
    from langchain_core.language_models import ModelProfile
    from langchain_core.language_models.base import LanguageModelInput
    from langchain_core.messages import AIMessage, BaseMessage
    from langchain_core.outputs import ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable, RunnableConfig
    from langchain_core.tools import BaseTool

    from langchain_polar._base import Call
    from polar_sdk import PolarModel
    from polar_sdk.frameworks.tools import Roles


_MAX_THREADS: Final = 32
"""Maximum number of inputs of `batch` that run at a time, unless its config says otherwise."""


class ChatPolar(PolarBase, BaseChatModel):
    """A local chat model that runs a program of layers per prompt and is metered.

    Example:
        >>> from langchain_polar import ChatPolar
        >>> message = ChatPolar(compute="economy").invoke("What is the capital of France?")  # doctest: +SKIP
        >>> message.response_metadata["polar"]["flops"], message.response_metadata["cost"]  # doctest: +SKIP

    It calls tools and answers by a schema, with the extra `structured`, and sees no images. The inputs of `batch` and
    `abatch` decode together. An answer from LangChain's cache is recorded as `outcome=cached` with 0
    FLOPs, and its message says so; its `usage_metadata` keeps the tokens of the original, as LangChain does.
    """

    dropped: ClassVar[frozenset[str]] = PolarBase.dropped | {*FORM_OPTIONS, "strict"}

    @property
    def _llm_type(self) -> str:
        return "polar-chat"

    def _resolve_model_profile(self) -> ModelProfile:
        """Abilities that agents check before they call; the window is filled in once the model is loaded."""
        profile: ModelProfile = {
            "open_weights": True,
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "pdf_inputs": False,
            "tool_calling": True,
            "tool_choice": True,
            "tool_call_streaming": True,
            "structured_output": True,
            "reasoning_output": False,
            "temperature": True,
        }
        if self.engine is not None:
            profile["max_input_tokens"] = self.engine.context_window
        return profile

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Input tokens that these messages would be billed for, chat template included; as `trim_messages` wants it.

        Where a strict template refuses the messages, as it does the reversed parts of a conversation that
        `trim_messages` asks about, they are counted one by one, which gives some more.
        """
        with langchain_errors():
            form, engine = AnswerForm.of({"tools": [openai_tool(tool) for tool in tools or ()]}), self._engine()
            form = form.written_as(engine.call_format)
            return _count(engine, form.teach(to_roles(messages)), form.shown)

    # --- Tools and schemas. ---

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools.

        Args:
            tools: Functions, LangChain tools, pydantic classes, TypedDicts, or schemas in OpenAI's form.
            tool_choice: `auto` or None = the model decides by the beginning of its answer; `any`, `required` or
                True = it calls one; a tool's name = it calls that one; `none` or False = it calls none.
            parallel_tool_calls: Whether one answer may contain several calls. Off by default: a small model
                repeats its first call.
            strict: Without effect: arguments always match their schema.
            **kwargs: Options of a call, such as `response_format` or `max_tokens`.

        Raises:
            ModelInvalidRequestError: `tool_choice` names no tool.
        """
        form = {"tools": [openai_tool(tool) for tool in tools], "tool_choice": tool_choice}
        if parallel_tool_calls is not None:
            form["parallel_tool_calls"] = parallel_tool_calls
        with langchain_errors():
            AnswerForm.of({**form, **kwargs})
        return self.bind(**form, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answer with an object of a schema; an answer that was cut off is an error, never half an object.

        Args:
            schema: A pydantic class, a TypedDict, a JSON schema, or a tool in OpenAI's form.
            method: `json_schema`: the grammar enforces the schema, and the prompt describes it; `function_calling`: the
                same by a call of a tool; `json_mode`: enforced, but only your prompt describes it.
            include_raw: Return a mapping of `raw`, `parsed` and `parsing_error`.
            strict: Without effect: answers always match the schema.
            **kwargs: Options of a call.
        """
        return structured(self, schema, method=method, include_raw=include_raw, options=kwargs)

    def batch(  # noqa: D102  (documented by LangChain)
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        configs = get_config_list(config, len(inputs))
        if configs and not configs[0].get("max_concurrency"):  # LangChain's own limit depends on the processor
            configs[0]["max_concurrency"] = min(len(inputs), _MAX_THREADS)
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    # --- LangChain tells `_generate` about the run, but not `_stream`, which it calls for `invoke` as well: with
    # --- `streaming=True`, and where somebody looks on (`astream_events`, `stream_mode="messages"` of LangGraph).

    if not TYPE_CHECKING:  # callers see LangChain's own signatures

        def stream(self, input, config=None, **options):  # noqa: D102
            config = _with_run_id(config)
            return super().stream(input, config, **self._with_caller(config, options))

        def astream(self, input, config=None, **options):  # noqa: D102
            config = _with_run_id(config)
            return super().astream(input, config, **self._with_caller(config, options))

        def _generate_with_cache(self, messages, stop=None, run_manager=None, **options):
            named = Caller.of_run(run_manager).named(options)
            return super()._generate_with_cache(messages, stop, run_manager, **named)

        async def _agenerate_with_cache(self, messages, stop=None, run_manager=None, **options):
            named = Caller.of_run(run_manager).named(options)
            return await super()._agenerate_with_cache(messages, stop, run_manager, **named)

    def _with_caller(self, config: RunnableConfig, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a stream, including what its config says about the caller."""
        about = {**(self.metadata or {}), **(config.get("metadata") or {})}
        tags = [*(config.get("tags") or []), *(self.tags or [])]
        return Caller.of(about, tags, config.get("run_id")).named(options)

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
        caller, settled = self._caller(Caller.of_run(run_manager), options), []
        for generation in generations:
            metadata = self._settle_cached(generation.message.response_metadata, caller)
            copy = generation.message.model_copy(update={"response_metadata": metadata})
            settled.append(ChatGeneration(message=copy, generation_info=generation.generation_info))
            caller = replace(caller, request_id=None)
        return settled

    # --- What LangChain calls. ---

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call, roles, reader = self._ready(messages, kwargs, stop, run_manager)
        return reader.result(*(call.answers([roles], [call.caller]) if call.n != 1 else [call.answer(roles)]))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call, roles, reader = await asyncio.to_thread(self._ready, messages, kwargs, stop, run_manager)
        found = await call.aanswers([roles], [call.caller]) if call.n != 1 else [await call.aanswer(roles)]
        return reader.result(*found)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call, roles, reader = self._ready(messages, kwargs, stop, run_manager)
        for chunk in call.stream(roles):
            yield from reader.chunks(chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call, roles, reader = await asyncio.to_thread(self._ready, messages, kwargs, stop, run_manager)
        async for chunk in call.astream(roles):
            for message in reader.chunks(chunk):
                yield message

    def _ready(
        self,
        messages: Sequence[BaseMessage],
        options: Mapping[str, Any],
        stop: Sequence[str] | None,
        run_manager: BaseRunManager | None,
    ) -> tuple[Call, Roles, AnswerReader]:
        with langchain_errors():
            form, said = AnswerForm.of(options), to_roles(messages)
        call = self._call(options, stop, Caller.of_run(run_manager))
        with langchain_errors():
            form = form.written_as(call.engine.call_format)
            roles = form.teach(said)
            call = replace(call, options={**call.options, **form.options()})
        if self.profile is not None and options.get("model") is None:
            self.profile.setdefault("max_input_tokens", call.engine.context_window)
        return call, roles, AnswerReader(form, call.engine.decode)


def _count(engine: PolarModel, roles: Roles, tools: Sequence[Mapping[str, Any]] | None = None) -> int:
    """Input tokens of messages; 0 if there is no text."""
    if not any(role["content"].strip() or role.get("tool_calls") for role in roles):
        return 0
    try:
        return engine.count_tokens(roles, tools)
    except InvalidRequestError:
        if len(roles) == 1 and roles[0]["role"] == "user":
            raise
        return sum(_count(engine, [{"role": "user", "content": role["content"]}]) for role in roles)


def _with_run_id(config: RunnableConfig | None) -> RunnableConfig:
    """A config whose run id is known before LangChain would create one, so that record and trace share it."""
    config = with_thread(config)
    config.setdefault("run_id", UUID(new_request_id()))
    return config


def register() -> bool:
    """Make `init_chat_model("polar:…")` return a `ChatPolar`; what follows the colon is the model.

    Returns:
        False where `langchain` is not installed, or keeps its list of providers elsewhere than in versions known here.
    """
    try:
        from langchain.chat_models import base

        base._BUILTIN_PROVIDERS["polar"] = ("langchain_polar", "ChatPolar", lambda cls, **options: cls(**options))
    except (ImportError, AttributeError, TypeError):
        return False
    return True
