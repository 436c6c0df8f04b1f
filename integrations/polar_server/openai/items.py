"""Items of `/v1/responses` as messages: texts, calls of tools, and what tools returned.

Nothing is stored, so an item that names another one by its id is refused. Knows no answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_sdk.frameworks.tools import turn_text
from polar_sdk.reading import shown
from polar_server.openai.fields import invalid, unsupported
from polar_server.openai.messages import ROLES, check_count, read_call, read_result, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_sdk.frameworks.tools import Roles

_PARTS: Final = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_STORED: Final = "item_reference"


def read_input(value: Any, instructions: str | None) -> Roles:
    """The input of a response as messages, after its instructions.

    Args:
        value: A text, or a list of items.
        instructions: What goes before everything.

    Raises:
        ApiError: An item cannot be read; `param` says which.
    """
    roles: Roles = [] if not instructions else [{"role": "system", "content": instructions}]
    if isinstance(value, str):
        return [*roles, {"role": "user", "content": value}]
    check_count("input", value)
    called: dict[str, str] = {}
    for place, item in enumerate(value):
        _add(roles, item, f"input[{place}]", called)
    return roles


def _add(roles: Roles, item: Any, where: str, called: dict[str, str]) -> None:
    if not isinstance(item, dict):
        raise invalid(where, f"{shown(item)} is not an object.")
    kind = item.get("type", "message")
    if kind == "message":
        roles.append(_message(item, where))
    elif kind == "function_call":
        call = read_call(item.get("call_id"), item, where, called, id_name="call_id")
        if roles and roles[-1]["role"] == "assistant":  # one turn: what it said, and what it called
            roles[-1]["content"] = "\n".join(filter(None, [roles[-1]["content"], turn_text("", [call])]))
        else:
            roles.append({"role": "assistant", "content": turn_text("", [call])})
    elif kind == "function_call_output":
        said = text_of(item.get("output"), f"{where}.output", _PARTS)
        roles.append(read_result(item.get("call_id"), said, f"{where}.call_id", called))
    elif kind == _STORED:
        raise unsupported(f"{where}.type", "nothing is stored here; send the item itself.")
    else:
        raise unsupported(
            f"{where}.type", f"an item of type {shown(kind)}: this engine reads text and calls functions."
        )


def _message(item: Mapping[str, Any], where: str) -> dict[str, str]:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f"{where}.role", f"{shown(role)} is unknown; use {', '.join(ROLES)}.")
    return {"role": ROLES[role], "content": text_of(item.get("content"), f"{where}.content", _PARTS)}
