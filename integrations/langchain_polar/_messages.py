"""LangChain messages to the roles of a chat template: system, user, assistant.

Text alone: a block that is neither text nor a trace of tool use is refused, never dropped in silence. Knows
no model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, FunctionMessage, ToolMessage

from polar_sdk.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence


_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "tool": "user",
    "function": "user",
    "ai": "assistant",
    "assistant": "assistant",
}
_NOT_SPOKEN: Final = frozenset(
    {"reasoning", "thinking", "tool_call", "tool_use", "tool_call_chunk", "input_json_delta"}
)
"""Blocks of an earlier answer that are no part of its text; tool calls are read from
`AIMessage.tool_calls`."""


def to_roles(messages: Sequence[BaseMessage]) -> list[dict[str, str]]:
    """Map messages to `{"role": …, "content": …}`, one for one.

    A tool's result is told as a user's message that names the tool, since chat templates without tools know
    three roles.

    Raises:
        InvalidRequestError: A role or a content block that this model cannot read.
    """
    return [{"role": _role(message), "content": _content(message, at)} for at, message in enumerate(messages)]


def _role(message: BaseMessage) -> str:
    name = message.role if isinstance(message, ChatMessage) else message.type.removesuffix("MessageChunk").lower()
    if name not in _ROLES:
        raise InvalidRequestError(
            f"a message of role {name!r} has no place in a chat template.",
            hint="Use system, human (user), ai (assistant) or tool messages.",
        )
    return _ROLES[name]


def _content(message: BaseMessage, position: int) -> str:
    text = _text(message, position)
    if isinstance(message, ToolMessage | FunctionMessage):
        return f"Result of {message.name or 'the tool'}: {text}"
    if isinstance(message, AIMessage) and message.tool_calls:
        calls = [json.dumps({"name": call["name"], "arguments": call["args"]}) for call in message.tool_calls]
        return "\n".join([text, *calls] if text else calls)
    return text


def _text(message: BaseMessage, position: int) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(_block(block, message, position) for block in message.content)


def _block(block: str | dict[Any, Any], message: BaseMessage, position: int) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type", "text" if "text" in block else "unknown")
    if kind == "text":
        return str(block.get("text", ""))
    if isinstance(message, AIMessage) and kind in _NOT_SPOKEN:
        return ""
    raise InvalidRequestError(
        f"a content block of type {kind!r} in message {position + 1} ({message.type}) cannot be read: "
        "this model takes text alone.",
        hint="Put its content into words, or send it to a model that takes such input.",
    )
