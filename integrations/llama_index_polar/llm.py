"""`PolarLLM`: the LlamaIndex model. Each of the eight calls goes to the engine on its own.

None of them calls another, because the decorator of each reports an event: one call, one event. The four async ones
never block the event loop. `response.raw` contains usage, cost and compute; on streams only the last response has it.

It adds LlamaIndex's way of naming the caller to the settings of `polar_sdk.frameworks.settings`. Knows no messages.
"""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, cast

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.types import PydanticProgramMode
from llama_index_instrumentation.dispatcher import active_instrument_tags
from pydantic import model_validator

from llama_index_polar._messages import (
    FormResponder,
    areport_stream,
    aresponses,
    completion_response,
    report_stream,
    responses,
    to_roles,
    tool_selections,
)
from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.forms import FORM_OPTIONS, AnswerForm, listed_logprobs
from polar_sdk.frameworks.settings import ModelSettings
from polar_sdk.frameworks.telemetry import CallSpan
from polar_sdk.request.constraint import json_schema

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llama_index.core.llms.llm import ToolSelection
    from llama_index.core.tools import BaseTool, ToolMetadata

    from llama_index_polar._messages import AsyncStream, Respond, Stream
    from polar_sdk import Generation, PolarModel
    from polar_sdk.request.options import Prompt, Template


