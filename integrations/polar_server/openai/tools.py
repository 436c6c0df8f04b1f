"""Tools and formats of a body, checked, and the form of the answer that they request.

Chat completions and responses have two spellings for the same: `{"type": "function", "function": {…}}`, and the same
without the inner object. Every call matches the schema of its tool, `strict` or not. Knows no endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import did_you_mean
from polar_sdk.frameworks.forms import AnswerForm
from polar_sdk.reading import shown
from polar_server.openai.fields import Text, invalid, unsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_TOOLS: Final = 128
_MODES: Final = ("none", "auto", "required")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DESCRIPTION: Final = Text(10_000)
_FORMATS: Final = ("text", "json_object", "json_schema")

TOOLS: Final[dict[str, Any]] = {"type": "array", "items": {"type": "object"}, "maxItems": MAX_TOOLS}
TOOL_CHOICE: Final[dict[str, Any]] = {"oneOf": [{"enum": list(_MODES)}, {"type": "object"}]}
"""JSON schemas of the two fields, whose parts are checked here."""


def read_form(
    tools: Any, choice: Any, answer_format: Mapping[str, Any] | None, *, parallel: bool, nested: bool
) -> AnswerForm:
    """The form of the answer that a body asks for.

    Args:
        tools: Functions that may be called.
        choice: Whether and which; None = the model decides.
        answer_format: As `read_format` returns it.
        parallel: Whether one answer may hold several calls.
        nested: Whether functions are spelt as in chat completions.

    Raises:
        ApiError: One of them is wrong; `param` says which.
    """
    listed = _tools(tools, nested=nested)
    names = [tool["function"]["name"] for tool in listed]
    mode, allowed = _choice(choice, names, nested=nested)
    used = [tool for tool in listed if tool["function"]["name"] in allowed]
    one = isinstance(choice, Mapping) and choice.get("type") == "function"
    options = {"tools": used, "tool_choice": mode, "parallel_tool_calls": parallel and not one}
    return AnswerForm.of({**options, "response_format": answer_format})


def read_format(name: str, value: Any) -> Mapping[str, Any] | None:
    """A `response_format` of chat completions, checked; None = text.

    Raises:
        ApiError: It is none.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in _FORMATS:
        raise invalid(name, f"{shown(kind or value)} is unknown; use {', '.join(_FORMATS)}.")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
        if schema is not None and not isinstance(schema, dict):
            raise invalid(name, "schema must be a JSON schema, which is an object.")
        return {"type": kind} if schema is None else {"type": kind, "schema": schema}
    return {"type": kind, "json_schema": check_schema(name, value.get("json_schema"), "json_schema.schema")}


def check_schema(where: str, given: Any, place: str) -> dict[str, Any]:
    """The description and schema of a format.

    Args:
        where: The field.
        given: What holds them.
        place: Where in the field the schema belongs.

    Raises:
        ApiError: There is no schema.
    """
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(schema, dict):
        raise invalid(where, f"{place} must be a JSON schema, which is an object.")
    about = given.get("description")
    if about is not None:
        _DESCRIPTION.check(f"{where}.description", about)
    return {"description": about, "schema": schema}


def _tools(value: Any, *, nested: bool) -> list[dict[str, Any]]:
    """Tools as chat completions spell them."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise invalid("tools", f"it must be a list of at most {MAX_TOOLS} tools.")
    tools = [_tool(tool, f"tools[{place}]", nested=nested) for place, tool in enumerate(value)]
    seen: set[str] = set()
    for place, tool in enumerate(tools):
        name = tool["function"]["name"]
        if name in seen:
            raise invalid(f"tools[{place}]", f"two tools are named {name!r}; give each its own name.")
        seen.add(name)
    return tools


def _tool(tool: Any, where: str, *, nested: bool) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise invalid(where, f"{shown(tool)} is not an object.")
    if tool.get("type") != "function":
        raise unsupported(f"{where}.type", f"{shown(tool.get('type'))}: this engine calls functions only.")
    function = tool.get("function") if nested else tool
    within = f"{where}.function" if nested else where
    if not isinstance(function, dict):
        raise invalid(within, "it must be an object with name, description and parameters.")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"{within}.name", f"{shown(name)} is not a valid name; use 1 to 64 letters, digits, _ and -.")
    about = function.get("description")
    if about is not None:
        _DESCRIPTION.check(f"{within}.description", about)
    if not isinstance(strict := function.get("strict"), bool | None):
        raise invalid(f"{within}.strict", f"{shown(strict)} is neither true nor false.")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{within}.parameters", f"{shown(parameters)} is not a JSON schema of an object.")
    if parameters and parameters.get("type", "object") != "object":
        raise invalid(f"{within}.parameters", f"its type is {shown(parameters['type'])}; arguments are an object.")
    read = {"name": name, "description": about or "", "parameters": parameters or {}}
    return {"type": "function", "function": read}


def _choice(value: Any, names: Sequence[str], *, nested: bool) -> tuple[str, Sequence[str]]:
    """The mode, and the names of the tools among which it may choose."""
    if value is None or (isinstance(value, str) and value in _MODES):
        if value == "required" and not names:
            raise invalid("tool_choice", "it needs tools; list some, or leave it out.")
        return value or "auto", names
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        return "required", [_named(value, names, nested=nested)]
    if kind == "allowed_tools":
        return _allowed(value, names, nested=nested)
    if isinstance(kind, str):
        raise unsupported("tool_choice", f"{shown(kind)}: this engine calls functions only.")
    raise invalid("tool_choice", f"{shown(value)} is unknown; use {', '.join(_MODES)}, or name a function.")


def _named(value: Mapping[str, Any], names: Sequence[str], *, nested: bool) -> str:
    function = value.get("function") if nested else value
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid("tool_choice", "it names no function.")
    if name not in names:
        how = did_you_mean(name, names) if names else "list it in tools."
        raise invalid("tool_choice", f"there is no tool {name[:64]!r}; {how}")
    return name


def _allowed(value: Mapping[str, Any], names: Sequence[str], *, nested: bool) -> tuple[str, Sequence[str]]:
    """Some of the tools, which may or must be called."""
    given = value.get("allowed_tools") if nested else value
    mode = given.get("mode") if isinstance(given, dict) else None
    listed = given.get("tools") if isinstance(given, dict) else None
    if mode not in ("auto", "required") or not isinstance(listed, list) or not 1 <= len(listed) <= MAX_TOOLS:
        raise invalid("tool_choice", "allowed_tools needs mode, auto or required, and tools, a list of functions.")
    allowed = []
    for tool in listed:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise invalid("tool_choice", f"{shown(tool)} is not a function.")
        allowed.append(_named(tool, names, nested=nested))
    return mode, allowed
