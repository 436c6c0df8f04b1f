"""Messages of a body as roles and text, with tool calls and their results.

A part that is not text is refused, never dropped. Knows no endpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_sdk.frameworks.tools import call_turn, result_turn
from polar_sdk.reading import Unreadable, parse_json, shown
from polar_server.openai.fields import Text, invalid, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_sdk.frameworks.tools import Roles

ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MAX_MESSAGES: Final = 10_000
_MAX_CALLS: Final = 128
_NAME: Final = Text(64)
_ID: Final = Text(200)
_ARGUMENTS: Final = Text()
_TEXT_PARTS: Final = {"text": "text", "refusal": "refusal"}
"""Parts of a chat message that are text, and the key that holds it."""


def read_messages(value: Any) -> Roles:
    """The messages of a chat.

    Raises:
        ApiError: One of them cannot be read; `param` says which.
    """
    check_count("messages", value)
    called: dict[str, str] = {}
    return [_message(message, f"messages[{place}]", called) for place, message in enumerate(value)]


def check_count(name: str, value: Any) -> None:
    """Refuse anything but a list of messages, or too many.

    Raises:
        ApiError: It is.
    """
    if not isinstance(value, list) or not value:
        raise invalid(name, "there must be a list of at least one message.")
    if len(value) > _MAX_MESSAGES:
        raise invalid(name, f"there are {len(value):,}; use at most {_MAX_MESSAGES:,}.")


def _message(message: Any, where: str, called: dict[str, str]) -> dict[str, Any]:
    """One message.

    Args:
        message: As it came.
        where: Its place.
        called: The tools that were called so far, by the id of the call; added to.
    """
    if not isinstance(message, dict):
        raise invalid(where, f"{shown(message)} is not an object.")
    role = message.get("role")
    if role == "tool":
        said = text_of(message.get("content"), f"{where}.content", _TEXT_PARTS)
        return read_result(message.get("tool_call_id"), said, f"{where}.tool_call_id", called)
    if role == "function" or message.get("function_call"):
        raise unsupported(
            where, "functions are the older form of tools; use tool_calls and messages with the role tool."
        )
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f"{where}.role", f"{shown(role)} is unknown; use {', '.join(ROLES)}, tool.")
    if message.get("audio") is not None:
        raise unsupported(f"{where}.audio", "this engine reads text only.")
    read = _turn(message, ROLES[role], where, called)
    if (name := message.get("name")) is not None:
        read["name"] = _NAME.check(f"{where}.name", name)  # the chat template decides what becomes of it
    return read


def _turn(message: Mapping[str, Any], role: str, where: str, called: dict[str, str]) -> dict[str, Any]:
    """The role and text of a message; the assistant's with the calls that it made."""
    content = message.get("content")
    if role != "assistant":
        if message.get("tool_calls"):
            raise invalid(f"{where}.tool_calls", "only messages of the assistant have them.")
        return {"role": role, "content": text_of(content, f"{where}.content", _TEXT_PARTS)}
    calls = _calls(message.get("tool_calls"), f"{where}.tool_calls", called)
    if content is None and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    if content is None and calls:
        content = ""
    return call_turn(text_of(content, f"{where}.content", _TEXT_PARTS), calls)


def _calls(value: Any, where: str, called: dict[str, str]) -> list[tuple[str, str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > _MAX_CALLS:
        raise invalid(where, f"it must be a list of at most {_MAX_CALLS} calls.")
    calls = []
    for place, call in enumerate(value):
        here = f"{where}[{place}]"
        if isinstance(call, dict) and call.get("type", "function") != "function":
            raise unsupported(f"{here}.type", f"a call of type {shown(call['type'])}: only functions are called.")
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise invalid(here, f"{shown(call)} is not a call; it needs id, type and function.")
        calls.append(read_call_of(call.get("id"), function, here, called, id_name="id", within="function."))
    return calls


def read_call_of(
    call_id: Any, function: Mapping[str, Any], where: str, called: dict[str, str], *, id_name: str, within: str = ""
) -> tuple[str, str, Any]:
    """A call of an earlier answer: its id, the name of the tool and its arguments.

    Args:
        call_id: Its id.
        function: What has `name` and `arguments`.
        where: Its place.
        called: Learns the name of the call.
        id_name: What the id is called there.
        within: Where in the call the function is.

    Raises:
        ApiError: It has no id or name, or its arguments are not text.
    """
    name = _NAME.check(f"{where}.{within}name", function.get("name"))
    known = _ID.check(f"{where}.{id_name}", call_id)
    called[known] = name
    written = _ARGUMENTS.check(f"{where}.{within}arguments", function.get("arguments", ""))
    try:
        return known, name, parse_json(written or "{}")
    except Unreadable:  # an answer that was cut off: the model sees what it wrote
        return known, name, written


def read_result(call_id: Any, said: str, where: str, called: Mapping[str, str]) -> dict[str, Any]:
    """A tool's result, as a message.

    Args:
        call_id: Which call it answers.
        said: The result.
        where: Place of the id.
        called: The tools that were called so far.

    Raises:
        ApiError: No earlier message made such a call.
    """
    known = _ID.check(where, call_id)
    if known not in called:
        raise invalid(where, f"no message before it has a call with the id {shown(known)}; repeat the one that has.")
    return result_turn(known, called[known], said)


def text_of(content: Any, where: str, kinds: Mapping[str, str]) -> str:
    """The text of a message.

    Args:
        content: Text, or a list of parts.
        where: Its place.
        kinds: Types of parts that are text, and the key that holds it.

    Raises:
        ApiError: It is not text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"{shown(content)} is neither text nor a list of text parts.")
    return "".join(_part(part, f"{where}[{place}]", kinds) for place, part in enumerate(content))


def _part(part: Any, where: str, kinds: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise invalid(where, f"{shown(part)} is not a text part.")
    if kind not in kinds:
        raise unsupported(where, f"a part of type {shown(kind)}: this engine reads text only.")
    if not isinstance(part.get(kinds[kind]), str):
        raise invalid(where, f"{shown(part)} is not a text part.")
    return str(part[kinds[kind]])
