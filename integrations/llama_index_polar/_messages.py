"""Between LlamaIndex and the engine: messages to the roles of a chat template, answers to responses, whole or streamed.

LlamaIndex's decorators wrap a stream in their own generator, which does not close the stream when it is closed itself.
If a callback keeps the exception that ended it, as debug handlers do, the stream stays alive: its record would be
missing, and an async one would compute to its end. So the wrapped stream is closed here. Knows no model.
"""

from __future__ import annotations

from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Final, cast

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection
from pydantic_core import from_json

from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.cost import cost_facts
from polar_sdk.frameworks.tools import call_turn, result_turn

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence

    from polar_sdk import Chunk, Generation
    from polar_sdk.frameworks.forms import AnswerForm
    from polar_sdk.frameworks.telemetry import CallSpan
    from polar_sdk.frameworks.tools import Roles

    Respond = Callable[[str, str | None, Generation | None], Any]
    Stream = Generator[Any, None, None]
    AsyncStream = AsyncGenerator[Any, None]


_ROLES: Final = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_roles(messages: Sequence[ChatMessage]) -> Roles:
    """Map messages to roles and content, one for one, with calls of tools and their results.

    Raises:
        InvalidRequestError: A content block is not text: this model would not see it.
    """
    return [_turn(message, position) for position, message in enumerate(messages)]


def _turn(message: ChatMessage, position: int) -> dict[str, Any]:
    role = _ROLES[message.role]
    text = "\n".join(part for block in message.blocks if (part := _block(block, position)))
    if role == "tool":
        said = message.additional_kwargs
        return result_turn(said.get("tool_call_id"), said.get("name"), text)
    if role == "assistant":
        calls = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
        return call_turn(text, [(call.tool_call_id, call.tool_name, call.tool_kwargs) for call in calls])
    return {"role": role, "content": text}


def _block(block: object, position: int) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, ToolCallBlock | ThinkingBlock | CachePoint):  # not part of the text
        return ""
    raise InvalidRequestError(
        f"a {type(block).__name__} in message {position + 1} cannot be read: this model reads text only.",
        hint="Put its content into words, or use a model that accepts such input.",
    )


def completion_response(text: str, delta: str | None, generation: Generation | None) -> CompletionResponse:
    """A whole or partial completion; `raw` is set once the answer is finished."""
    return CompletionResponse(text=text, delta=delta, raw=_raw(generation))


class FormResponder:
    """Makes chat answers of a form: text, or calls of tools as far as they have been written.

    Args:
        form: Of the answer.
    """

    def __init__(self, form: AnswerForm) -> None:
        self._form, self._reader = form, form.reader()
        self._read = 0

    def __call__(self, text: str, delta: str | None, generation: Generation | None) -> ChatResponse:
        """A whole or partial answer; `raw` is set once it is finished.

        Raises:
            IncompleteAnswerError: A call was cut off.
        """
        pieces = self._reader.push(text[self._read :])
        self._read = len(text)
        if generation is not None:
            pieces += self._reader.finish()
            self._form.check(self._reader.calls, generation)
        blocks: list[Any] = [TextBlock(text=self._reader.text)] if self._reader.text or not self._reader.calls else []
        blocks += [
            ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=_so_far(call.arguments))
            for call in self._reader.calls
        ]
        new = "".join(piece for piece in pieces if isinstance(piece, str))
        # The same again in OpenAI's form, where LlamaIndex's programs look whether there are any.
        calls = [call.as_openai() for call in self._reader.calls]
        extra = {"tool_calls": calls} if calls else {}
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=extra)
        return ChatResponse(message=message, delta=None if delta is None else new, raw=_raw(generation))


def _so_far(arguments: str) -> dict[str, Any]:
    """The arguments of a call that may still be written."""
    found = from_json(arguments or "{}", allow_partial=True)
    return found if isinstance(found, dict) else {}


def tool_selections(response: ChatResponse) -> list[ToolSelection]:
    """The calls of an answer."""
    return [
        ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=block.tool_kwargs)
        for block in response.message.blocks
        if isinstance(block, ToolCallBlock) and isinstance(block.tool_kwargs, dict)
    ]


def _raw(generation: Generation | None) -> dict[str, Any] | None:
    """Usage, cost and compute of an answer, JSON-like; `usage` is where LlamaIndex's token counter looks."""
    if generation is None:
        return None
    record, tokens = generation.usage, generation.usage.tokens
    return {
        "model": record.model,
        "finish_reason": generation.finish_reason,
        "complete": generation.complete,
        "usage": {
            "prompt_tokens": tokens.input,
            "completion_tokens": tokens.output,
            "total_tokens": tokens.input + tokens.output,
        },
        **cost_facts(record, generation.receipt),
    }


def responses(chunks: Iterator[Chunk], respond: Respond, span: CallSpan) -> Stream:
    """Chunks as responses; closing this generator closes the engine's, which ends the request.

    Args:
        chunks: Of the engine.
        respond: Makes a response of the text so far, what is new of it, and the finished answer.
        span: Is notified of the finished answer.
    """
    text = ""
    with closing(cast("Generator[Chunk]", chunks)):
        for chunk in chunks:
            text += chunk.text
            if chunk.generation is not None:
                span.note(chunk.generation.usage, chunk.generation.receipt)
            if chunk.text or chunk.generation is not None:
                yield respond(text, chunk.text, chunk.generation)


async def aresponses(chunks: AsyncIterator[Chunk], respond: Respond, span: CallSpan) -> AsyncStream:
    """As `responses`, for an async stream."""
    text = ""
    async with aclosing(cast("AsyncGenerator[Chunk]", chunks)):
        async for chunk in chunks:
            text += chunk.text
            if chunk.generation is not None:
                span.note(chunk.generation.usage, chunk.generation.receipt)
            if chunk.text or chunk.generation is not None:
                yield respond(text, chunk.text, chunk.generation)


def report_stream(
    decorate: Callable[..., Any], start: Callable[[], Stream], llm: Any, *args: Any, **kwargs: Any
) -> Stream:
    """Start a stream under a LlamaIndex decorator; `llm` and the arguments are what its events report."""
    stream: Stream | None = None

    def call(*_: Any, **__: Any) -> Stream:
        nonlocal stream
        stream = start()
        return stream

    reported: Stream = decorate(call)(llm, *args, **kwargs)
    return _closing_both(reported, cast("Stream", stream))


def _closing_both(reported: Stream, stream: Stream) -> Stream:
    with closing(stream), closing(reported):
        yield from reported


async def areport_stream(
    decorate: Callable[..., Any],
    start: Callable[[], Awaitable[AsyncStream]],
    llm: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncStream:
    """As `report_stream`, for an async stream."""
    stream: AsyncStream | None = None

    async def call(*_: Any, **__: Any) -> AsyncStream:
        nonlocal stream
        stream = await start()
        return stream

    reported: AsyncStream = await decorate(call)(llm, *args, **kwargs)
    return _aclosing_both(reported, cast("AsyncStream", stream))


async def _aclosing_both(reported: AsyncStream, stream: AsyncStream) -> AsyncStream:
    async with aclosing(stream), aclosing(reported):
        async for response in reported:
            yield response
