"""`POST /v1/completions`: a text goes on, whole or in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_sdk.reading import shown
from polar_server.openai import calls
from polar_server.openai.calls import Call, Rules
from polar_server.openai.fields import Body, Field, anything, flag, integer, invalid, only, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_server.openai.choices import Turn
    from polar_server.openai.logprobs import Entry

_DEFAULT_MAX_TOKENS: Final = 16
"""As OpenAI documents it for this endpoint."""

FIELDS: Final[Mapping[str, Field]] = {
    **calls.SHARED,
    "max_tokens": integer(0, 2**31 - 1),
    "prompt": anything({"oneOf": [{"type": "string"}, {"type": "array"}]}),
    "echo": flag(),
    "logprobs": integer(0, 20),
    "best_of": integer(1, 128),
    "suffix": only("", why="this engine only goes on after a text."),
}


def read_call(body: Body, rules: Rules) -> Call:
    """What a body asks of the engine.

    Raises:
        ApiError: It asks for what does not exist or cannot be served.
    """
    calls.require_model(body)
    options = calls.options_of(body, rules)
    options["template"] = "raw"
    asked = calls.max_tokens_of(body.get("max_tokens"), _DEFAULT_MAX_TOKENS, rules)
    options["max_tokens"] = _DEFAULT_MAX_TOKENS if asked is None else max(asked, 1)
    if asked == 0 and not (body.get("echo") and body.get("logprobs") is not None):
        raise invalid("max_tokens", "0 goes with echo and logprobs only, to score a prompt; use 1 or more.")
    options["logprobs"] = body.get("logprobs")
    if body.get("best_of", body.get("n", 1)) != body.get("n", 1):
        raise unsupported("best_of", "answers are not compared; leave it out or make it equal to n.")
    prompts = _prompts(body.get("prompt"))
    stream, include_usage = calls.streaming(body, rules)
    if body.get("echo") and body.get("logprobs") is not None:
        options["prompt_logprobs"] = body.get("logprobs")
        if stream:
            raise unsupported("stream", "log-probabilities of the prompt come with a whole answer only.")
    count = body.get("n", 1)
    return Call(
        model=body.get("model"),
        asks=calls.choices_of(prompts, options, body, rules),
        prompts=len(prompts),
        stream=stream,
        include_usage=include_usage,
        logprobs=body.get("logprobs"),
        echo=[prompt for prompt in prompts for _ in range(count)] if body.get("echo") else (),
        only_echo=asked == 0,
    )


def _prompts(value: Any) -> list[str | list[int]]:
    """Texts or token ids: one, or several."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        value = [value]
    several = value if isinstance(value, list) else [value]
    if not several or value is None:
        raise invalid("prompt", "there is none; pass a text, or a list of texts.", code="missing_required_parameter")
    return [_prompt(prompt) for prompt in several]


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise invalid("prompt", f"{shown(prompt)} is neither text nor a list of token ids.")


class TextShape:
    """How text completions look; a piece of a stream looks like the whole."""

    prefix = "cmpl"
    whole = piece = "text_completion"
    opening = False

    @staticmethod
    def choice(index: int, turn: Turn, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """One choice of a whole answer."""
        return _choice(index, turn.text, logprobs, turn.finish)

    @staticmethod
    def opened(index: int) -> dict[str, Any]:
        """Not sent: nothing opens a text completion."""
        return _choice(index)

    @staticmethod
    def delta(index: int, text: str, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """A piece of a choice."""
        return _choice(index, text, logprobs)

    @staticmethod
    def calling(index: int, call: dict[str, Any]) -> dict[str, Any]:
        """Not sent: a text completion calls no tools."""
        return _choice(index)

    @staticmethod
    def finished(index: int, finish: str) -> dict[str, Any]:
        """The last piece of a choice."""
        return _choice(index, finish=finish)


def _choice(
    index: int, text: str = "", logprobs: Sequence[Entry] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": _logprobs(logprobs), "finish_reason": finish}


def _logprobs(entries: Sequence[Entry] | None) -> dict[str, Any] | None:
    """Log-probabilities as this older endpoint lists them: by column."""
    if entries is None:
        return None
    return {
        "tokens": [entry.wire["token"] for entry in entries],
        "token_logprobs": [entry.wire["logprob"] for entry in entries],
        "top_logprobs": [_top(entry.wire) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _top(entry: Mapping[str, Any]) -> dict[str, float] | None:
    """The likeliest tokens at a place; None at the first one of a prompt, before which there is nothing."""
    if entry["logprob"] is None:
        return None
    return {top["token"]: top["logprob"] for top in entry["top_logprobs"]}
