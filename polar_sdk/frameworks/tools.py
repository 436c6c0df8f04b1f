"""Tools and schemas: what the prompt says of them, and the grammar of the answer.

If a model's chat template supports tools, the template shows them, and calls and results are written as it writes them
(`polar_sdk.request.call_format`). For all other models, the prompt shows functions as signatures, which small models
follow better than JSON schemas, and a call is one line of JSON, `{"name": …, "arguments": {…}}`. The grammar makes
every call valid. If the model may choose, the beginning of its answer decides: an answer that begins like a call is
calls, and anything else is text, which may end in calls if those begin with a special token. Knows no framework.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import InvalidRequestError, did_you_mean
from polar_sdk.programs.floors import TOOLS_OFFERED
from polar_sdk.request.call_format import CallFormat
from polar_sdk.request.constraint import JSON_STYLE, closed, followable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Roles = list[dict[str, Any]]
    """Messages: `role` (system, user, assistant, tool) and `content`; an assistant's may have `tool_calls`, in OpenAI's
    form but with arguments as values, and a tool's has `name`, `tool_call_id` and, where it is an error, `failed`."""

OURS: Final = CallFormat()
"""The form of calls of models whose template has none."""
_FENCED: Final = CallFormat(opening="```json\n", closing="\n```", separator=None)


