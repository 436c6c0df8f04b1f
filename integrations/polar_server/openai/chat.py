"""`POST /v1/chat/completions`: messages in, a message out, whole or in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_server.openai import calls, tools
from polar_server.openai.calls import Call, Rules, unserved
from polar_server.openai.fields import Body, Field, anything, flag, integer, invalid, only, text
from polar_server.openai.messages import read_messages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_server.openai.choices import Turn
    from polar_server.openai.logprobs import Entry

_OLDER: Final = "functions are the older form of tools; use tools and tool_choice."
_DEFAULT_MAX_TOKENS: Final = 256

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
    **tools.FIELDS,
    "function_call": only("none", "auto", why=_OLDER),
    "functions": unserved(_OLDER),
    "audio": unserved("this engine writes text only."),
    "prediction": unserved("this engine has no speculative decoding."),
    "web_search_options": unserved("this engine has no tools of its own."),
    **calls.WITHOUT_EFFECT,
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
    form = tools.read_form(
        body.get("tools"),
        body.get("tool_choice"),
        tools.read_format("response_format", body.get("response_format")),
        parallel=body.get("parallel_tool_calls", False),
        nested=True,
    )
    options.update(form.options())
    stream, include_usage = calls.streaming(body, rules)
    return Call(
        model=body.get("model"),
        asks=calls.choices_of([form.teach(read_messages(body.get("messages")))], options, body, rules),
        prompts=1,
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs,
        form=form,
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


class ChatShape:
    """How chat answers look."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"
    opening = True
    """Whether a stream begins with a piece that says the role."""

    @staticmethod
    def choice(index: int, turn: Turn, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """One choice of a whole answer."""
        called = {"content": turn.text or None, "tool_calls": list(turn.calls)}
        said = called if turn.calls else {"content": turn.text}
        return {
            "index": index,
            "message": {"role": "assistant", **said, "refusal": None},
            "logprobs": _shown(logprobs),
            "finish_reason": turn.finish,
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
    def calling(index: int, call: dict[str, Any]) -> dict[str, Any]:
        """A piece of a call of a tool."""
        return {"index": index, "delta": {"tool_calls": [call]}, "logprobs": None, "finish_reason": None}

    @staticmethod
    def finished(index: int, finish: str) -> dict[str, Any]:
        """The last piece of a choice."""
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish}


def _shown(logprobs: Sequence[Entry] | None) -> dict[str, Any] | None:
    return None if logprobs is None else {"content": [entry.wire for entry in logprobs], "refusal": None}
