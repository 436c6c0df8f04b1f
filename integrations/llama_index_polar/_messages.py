"""LlamaIndex messages to a chat template's roles, and answers to LlamaIndex responses. Knows no model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

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

from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.cost import cost_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk import Generation


_ROLES: Final = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.TOOL: "user",
    MessageRole.FUNCTION: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_roles(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Map messages to `{"role": …, "content": …}`, one for one.

    Raises:
        InvalidRequestError: A content block that is no text: this model would not see it.
    """
    return [
        {"role": _ROLES[message.role], "content": _content(message, position)}
        for position, message in enumerate(messages)
    ]


def _content(message: ChatMessage, position: int) -> str:
    text = "\n".join(part for block in message.blocks if (part := _block(block, position)))
    if message.role in (MessageRole.TOOL, MessageRole.FUNCTION):
        return f"Result of {message.additional_kwargs.get('name') or 'the tool'}: {text}"
    return text


def _block(block: object, position: int) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, ToolCallBlock):
        return json.dumps({"name": block.tool_name, "arguments": block.tool_kwargs})
    if isinstance(block, ThinkingBlock | CachePoint):  # no part of what was said
        return ""
    raise InvalidRequestError(
        f"a {type(block).__name__} in message {position + 1} cannot be read: this model takes text alone.",
        hint="Put its content into words, or send it to a model that takes such input.",
    )


def completion_response(text: str, delta: str | None, generation: Generation | None) -> CompletionResponse:
    """A whole or partial completion; `raw` is set where the answer is finished."""
    return CompletionResponse(text=text, delta=delta, raw=_raw(generation))


def chat_response(text: str, delta: str | None, generation: Generation | None) -> ChatResponse:
    """A whole or partial chat answer; `raw` is set where the answer is finished."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=_raw(generation))


def _raw(generation: Generation | None) -> dict[str, Any] | None:
    """Usage, cost and compute of an answer, JSON-like; `usage` is where LlamaIndex's token counter looks."""
    if generation is None:
        return None
    record, tokens = generation.usage, generation.usage.tokens
    return {
        "model": record.model,
        "finish_reason": generation.finish_reason,
        "usage": {
            "prompt_tokens": tokens.input,
            "completion_tokens": tokens.output,
            "total_tokens": tokens.input + tokens.output,
        },
        **cost_facts(record, generation.receipt),
    }