def spellings(form: CallFormat) -> tuple[CallFormat, ...]:
    """The forms in which an answer may be a call, a model's own first.

    Small models often leave out the token that their template begins calls with, and write the object alone, or as a
    block of code.
    """
    return (form, replace(OURS, separator=None), _FENCED) if form.after_text and not form.keywords else (form,)


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

    def call_schema(self, key: str) -> dict[str, Any]:
        """Schema of a call whose arguments have a given key."""
        own = self.schema
        call: dict[str, Any] = {
            "type": "object",
            "properties": {"name": {"const": self.name}, key: own},
            "required": ["name", key],
            "additionalProperties": False,
        }
        return call | {name: own[name] for name in ("$defs", "definitions") if name in own}

    @property
    def shown(self) -> dict[str, Any]:
        """The tool in OpenAI's form, for a chat template."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

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
            None if no tool may be called.

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

    def grammar(self, form: CallFormat = OURS, answer: Mapping[str, Any] | None = None) -> str:
        """The answers that are possible, as Lark with JSON schemas.

        Args:
            form: How calls are written.
            answer: JSON schema of an answer that is not a call; None = any text.

        Raises:
            InvalidRequestError: Two tools have the same name.
        """
        names = [tool.name for tool in self.tools]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise InvalidRequestError(f"two tools are named {double!r}; give each its own name.")
        if answer is not None and not (form.after_text or form.keywords or form.opening):
            return f"start: {_json_rule(self._call_or(answer, form))}"
        lark, others = _Lark(form), spellings(form)[1:] if answer is None else ()
        calls = [lark.of(form.opening), "call", lark.of(form.closing)]
        if self.parallel and form.separator is not None:
            calls.insert(2, f"({lark.of(form.separator)} call){{0,{MAX_CALLS - 1}}}")
        plain = [f"{lark.of(other.opening)} plain {lark.of(other.closing)}" for other in others]
        rules = [f"calls: {' | '.join([' '.join(filter(None, calls)), *plain])}"]
        if self.required:
            rules.insert(0, "start: calls")
        elif answer is not None:
            rules.insert(0, "start: answer | calls")
            rules.append(f"answer: {_json_rule(followable(dict(answer)))}")
        else:
            rules.insert(0, "start: text | text calls | calls" if form.after_text else "start: text | calls")
            rules += ["text: TEXT", f"TEXT: {_text_rule(form)}"]
        rules += self._call_rules("call", form)
        for index, tool in enumerate(self.tools):
            if form.keywords:
                rules += _keyword_rules(f"arguments_{index}", tool.schema)
            else:
                rules.append(f"arguments_{index}: {_json_rule(tool.schema)}")
        return "\n".join([*rules, *(self._call_rules("plain", OURS) if others else ())])

    def _call_or(self, answer: Mapping[str, Any], form: CallFormat) -> dict[str, Any]:
        """The schema of an answer or one call, both of which are objects: no grammar tells two apart by their text."""
        _, key = json.loads(f"{form.head}{form.middle}null{form.tail}")
        options = [followable(dict(answer)), *(tool.call_schema(key) for tool in self.tools)]
        shared = {name: _merged(name, options) for name in ("$defs", "definitions")}  # references begin at the root
        return {"anyOf": options, **{name: value for name, value in shared.items() if value}}

    def _call_rules(self, rule: str, form: CallFormat) -> list[str]:
        """The rules of one call; its arguments are rules of their own."""
        lark, rules = _Lark(form), [f"{rule}: " + " | ".join(f"{rule}_{index}" for index in range(len(self.tools)))]
        for index, tool in enumerate(self.tools):
            head = lark.of(form.head + written_name(tool.name, form) + form.middle)
            rules.append(" ".join(filter(None, [f"{rule}_{index}: {head} arguments_{index}", lark.of(form.tail)])))
        return rules

    def teach(self, messages: Sequence[Mapping[str, Any]]) -> Roles:
        """The messages with a description of the tools; where the model may choose, an example shows how."""
        lines = "\n".join(tool.signature for tool in self.tools)
        told = instructed(
            messages,
            f"{TOOLS_OFFERED}\n{lines}\nTo call a function, reply only with JSON like "
            f'{{"name": "{self.tools[0].name}", "arguments": {{...}}}}. Use the values that the user gives. '
            "Otherwise reply with text.",
        )
        return told if self.required else [told[0], *map(dict, _EXAMPLE), *told[1:]]


class _Lark:
    """Texts of a form of calls as Lark has them, tokens of their own by their ids."""

    def __init__(self, form: CallFormat) -> None:
        self._tokens = form.tokens
        tokens = sorted(form.tokens, key=len, reverse=True)
        self._parts = re.compile(f"({'|'.join(map(re.escape, tokens))})" if tokens else "((?!))")

    def of(self, text: str) -> str:
        """The text; empty for an empty one."""
        parts = filter(None, self._parts.split(text))
        return " ".join(f"<[{self._tokens[part]}]>" if part in self._tokens else json.dumps(part) for part in parts)


def _text_rule(form: CallFormat) -> str:
    """Any text that does not begin as calls do; nor has their token spelt in it, where that may follow text."""
    if not form.after_text:
        return rf"/[^{re.escape(form.start[:1])}\s](?s:.)*/"
    token = next(token for token in form.tokens if form.start.startswith(token))
    nowhere = re.escape(token).replace("/", r"\/")
    beginning = r"[^{\s](?s:.)*/ & ~/```json\s*\{(?s:.)*" if len(spellings(form)) > 1 else "(?s:.)+"
    return f"/{beginning}/ & ~/(?s:.)*{nowhere}(?s:.)*/"


def _merged(key: str, schemas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    parts = [schema.get(key) for schema in reversed(schemas)]
    return {name: value for part in parts if isinstance(part, Mapping) for name, value in part.items()}


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"


def _keyword_rules(name: str, schema: Mapping[str, Any]) -> list[str]:
    """Arguments as keywords of Python, in the order of the schema; those that are not required may be left out."""
    fields, needed = schema["properties"], schema.get("required") or ()
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules = [f"{name}: {name}_first_0"]
    for place, (field_name, part) in enumerate(fields.items()):
        written = f"{json.dumps(field_name + '=')} {name}_value_{place} {name}_more_{place + 1}"
        for state, lead in (("first", ""), ("more", '", " ')):
            without = "" if field_name in needed else f" | {name}_{state}_{place + 1}"
            rules.append(f"{name}_{state}_{place}: {lead}{written}{without}")
        rules.append(f"{name}_value_{place}: {' | '.join(_literals(part, shared))}")
    return [*rules, *(f'{name}_{state}_{len(fields)}: ""' for state in ("first", "more"))]


def _literals(part: Any, shared: Mapping[str, Any]) -> list[str]:
    """Read a value: a literal of Python where that is not one of JSON."""
    kinds = part.get("type") if isinstance(part, dict) else None
    if kinds == "boolean" and "const" not in part and "enum" not in part:
        return ['"True"', '"False"']
    if kinds == "null":
        return ['"None"']
    if isinstance(part, dict) and isinstance(part.get("anyOf"), list) and set(part) <= {*_ABOUT, "anyOf"}:
        return [literal for option in part["anyOf"] for literal in _literals(option, shared)]
    return [_json_rule({**(part if isinstance(part, dict) else {}), **shared})]


_ABOUT: Final = ("title", "description", "default", "examples")
_LITERALS: Final = {"True": True, "False": False, "None": None}


def read_keywords(text: str) -> dict[str, Any]:
    """The arguments of a call whose form is keywords."""
    found, place, decoder = dict[str, Any](), 0, json.JSONDecoder()
    while place < len(text):
        name, _, rest = text[place:].partition("=")
        start = len(text) - len(rest)
        literal = next((word for word in _LITERALS if rest.startswith(word)), None)
        if literal is None:
            found[name], end = decoder.raw_decode(text, start)
        else:
            found[name], end = _LITERALS[literal], start + len(literal)
        place = end + len(", ")
    return found


def written_name(name: str, form: CallFormat) -> str:
    """A tool's name as a form has it, within quotation marks of JSON or without."""
    return json.dumps(name, ensure_ascii=False)[1:-1] if form.head.endswith('"') else name


