"""`POST /v1/chat/completions`: messages in, a message out, whole or in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_sdk.reading import shown
from polar_server.openai import calls
from polar_server.openai.calls import Call, Rules, unserved
from polar_server.openai.fields import Body, Field, anything, flag, integer, invalid, one_of, only, text, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_server.openai.logprobs import Entry

_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOLS: Final = "this engine writes text only; leave it out."
_DEFAULT_MAX_TOKENS: Final = 256
_MAX_MESSAGES: Final = 10_000

FIELDS: Final[Mapping[str, Field]] = {
    **calls.SHARED,
    "messages": anything({"type": "array", "items": {"type": "object"}, "minItems": 1}),
    "max_completion_tokens": integer(1, 2**31 - 1),
    "logprobs": flag(),
    "top_logprobs": integer(0, 20),
    "response_format": anything({"type": "object"}),
    "service_tier": text(50),
    "store": only(False, why="answers are not stored; leave it out or pass false."),
    "modalities": only(["text"], why="this engine reads and writes text only."),
    "verbosity": only("medium", why="this engine has no such setting; leave it out."),
    "reasoning_effort": only("none", why="this engine does not reason apart from its answer; leave it out."),
    "parallel_tool_calls": anything({"type": "boolean"}),
    "tool_choice": only("none", "auto", why=_TOOLS),
    "tools": unserved(_TOOLS),
    "function_call": only("none", "auto", why=_TOOLS),
    "functions": unserved(_TOOLS),
    "audio": unserved("this engine writes text only."),
    "prediction": unserved("this engine has no speculative decoding."),
    "web_search_options": unserved("this engine has no tools of its own."),
    # For OpenAI's own caches and abuse checks: they change no answer.
    "prompt_cache_key": text(1_000),
    "prompt_cache_retention": one_of("in_memory", "in-memory", "24h"),
    "safety_identifier": text(1_000),
}


def read_call(body: Body, rules: Rules) -> Call:
    """What a body asks of the engine.

    Raises:
        ApiError: It asks for what does not exist or cannot be served.
    """
    calls.require_model(body)
    options = calls.options_of(body, rules)
    options["template"] = "chat"
    options["max_tokens"] = calls.max_tokens_of(_max_tokens(body), _DEFAULT_MAX_TOKENS, rules)
    logprobs = _logprobs(body)
    options["logprobs"] = logprobs
    options["schema"] = _schema(body.get("response_format"))
    stream, include_usage = calls.streaming(body, rules)
    return Call(
        model=body.get("model"),
        asks=calls.choices_of([_messages(body.get("messages"))], options, body, rules),
        prompts=1,
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs,
    )


def _max_tokens(body: Body) -> int | None:
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens", f"it says {old}, max_completion_tokens {new}; give one of them.")
    chosen: int | None = old if new is None else new
    return chosen


def _logprobs(body: Body) -> int | None:
    wanted, top = body.get("logprobs", False), body.get("top_logprobs")
    if not wanted:
        if top:
            raise invalid("top_logprobs", "it needs logprobs=true.")
        return None
    return top or 0


def _schema(value: Any) -> dict[str, Any] | None:
    """The JSON schema that an answer must match, or None where it is plain text."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise invalid("response_format", f"{shown(kind or value)} is unknown; use text, json_object or json_schema.")
    given = value.get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise invalid("response_format", "json_schema.schema must be a JSON schema, which is an object.")
    return schema


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise invalid("messages", "there must be a list of at least one message.")
    if len(value) > _MAX_MESSAGES:
        raise invalid("messages", f"there are {len(value):,}; use at most {_MAX_MESSAGES:,}.")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise invalid(where, f"{shown(message)} is not an object.")
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise unsupported(where, "tools are not supported: this engine writes text only.")
    if role not in _ROLES:
        raise invalid(f"{where}.role", f"{shown(role)} is unknown; use {', '.join(_ROLES)}.")
    if message.get("audio") is not None:
        raise unsupported(f"{where}.audio", "this engine reads text only.")
    read = {"role": _ROLES[role], "content": _content(message.get("content"), f"{where}.content")}
    if (name := message.get("name")) is not None:
        read["name"] = _NAME.check(f"{where}.name", name)  # the chat template decides what becomes of it
    return read


_NAME: Final = text(64)


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"{shown(content)} is neither text nor a list of text parts.")
    return "".join(_part(part, f"{where}[{place}]") for place, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "refusal") and isinstance(part.get(kind), str):
        return str(part[kind])
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise unsupported(where, f"a part of type {shown(kind)}: this engine reads text only.")
    raise invalid(where, f"{shown(part)} is not a text part.")


class ChatShape:
    """How chat answers look."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"
    opening = True
    """Whether a stream begins with a piece that says the role."""

    @staticmethod
    def choice(index: int, text: str, finish: str, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """One choice of a whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _shown(logprobs),
            "finish_reason": finish,
        }

    @staticmethod
    def opened(index: int) -> dict[str, Any]:
        """The first piece of a choice."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    @staticmethod
    def delta(index: int, text: str, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """A piece of a choice."""
        return {"index": index, "delta": {"content": text}, "logprobs": _shown(logprobs), "finish_reason": None}

    @staticmethod
    def finished(index: int, finish: str) -> dict[str, Any]:
        """The last piece of a choice."""
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish}


def _shown(logprobs: Sequence[Entry] | None) -> dict[str, Any] | None:
    return None if logprobs is None else {"content": [entry.wire for entry in logprobs], "refusal": None}
