"""`PolarLLM`: the LlamaIndex model. Each of the eight calls goes to the engine on its own.

None calls another, because the decorator of each reports an event: one call, one event. The four async ones never block
the event loop. `response.raw` contains usage, cost and compute; on streams only the last response has it.

To the settings of `polar_sdk.frameworks.settings` it adds LlamaIndex's way to say who asks. Knows no messages.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

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
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM, default_completion_to_prompt
from llama_index_instrumentation.dispatcher import active_instrument_tags
from pydantic import model_validator

from llama_index_polar._messages import (
    areport_stream,
    aresponses,
    chat_response,
    completion_response,
    report_stream,
    responses,
    to_roles,
)
from polar_sdk.frameworks.settings import ModelSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llama_index_polar._messages import AsyncStream, Respond, Stream
    from polar_sdk.request.options import Prompt, Template


class PolarSettings(ModelSettings):
    """Settings of a PoLar model; those marked *per call* may also be passed to `chat` and the like.

    `tenant` and tags may also be given as `instrument_tags({"tenant": …})` around any LlamaIndex call; these override
    those of the object, and those of the call override both.
    """

    max_tokens: int = 256
    """Max tokens of the answer; LlamaIndex keeps this much of the context window free. Per call."""

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


class PolarLLM(PolarSettings, LLM):
    """A local LLM that runs a program of layers per prompt and is metered.

    Example:
        >>> from llama_index_polar import PolarLLM
        >>> PolarLLM().complete("What is the capital of France?").text  # doctest: +SKIP
        'The capital of France is Paris.'

    It writes text only and calls no tools. `formatted=True` means that the prompt contains the special tokens already:
    none are added. `metadata` needs the context window, so reading it loads the model.
    """

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises this class."""
        return "PolarLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Window, answer length and kind of the model."""
        engine = self._engine()
        return LLMMetadata(
            context_window=engine.context_window,
            num_output=self.max_tokens,
            is_chat_model=getattr(engine.loaded.tokenizer, "chat_template", None) is not None,
            is_function_calling_model=False,
            model_name=engine.name,
        )

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a plain text; as `Settings.tokenizer`, it makes LlamaIndex count as this model does."""
        return self._engine().encode(text)

    def to_payload(self) -> dict[str, Any]:
        """What events say of this model; unlike `metadata` it loads nothing: events fire on event loops."""
        names = ("compute", "temperature", "top_p", "top_k", "max_tokens", "seed")
        return {
            "class_name": self.class_name(),
            "model_name": self.model_name,
            "program": None if self.program is None else str(self.program),
            **{name: getattr(self, name) for name in names},
        }

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt; it becomes a user's message if the model has a chat template."""
        return cast("CompletionResponse", self._run(*self._text(prompt, formatted), kwargs, completion_response))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Complete a prompt token by token."""

        def start() -> CompletionResponseGen:
            return self._stream(*self._text(prompt, formatted), kwargs, completion_response)

        return report_stream(llm_completion_callback(), start, self, prompt, formatted=formatted, **kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages."""
        return cast("ChatResponse", self._run(*self._roles(messages), kwargs, chat_response))

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer messages token by token."""

        def start() -> ChatResponseGen:
            return self._stream(*self._roles(messages), kwargs, chat_response)

        return report_stream(llm_chat_callback(), start, self, messages, **kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As `complete`, without blocking the event loop."""
        response = await self._arun(*self._text(prompt, formatted), kwargs, completion_response)
        return cast("CompletionResponse", response)

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As `stream_complete`, without blocking the event loop."""

        async def start() -> CompletionResponseAsyncGen:
            return await self._astream(*self._text(prompt, formatted), kwargs, completion_response)

        return await areport_stream(llm_completion_callback(), start, self, prompt, formatted=formatted, **kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`, without blocking the event loop."""
        return cast("ChatResponse", await self._arun(*self._roles(messages), kwargs, chat_response))

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As `stream_chat`, without blocking the event loop."""

        async def start() -> ChatResponseAsyncGen:
            return await self._astream(*self._roles(messages), kwargs, chat_response)

        return await areport_stream(llm_chat_callback(), start, self, messages, **kwargs)

    # --- Prompts: text and template. A formatter that the user set has placed the special tokens already. ---

    def _text(self, prompt: str, formatted: bool) -> tuple[Prompt, Template]:
        if formatted:
            return prompt, "raw"
        own = self.completion_to_prompt
        if own is None or own is default_completion_to_prompt:
            return prompt, "auto"
        return own(prompt), "raw"

    def _roles(self, messages: Sequence[ChatMessage]) -> tuple[Prompt, Template]:
        own = self.messages_to_prompt
        if own is None or own is generic_messages_to_prompt:
            return to_roles(messages), "chat"
        return own(messages), "raw"

    # --- One engine call each. ---

    def _run(self, prompt: Prompt, template: Template, call: Mapping[str, Any], respond: Respond) -> Any:
        generation = self._engine().generate(prompt, template=template, **self._options(call))
        return respond(generation.text, None, generation)

    async def _arun(self, prompt: Prompt, template: Template, call: Mapping[str, Any], respond: Respond) -> Any:
        options = self._options(call)
        engine = await asyncio.to_thread(self._engine)  # may load weights
        generation = await engine.agenerate(prompt, template=template, **options)
        return respond(generation.text, None, generation)

    def _stream(self, prompt: Prompt, template: Template, call: Mapping[str, Any], respond: Respond) -> Stream:
        return responses(self._engine().stream(prompt, template=template, **self._options(call)), respond)

    async def _astream(
        self, prompt: Prompt, template: Template, call: Mapping[str, Any], respond: Respond
    ) -> AsyncStream:
        options = self._options(call)
        engine = await asyncio.to_thread(self._engine)
        return aresponses(engine.astream(prompt, template=template, **options), respond)
