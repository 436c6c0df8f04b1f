"""`POST /v1/responses`, stateless: items in, items out, whole or as a stream of events.

Nothing is stored: each call must contain the whole conversation. What needs a store, or a tool of OpenAI's own, is
refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

from pydantic import ConfigDict, WithJsonSchema

from polar_sdk.frameworks.tools import call_turn
from polar_sdk.reading import shown
from polar_server.openai import tools
from polar_server.openai.calls import Call, TurnBody, max_tokens_of
from polar_server.openai.fields import Only, Text, Tokens, invalid, unserved, unsupported
from polar_server.openai.messages import ROLES, check_count, read_call_of, read_result, text_of

if TYPE_CHECKING:
    from polar_sdk.frameworks.tools import Roles
    from polar_server.openai.calls import Rules

_DEFAULT_MAX_TOKENS: Final = 256
_STATELESS: Final = "nothing is stored here; send the whole conversation as input."
_LOGPROBS: Final = "message.output_text.logprobs"
_PARTS: Final = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_STORED: Final = "item_reference"
_INCLUDED: Final = (_LOGPROBS, "reasoning.encrypted_content")
"""Values of `include`; the second is accepted, although there is no reasoning."""
_Text = Annotated[str, Text()]


class ResponseBody(TurnBody):
    """A body of `POST /v1/responses`."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "input"]})

    other_names: ClassVar[Mapping[str, str]] = {
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
    }

    input: Annotated[
        Any, WithJsonSchema({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})
    ] = None
    instructions: _Text | None = None
    max_output_tokens: Tokens | None = None
    text: Annotated[Any, WithJsonSchema({"type": "object"})] = None
    include: Annotated[Any, WithJsonSchema({"type": "array", "items": {"enum": list(_INCLUDED)}})] = ()
    background: Annotated[None, Only(False, why="answers are not computed in the background.")] = None
    previous_response_id: Annotated[None, unserved(_STATELESS)] = None
    conversation: Annotated[None, unserved(_STATELESS)] = None
    prompt: Annotated[None, unserved("prompt templates are not stored here; send input and instructions.")] = None
    context_management: Annotated[None, unserved("a conversation is not shortened here; shorten it before.")] = None
    truncation: Annotated[None, Only("disabled", why="an input that is too long is refused; shorten it.")] = None
    moderation: Annotated[None, unserved("this engine judges no texts.")] = None
    reasoning: Annotated[
        None, Only(None, {}, {"effort": "none"}, why="this engine has no reasoning separate from the answer.")
    ] = None
    max_tool_calls: Tokens | None = None  # of OpenAI's own tools, of which there are none
    prompt_cache_options: Annotated[Any, WithJsonSchema({"type": "object"})] = None  # of its caches

    def call(self, rules: Rules) -> Call:
        """As `CallBody.call`."""
        if not isinstance(self.include, list | tuple):
            raise invalid("include", f"{shown(self.include)} is not a list.")
        for name in self.include:
            if name not in _INCLUDED:
                raise unsupported("include", f"{shown(name)}; use {_LOGPROBS}.")
        if self.input is None:
            raise invalid("input", "there is none; pass a text, or a list of items.", code="missing_required_parameter")
        answer_format, spelt = _format(self.text)
        form = tools.read_form(
            self.tools, self.tool_choice, answer_format, parallel=self.parallel_tool_calls, nested=False
        )
        self.stream_settings("include_obfuscation")  # usage always comes
        return self.answered(
            rules,
            _messages_of(self.input, self.instructions),
            form,
            max_tokens=max_tokens_of(self.max_output_tokens, _DEFAULT_MAX_TOKENS, rules, name="max_output_tokens"),
            length_param="max_output_tokens",
            include_usage=True,
            logprobs=self.scored(_LOGPROBS in self.include, f"include=[{_LOGPROBS!r}]"),
            format_param="text.format",
            repeated=self._repeated(spelt),
        )

    def _repeated(self, answer_format: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the call that its answer repeats."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls,
            "prompt_cache_key": self.prompt_cache_key,
            "safety_identifier": self.safety_identifier,
            "service_tier": self.service_tier or "default",
            "temperature": self.temperature,
            "text": {"format": dict(answer_format), "verbosity": "medium"},
            "tool_choice": "auto" if self.tool_choice is None else self.tool_choice,
            "tools": [{"description": None, "parameters": None, "strict": True, **tool} for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "user": self.user,
        }


def _format(value: Any) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """The format of an answer as chat completions spell it (None = text), and as it was spelt."""
    plain: dict[str, Any] = {"type": "text"}
    if value is None:
        return None, plain
    if not isinstance(value, dict):
        raise invalid("text", f"{shown(value)} is not an object.")
    if value.get("verbosity") not in (None, "medium"):
        raise unsupported("text.verbosity", "this engine has no such setting; leave it out.")
    for name in value:
        if name not in ("format", "verbosity"):
            raise invalid(f"text.{name[:64]}", "there is no such field; use format.", code="unknown_parameter")
    given = value.get("format")
    if isinstance(given, dict) and given.get("type") == "json_schema":
        inner = tools.check_schema("text.format", given, "schema")
        return {"type": "json_schema", "json_schema": inner}, given
    return tools.read_format("text.format", given), given or plain


# -- items -------------------------------------------------------------------------------------------------------------


def _messages_of(value: Any, instructions: str | None) -> Roles:
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
        call = read_call_of(item.get("call_id"), item, where, called, id_name="call_id")
        turn = call_turn("", [call])
        if roles and roles[-1]["role"] == "assistant":  # one turn: what it said, and what it called
            roles[-1].setdefault("tool_calls", []).extend(turn["tool_calls"])
        else:
            roles.append(turn)
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
