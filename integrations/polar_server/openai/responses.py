"""`POST /v1/responses`, stateless: items in, items out, whole or as a stream of events.

Nothing is stored: a conversation comes as a whole with each call. What needs a store, or a tool of OpenAI's own, is
refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_sdk.frameworks.tools import turn_text
from polar_sdk.reading import shown
from polar_server.openai import calls, tools
from polar_server.openai.calls import Call, Rules, unserved
from polar_server.openai.fields import Body, Field, anything, integer, invalid, only, text, unsupported
from polar_server.openai.messages import ROLES, check_count, read_call_of, read_result, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_sdk.frameworks.tools import Roles

_DEFAULT_MAX_TOKENS: Final = 256
_STATELESS: Final = "nothing is stored here; send the whole conversation as input."
_LOGPROBS: Final = "message.output_text.logprobs"
_PARTS: Final = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_STORED: Final = "item_reference"
_INCLUDED: Final = (_LOGPROBS, "reasoning.encrypted_content")
"""What may be asked for; there is no reasoning that the second could be of."""
_SHARED: Final = (
    *("model", "temperature", "top_p", "seed", "stream", "user", "metadata"),
    *("compute", "program", "tags"),
)

FIELDS: Final[Mapping[str, Field]] = {
    **{name: calls.SHARED[name] for name in _SHARED},
    **tools.FIELDS,
    "input": anything({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    "instructions": text(),
    "max_output_tokens": integer(1, 2**31 - 1),
    "text": anything({"type": "object"}),
    "include": anything({"type": "array", "items": {"enum": list(_INCLUDED)}}),
    "top_logprobs": integer(0, 20),
    "service_tier": text(50),
    "stream_options": anything({"type": "object"}),
    "store": only(False, why="answers are not stored; leave it out or pass false."),
    "background": only(False, why="an answer is computed while its client waits."),
    "previous_response_id": unserved(_STATELESS),
    "conversation": unserved(_STATELESS),
    "prompt": unserved("prompt templates are not stored here; send input and instructions."),
    "context_management": unserved("a conversation is not shortened here; shorten it before."),
    "truncation": only("disabled", why="an input that is too long is refused; shorten it."),
    "moderation": unserved("this engine judges no texts."),
    "reasoning": only(None, {}, {"effort": "none"}, why="this engine does not reason apart from its answer."),
    "max_tool_calls": integer(1, 2**31 - 1),  # of OpenAI's own tools, of which there are none
    **calls.WITHOUT_EFFECT,
    "prompt_cache_options": anything({"type": "object"}),
}


def read_call(body: Body, rules: Rules) -> Call:
    """What a body asks of the engine.

    Raises:
        ApiError: It asks for what does not exist or cannot be served.
    """
    calls.require_model(body)
    options = calls.options_of(body, rules)
    options["template"] = "chat"
    asked = body.get("max_output_tokens")
    options["max_tokens"] = calls.max_tokens_of(asked, _DEFAULT_MAX_TOKENS, rules, name="max_output_tokens")
    options["logprobs"] = logprobs = _logprobs(body)
    answer_format, spelt = _format(body.get("text"))
    parallel = body.get("parallel_tool_calls", False)
    form = tools.read_form(body.get("tools"), body.get("tool_choice"), answer_format, parallel=parallel, nested=False)
    options.update(form.options())
    _check_stream_options(body)
    if body.get("input") is None:
        raise invalid("input", "there is none; pass a text, or a list of items.", code="missing_required_parameter")
    roles = _messages_of(body.get("input"), body.get("instructions"))
    return Call(
        model=body.get("model"),
        asks=calls.choices_of([form.teach(roles)], options, body, rules),
        prompts=1,
        stream=body.get("stream", False),
        include_usage=True,
        logprobs=logprobs,
        form=form,
        format_param="text.format",
        repeated=_repeated(body, spelt),
    )


def _logprobs(body: Body) -> int | None:
    include, top = body.get("include", []), body.get("top_logprobs")
    if not isinstance(include, list):
        raise invalid("include", f"{shown(include)} is not a list.")
    for name in include:
        if name not in _INCLUDED:
            raise unsupported("include", f"{shown(name)}; use {_LOGPROBS}.")
    if _LOGPROBS not in include:
        if top:
            raise invalid("top_logprobs", f"it needs include=[{_LOGPROBS!r}].")
        return None
    return top or 0


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


def _check_stream_options(body: Body) -> None:
    options = body.get("stream_options")
    if options is None:
        return
    if not body.get("stream", False):
        raise invalid("stream_options", "it goes with stream=true only.")
    if not isinstance(options, dict) or options not in ({}, {"include_obfuscation": False}):
        raise unsupported("stream_options", f"{shown(options)}: usage always comes, and obfuscation never.")


def _repeated(body: Body, answer_format: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer says of its call."""
    return {
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "metadata": body.get("metadata", {}),
        "parallel_tool_calls": body.get("parallel_tool_calls", False),
        "prompt_cache_key": body.get("prompt_cache_key"),
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": body.get("service_tier", "default"),
        "temperature": body.get("temperature", 0.0),
        "text": {"format": dict(answer_format), "verbosity": "medium"},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": [{"description": None, "parameters": None, "strict": True, **tool} for tool in body.get("tools", ())],
        "top_logprobs": body.get("top_logprobs", 0),
        "top_p": body.get("top_p", 1.0),
        "user": body.get("user"),
    }


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
