"""Tools and schemas for models that were not trained on them: what the prompt says, and the grammar of the answer.

The prompt shows functions as signatures, which small models follow better than JSON schemas; the grammar makes every
call valid. A call is one line of JSON, `{"name": …, "arguments": {…}}`. Where the model may choose, its first character
decides: an answer that begins with a brace is a call, and anything else is text. Knows no framework.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from polar_sdk.errors import InvalidRequestError, did_you_mean
from polar_sdk.request.constraint import JSON_STYLE, closed, followable

if TYPE_CHECKING:
    from collections.abc import Sequence

    Roles = list[dict[str, str]]


MAX_CALLS: Final = 8
"""Maximum number of calls in one answer."""
_MAX_DEPTH: Final = 4
"""How deep a signature shows nested objects."""
_EXAMPLE: Final = (
    {"role": "user", "content": "What time is it in Rome?"},
    {"role": "assistant", "content": '{"name": "get_time", "arguments": {"city": "Rome"}}'},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome!"},
)
"""Shows a model when to call and when to talk; a model of 135M parameters calls nothing without it."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of an object."""

    @classmethod
    def of_openai(cls, tool: object) -> Tool:
        """Read OpenAI's `{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}`.

        Raises:
            InvalidRequestError: It is something else.
        """
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise InvalidRequestError(
                f"a tool is {str(tool)[:80]!r}; pass functions, or {{'type': 'function', 'function': {{…}}}}."
            )
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise InvalidRequestError(
                f"parameters of the tool {name!r} are {str(parameters)[:80]!r}; pass the JSON schema of an object."
            )
        return cls(name, str(function.get("description") or ""), dict(parameters))

    @property
    def schema(self) -> dict[str, Any]:
        """Schema of the arguments, without any that it does not name."""
        own = {"type": "object", "properties": {}, **self.parameters}
        read: dict[str, Any] = followable(closed(own))
        return read

    @property
    def call_schema(self) -> dict[str, Any]:
        """Schema of a call."""
        own = self.schema
        call: dict[str, Any] = {
            "type": "object",
            "properties": {"name": {"const": self.name}, "arguments": own},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        return call | {key: own[key] for key in ("$defs", "definitions") if key in own}

    @property
    def signature(self) -> str:
        """The function in one line: name, parameters, description."""
        fields = signature_of(self.schema, self.schema)
        line = f"{self.name}({fields[1:-1] if fields.startswith('{') else fields})"
        return f"{line}: {' '.join(self.description.split())}" if self.description else line


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request, and whether the model must call one."""

    tools: tuple[Tool, ...]
    required: bool = False
    parallel: bool = False
    """Whether one answer may contain several calls; small models would repeat the first."""

    @classmethod
    def choose(cls, tools: Sequence[Tool], choice: Any = None, *, parallel: bool = False) -> ToolUse | None:
        """Apply a `tool_choice`: auto (or None), none, any, required, True, a name, or OpenAI's mapping of one.

        Returns:
            None where no tool may be called.

        Raises:
            InvalidRequestError: No tool has that name.
        """
        names = [tool.name for tool in tools]
        if isinstance(choice, dict):
            function = choice.get("function")
            named = function if isinstance(function, Mapping) else choice
            choice = named.get("name") or choice.get("name") or choice.get("type")
        if choice in ("none", False) or (not tools and choice in (None, "auto")):
            return None
        if not tools:
            raise InvalidRequestError(f"tool_choice={choice!r} needs tools; pass some, or leave it out.")
        if choice in (None, "auto"):
            return cls(tuple(tools), parallel=parallel)
        if choice in names:
            return cls(tuple(tool for tool in tools if tool.name == choice), required=True, parallel=False)
        if choice in ("any", "required", True):
            return cls(tuple(tools), required=True, parallel=parallel)
        raise InvalidRequestError(f"tool_choice={choice!r} names no tool; {did_you_mean(str(choice), names)}")

    def grammar(self) -> str:
        """The answers that are possible, as Lark with JSON schemas.

        Raises:
            InvalidRequestError: Two tools have the same name.
        """
        names = [tool.name for tool in self.tools]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise InvalidRequestError(f"two tools are named {double!r}; give each its own name.")
        more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if self.parallel else ""
        rules = [f"start: {'calls' if self.required else 'text | calls'}", f"calls: call{more}"]
        if not self.required:
            rules.append(r"text: /[^{\s](?s:.)*/")
        rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(self.tools))))
        for index, tool in enumerate(self.tools):
            rules.append(f'call_{index}: {json.dumps(_head(tool.name))} arguments_{index} "}}"')
            rules.append(f"arguments_{index}: %json {json.dumps({**tool.schema, 'x-guidance': JSON_STYLE})}")
        return "\n".join(rules)

    def teach(self, messages: Sequence[Mapping[str, str]]) -> Roles:
        """The messages, with a description of the tools; where the model may choose, an example shows how."""
        lines = "\n".join(tool.signature for tool in self.tools)
        told = instructed(
            messages,
            f"You can call these functions:\n{lines}\nTo call a function, reply only with JSON like "
            f'{{"name": "{self.tools[0].name}", "arguments": {{...}}}}. Use the values that the user gives. '
            "Otherwise reply with text.",
        )
        return told if self.required else [told[0], *map(dict, _EXAMPLE), *told[1:]]


def _head(name: str) -> str:
    """A call of that tool up to its arguments."""
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def call_text(name: str, arguments: Any) -> str:
    """A call as the model writes it, and reads it in the history of a conversation."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def turn_text(text: str, calls: Sequence[tuple[str, Any]]) -> str:
    """An answer in the history of a conversation: its text, then its calls, each a name and arguments."""
    written = [call_text(name, arguments) for name, arguments in calls]
    return "\n".join([text, *written] if text else written)


def result_text(name: str | None, text: str, *, failed: bool = False) -> str:
    """A tool's result as a user's message: chat templates without tools know no other role for it."""
    return f"{'Error' if failed else 'Result'} of {name or 'the tool'}: {text}"


def instructed(messages: Sequence[Mapping[str, str]], instructions: str) -> Roles:
    """The messages with instructions at the end of the first system message; there is at most one in the end."""
    roles = [dict(message) for message in messages]
    if roles and roles[0]["role"] == "system":
        roles[0]["content"] = f"{roles[0]['content']}\n\n{instructions}"
        return roles
    return [{"role": "system", "content": instructions}, *roles]


def schema_instructions(schema: Mapping[str, Any]) -> str:
    """The prompt's part on a schema that the answer must match."""
    fields = schema.get("properties")
    described = "\n".join(
        f"- {name}: {' '.join(str(part['description']).split())}"
        for name, part in (fields.items() if isinstance(fields, dict) else ())
        if isinstance(part, dict) and part.get("description")
    )
    about = " ".join(str(schema.get("description") or "").split())
    lines = [f"Reply only with JSON of this form: {signature_of(schema, schema)}", about, described]
    return "\n".join(line for line in lines if line)


def signature_of(part: Any, root: Mapping[str, Any], depth: int = 0) -> str:
    """A JSON schema in the shorthand of signatures: `{name: string, tags?: [string], kind: "a" | "b"}`.

    Whatever is not a schema in it is left out: what reads the schema as a grammar refuses it, with the reason.
    """
    if not isinstance(part, dict) or depth > _MAX_DEPTH:
        return "any"
    if isinstance(reference := part.get("$ref"), str):
        return signature_of(_target(reference, root), root, depth + 1)
    if options := _alternatives(part, root, depth):
        return " | ".join(options)
    if part.get("type") == "array":
        return f"[{signature_of(part.get('items'), root, depth + 1)}]"
    fields = part.get("properties")
    if not isinstance(fields, dict):
        return str(part.get("type") or "any")
    needed = part.get("required")
    needed = needed if isinstance(needed, list) else ()
    shown = (
        f"{name}{'' if name in needed else '?'}: {signature_of(value, root, depth + 1)}"
        for name, value in fields.items()
    )
    return f"{{{', '.join(shown)}}}"


def _alternatives(part: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> list[str]:
    """The values or types among which a schema lets choose; empty where it does not."""
    values = part.get("enum", [part["const"]] if "const" in part else None)
    if isinstance(values, list):
        return [json.dumps(value, ensure_ascii=False) for value in values]
    options = part.get("anyOf") or part.get("oneOf")
    if isinstance(options, list):
        return [signature_of(option, root, depth) for option in options]
    kinds = part.get("type")
    return list(map(str, kinds)) if isinstance(kinds, list) else []


def _target(reference: str, root: Mapping[str, Any]) -> Any:
    """The target of a local reference; None where it has none."""
    part: Any = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        key = name.replace("~1", "/").replace("~0", "~")
        part = part.get(key) if isinstance(part, dict) and key else part
    return part


@dataclass
class Call:
    """A call as far as it has been read."""

    name: str
    arguments: str = ""
    """JSON text."""
    complete: bool = False
    id: str = field(default_factory=lambda: f"call_{uuid4().hex[:24]}")

    def as_openai(self) -> dict[str, Any]:
        """The call as OpenAI's API spells it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def values(self) -> dict[str, Any] | None:
        """The arguments, or None where the call was cut off."""
        return json.loads(self.arguments) if self.complete else None


Piece = str | tuple[int, str | None, str]
"""New text of the answer; or of a call: its index, its name in the first piece, and new text of its arguments."""


class CallReader:
    """Reads an answer that may be calls, in whatever pieces it comes.

    Args:
        use: The tools of the request; None = the answer is text.
    """

    def __init__(self, use: ToolUse | None) -> None:
        self.calls: list[Call] = []
        self.text = ""
        self._is_text = True if use is None else None
        self._heads = () if use is None else tuple(_head(tool.name) for tool in use.tools)
        self._undecided = ""
        self._head = ""
        """The part of a call before its arguments."""
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, text: str) -> list[Piece]:
        """Read more of the answer; returns what is new."""
        if self._is_text is None:
            self._undecided += text
            if any(self._undecided.startswith(head) for head in self._heads):
                self._is_text = False
            elif not any(head.startswith(self._undecided) for head in self._heads):
                self._is_text = True
            if self._is_text is None:
                return []
            text, self._undecided = self._undecided, ""
        if self._is_text or not text:
            self.text += text
            return [text] if text else []
        pieces: dict[int, tuple[str | None, str]] = {}
        for character in text:
            if not self._depth and not self._opens(character, pieces):
                continue
            index = len(self.calls) - 1
            name, arguments = pieces.get(index, (None, ""))
            pieces[index] = (name, arguments + character)
            self.calls[index].arguments += character
            self._follow(character)
            self.calls[index].complete = not self._depth
        return [(index, name, arguments) for index, (name, arguments) in pieces.items()]

    def finish(self) -> list[Piece]:
        """Return what was held back: an answer that ended before it was certain whether it is a call is text."""
        self.text += self._undecided
        held, self._undecided = self._undecided, ""
        return [held] if held else []

    def _opens(self, character: str, pieces: dict[int, tuple[str | None, str]]) -> bool:
        """True where the arguments of a new call begin; what stands around them is read."""
        if self._head or character == "{":
            self._head += character
        if character != "{" or not self._head.endswith('"arguments": {'):
            return False
        self.calls.append(Call(json.loads(self._head[:-1] + "null}")["name"]))
        pieces[len(self.calls) - 1] = (self.calls[-1].name, "")
        self._head = ""
        return True

    def _follow(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted and character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = not self._quoted
        elif not self._quoted:
            self._depth += (character in "{[") - (character in "}]")