def call_text(name: str, arguments: Any) -> str:
    """A call as a model whose template has no tools writes it, and reads it in the history of a conversation."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def call_turn(text: str, calls: Sequence[tuple[str | None, str, Any]]) -> dict[str, Any]:
    """An answer in the history of a conversation: its text and its calls, each an id, a name and arguments."""
    made = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]
    return {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}


def result_turn(call_id: str | None, name: str | None, text: str, *, failed: bool = False) -> dict[str, Any]:
    """A tool's result in the history of a conversation."""
    turn = {"role": "tool", "content": text, "name": name, "tool_call_id": call_id}
    return {**turn, "failed": True} if failed else turn


def arranged(messages: Sequence[Mapping[str, Any]], form: CallFormat = OURS) -> Roles:
    """Messages as a model's chat template takes them: with calls and results, or with those written out as text."""
    if form.templated:
        return list(_templated(messages, form))
    return [_as_text(message) for message in messages]


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of one of the three roles that every template knows."""
    if message["role"] == "tool":
        what = "Error" if message.get("failed") else "Result"
        return {"role": "user", "content": f"{what} of {message.get('name') or 'the tool'}: {message['content']}"}
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    written = [call_text(call["name"], call["arguments"]) for call in calls]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return (
        {**rest, "content": "\n".join([message["content"], *written] if message["content"] else written)}
        if calls
        else rest
    )


def _templated(messages: Sequence[Mapping[str, Any]], form: CallFormat) -> Iterator[dict[str, Any]]:
    """Messages in the form that templates agree on; a turn has one call where the template writes no more."""
    waiting: list[dict[str, Any]] = []
    """Calls that have no result yet."""
    held: list[dict[str, Any]] = []
    """Turns of one call each that follow the results of those before them."""
    for message in messages:
        if message["role"] == "tool":
            asked = next((call for call in waiting if call["id"] == _short(message["tool_call_id"])), None)
            call = asked or (waiting[0] if waiting else {"id": _short(message["tool_call_id"]), "function": {}})
            if call in waiting:
                waiting.remove(call)
            if (turn := next((turn for turn in held if turn["tool_calls"] == [call]), None)) is not None:
                held.remove(turn)
                yield turn
            said = f"Error: {message['content']}" if message.get("failed") else message["content"]
            name = message.get("name") or call["function"].get("name") or "tool"
            yield {"role": "tool", "content": said, "name": name, "tool_call_id": call["id"]}
            continue
        yield from held
        held = []
        calls = [_call_of(call, form) for call in message.get("tool_calls") or ()]
        if not calls:
            yield dict(message)
            continue
        waiting = list(calls)
        if form.separator is not None or len(calls) == 1:
            yield {**message, "tool_calls": calls}
            continue
        first, *others = calls
        yield {**message, "tool_calls": [first]}
        held = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in others]
    yield from held


def _call_of(call: Mapping[str, Any], form: CallFormat) -> dict[str, Any]:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if form.as_text:
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    elif not form.quoted and isinstance(arguments, Mapping):
        arguments = {
            key: json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value
            for key, value in arguments.items()
        }
    function = {"name": name, "arguments": arguments}
    return {"id": _short(call.get("id") or name), "type": "function", "function": function}


def _short(call_id: str | None) -> str:
    """An id of nine letters and digits, which is what Mistral's templates take; the same for the same."""
    return hashlib.sha256((call_id or "").encode()).hexdigest()[:9]


def instructed(messages: Sequence[Mapping[str, Any]], instructions: str) -> Roles:
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
    """The values or types among which a schema lets choose; empty if it does not."""
    values = part.get("enum", [part["const"]] if "const" in part else None)
    if isinstance(values, list):
        return [json.dumps(value, ensure_ascii=False) for value in values]
    options = part.get("anyOf") or part.get("oneOf")
    if isinstance(options, list):
        return [signature_of(option, root, depth) for option in options]
    kinds = part.get("type")
    return list(map(str, kinds)) if isinstance(kinds, list) else []


def _target(reference: str, root: Mapping[str, Any]) -> Any:
    """The target of a local reference; None if it has none."""
    part: Any = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        key = name.replace("~1", "/").replace("~0", "~")
        part = part.get(key) if isinstance(part, dict) and key else part
    return part