class PolarSettings(ModelSettings):
    """Settings of a PoLar model; those marked *per call* may also be passed to `chat` and the like.

    `tenant` and tags may also be given as `instrument_tags({"tenant": …})` around any LlamaIndex call; these override
    those of the object, and those of the call override both.
    """

    max_tokens: int = 256
    """Maximum number of tokens in the answer; LlamaIndex keeps this much of the context window free. Per call."""

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, values: Any) -> Any:
        """Accept what `to_dict` returns: LlamaIndex writes the name of the class into it."""
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != "class_name"}
        return values

    def _options(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Engine options of one call.

        Raises:
            TypeError: An option does not exist; the message names the nearest that does.
        """
        around = {key: str(value) for key, value in active_instrument_tags.get().items()}
        tenant = around.pop("tenant", None)
        return {
            **self._with_options(call)._answer_options(),
            "tenant": call.get("tenant") or tenant or self._own_tenant,
            "tags": {**self.usage_tags, **around, **(call.get("usage_tags") or {})},
            "request_id": call.get("request_id"),
        }


class PolarLLM(PolarSettings, FunctionCallingLLM):
    """A local LLM that runs a program of layers per prompt and is metered.

    Example:
        >>> from llama_index_polar import PolarLLM
        >>> PolarLLM().complete("What is the capital of France?").text  # doctest: +SKIP
        'The capital of France is Paris.'

    With the extra `structured` it calls tools, and `structured_predict` and `as_structured_llm` are enforced by a
    grammar, so that agents and programs get valid calls from any model. `chat` takes OpenAI's `tools`, `tool_choice`,
    `parallel_tool_calls` and `response_format`. `formatted=True` means that the prompt has the special tokens already:
    none are added. `metadata` needs the context window, so reading it loads the model.
    """

    dropped: ClassVar[frozenset[str]] = frozenset(FORM_OPTIONS)

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises this class."""
        return "PolarLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Window, answer length and kind of the model."""
        engine = self._engine()
        chats = getattr(engine.loaded.tokenizer, "chat_template", None) is not None
        return LLMMetadata(
            context_window=engine.context_window,
            num_output=self.max_tokens,
            is_chat_model=chats,
            is_function_calling_model=chats and find_spec("llguidance") is not None,
            model_name=engine.name,
        )

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a plain text; as `Settings.tokenizer`, it makes LlamaIndex count as this model does."""
        return self._engine().encode(text)

    def to_payload(self) -> dict[str, Any]:
        """Facts of this model for events; unlike `metadata` it loads nothing: events fire on event loops."""
        names = ("compute", "temperature", "top_p", "top_k", "max_tokens", "seed")
        return {
            "class_name": self.class_name(),
            "model_name": self.model_name,
            "program": None if self.program is None else str(self.program),
            **{name: getattr(self, name) for name in names},
        }

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt; it becomes a user message if the model has a chat template."""
        return cast("CompletionResponse", self._run(*self._completion(prompt, formatted, kwargs)))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Complete a prompt token by token."""

        def start() -> CompletionResponseGen:
            return self._stream(*self._completion(prompt, formatted, kwargs))

        return report_stream(llm_completion_callback(), start, self, prompt, formatted=formatted, **kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages."""
        return cast("ChatResponse", self._run(*self._conversation(messages, kwargs)))

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer messages token by token."""

        def start() -> ChatResponseGen:
            return self._stream(*self._conversation(messages, kwargs))

        return report_stream(llm_chat_callback(), start, self, messages, **kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Like `complete`, without blocking the event loop."""
        return cast("CompletionResponse", await self._arun(*self._completion(prompt, formatted, kwargs)))

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Like `stream_complete`, without blocking the event loop."""

        async def start() -> CompletionResponseAsyncGen:
            return await self._astream(*self._completion(prompt, formatted, kwargs))

        return await areport_stream(llm_completion_callback(), start, self, prompt, formatted=formatted, **kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Like `chat`, without blocking the event loop."""
        return cast("ChatResponse", await self._arun(*await self._aconversation(messages, kwargs)))

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Like `stream_chat`, without blocking the event loop."""

        async def start() -> ChatResponseAsyncGen:
            return await self._astream(*await self._aconversation(messages, kwargs))

        return await areport_stream(llm_chat_callback(), start, self, messages, **kwargs)

    # --- Tools. LlamaIndex's programs for structured output call them, too. ---

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of `chat` that let the model call tools; `tool_required` forces it to."""
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(ChatMessage(user_msg, role=MessageRole.USER) if isinstance(user_msg, str) else user_msg)
        kwargs["tool_choice"] = kwargs.get("tool_choice") or ("any" if tool_required else "auto")
        return {
            "messages": messages,
            "tools": [_openai_tool(tool.metadata) for tool in tools],
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of an answer.

        Raises:
            ValueError: There are none, and `error_on_no_tool_call` is set.
        """
        calls = tool_selections(response)
        if not calls and error_on_no_tool_call:
            raise ValueError(f"the model called no tool; it answered {(response.message.content or '')[:80]!r}.")
        return calls

    def _structured_stream_call(
        self, output_cls: type[Any], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        """As LlamaIndex's, which forces no call where it streams."""
        if (program := self._program(output_cls, prompt)) is None:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        return program.stream_call(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self, output_cls: type[Any], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        if (program := await asyncio.to_thread(self._program, output_cls, prompt)) is None:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        return await program.astream_call(llm_kwargs=llm_kwargs, **prompt_args)

    def _program(self, output_cls: type[Any], prompt: Any) -> Any:
        """A program that must call its tool; None where another mode was chosen, or the model calls none."""
        from llama_index.core.program.function_program import FunctionCallingProgram

        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT or not self.metadata.is_function_calling_model:
            return None
        return FunctionCallingProgram.from_defaults(output_cls, llm=self, prompt=prompt, tool_choice="any")

    # --- Prompts: text and template. A formatter that the user set has placed the special tokens already. ---

    def _conversation(
        self, messages: Sequence[ChatMessage], call: Mapping[str, Any]
    ) -> tuple[Prompt, Template, dict[str, Any], Respond]:
        """Prompt, template, engine options and reader of one chat call."""
        form = AnswerForm.of(call)
        own = self.messages_to_prompt
        if own is not None and own is not generic_messages_to_prompt:
            return own(messages), "raw", {**self._options(call), **form.options()}, FormResponder(form)
        said, options = to_roles(messages), self._options(call)
        form = form.written_as(self._engine().call_format)
        return form.teach(said), "chat", {**options, **form.options()}, FormResponder(form)

    async def _aconversation(
        self, messages: Sequence[ChatMessage], call: Mapping[str, Any]
    ) -> tuple[Prompt, Template, dict[str, Any], Respond]:
        """As `_conversation`, which may load weights, without blocking the event loop."""
        return await asyncio.to_thread(self._conversation, messages, call)

    def _completion(
        self, prompt: str, formatted: bool, call: Mapping[str, Any]
    ) -> tuple[Prompt, Template, dict[str, Any], Respond]:
        """The same of one completion, which calls no tools."""
        for name in FORM_OPTIONS:
            if call.get(name):
                raise InvalidRequestError(f"{name}= is an option of chat; a completion is text.")
        return *self._text(prompt, formatted), self._options(call), completion_response

    def _text(self, prompt: str, formatted: bool) -> tuple[Prompt, Template]:
        if formatted:
            return prompt, "raw"
        own = self.completion_to_prompt
        if own is None or own is default_completion_to_prompt:
            return prompt, "auto"
        return own(prompt), "raw"

    # --- One engine call each. ---

    def _run(self, prompt: Prompt, template: Template, options: Mapping[str, Any], respond: Respond) -> Any:
        span = CallSpan(self.tracing)
        engine = self._engine()
        generation = engine.generate(prompt, template=template, **options)
        span.note(generation.usage, generation.receipt)
        return _with_logprobs(respond, engine)(generation.text, None, generation)

    async def _arun(self, prompt: Prompt, template: Template, options: Mapping[str, Any], respond: Respond) -> Any:
        span = CallSpan(self.tracing)
        engine = await asyncio.to_thread(self._engine)  # may load weights
        generation = await engine.agenerate(prompt, template=template, **options)
        span.note(generation.usage, generation.receipt)
        return _with_logprobs(respond, engine)(generation.text, None, generation)

    def _stream(self, prompt: Prompt, template: Template, options: Mapping[str, Any], respond: Respond) -> Stream:
        span = CallSpan(self.tracing)
        engine = self._engine()
        chunks = engine.stream(prompt, template=template, **options)
        return responses(chunks, _with_logprobs(respond, engine), span)

    async def _astream(
        self, prompt: Prompt, template: Template, options: Mapping[str, Any], respond: Respond
    ) -> AsyncStream:
        span = CallSpan(self.tracing)
        engine = await asyncio.to_thread(self._engine)
        chunks = engine.astream(prompt, template=template, **options)
        return aresponses(chunks, _with_logprobs(respond, engine), span)


def _openai_tool(metadata: ToolMetadata) -> dict[str, Any]:
    """A tool in OpenAI's form, with the schema that its class has: LlamaIndex's own form loses recursive parts."""
    if metadata.fn_schema is None:
        return metadata.to_openai_tool(skip_length_check=True)
    parameters = json_schema(metadata.fn_schema)
    if "$ref" in metadata.fn_schema.model_json_schema():
        # Of a class that refers to itself: LlamaIndex, which calls the tool, looks for fields at the root.
        metadata.get_parameters_dict = lambda: parameters  # type: ignore[method-assign]
    function = {"name": metadata.name, "description": metadata.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _with_logprobs(respond: Respond, engine: PolarModel) -> Respond:
    """The same responses, whose `raw` has the log-probabilities that a call asks for."""

    def noted(text: str, delta: str | None, generation: Generation | None) -> Any:
        response = respond(text, delta, generation)
        if generation is not None and isinstance(response.raw, dict):
            response.raw |= listed_logprobs(generation, engine.decode)
        return response

    return noted
