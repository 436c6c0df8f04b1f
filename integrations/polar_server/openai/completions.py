"""`POST /v1/completions`: a text is continued, whole or in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import ConfigDict, Field, WithJsonSchema

from polar_sdk.reading import shown
from polar_server.openai import calls
from polar_server.openai.calls import Call, ChoicesBody
from polar_server.openai.fields import MAX_TOKENS, Only, Top, invalid, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_server.openai.calls import Rules
    from polar_server.openai.choices import Turn
    from polar_server.openai.logprobs import Entry

_DEFAULT_MAX_TOKENS: Final = 16
"""As OpenAI documents it for this endpoint."""


class TextBody(ChoicesBody):
    """A body of `POST /v1/completions`."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "prompt"]})

    prompt: Annotated[Any, WithJsonSchema({"oneOf": [{"type": "string"}, {"type": "array"}]})] = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    echo: bool = False
    logprobs: Top | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: Annotated[None, Only("", why="this engine only continues a text.")] = None

    def call(self, rules: Rules) -> Call:
        """As `CallBody.call`."""
        options = calls.options_of(self, rules)
        options["template"] = "raw"
        asked = calls.max_tokens_of(self.max_tokens, _DEFAULT_MAX_TOKENS, rules)
        options["max_tokens"] = _DEFAULT_MAX_TOKENS if asked is None else max(asked, 1)
        scores = self.echo and self.logprobs is not None
        if asked == 0 and not scores:
            raise invalid("max_tokens", "0 goes with echo and logprobs only, to score a prompt; use 1 or more.")
        options["logprobs"] = self.logprobs
        if self.best_of not in (None, self.n):
            raise unsupported("best_of", "answers are not compared; leave it out or make it equal to n.")
        prompts = _prompts(self.prompt)
        streamed: Any = self.streamed(rules)
        if scores:
            options["prompt_logprobs"] = max(self.logprobs or 0, self.prompt_logprobs or 0)
            if self.stream:
                raise unsupported(
                    "stream", "log-probabilities of the prompt are only in whole answers, not in streams."
                )
        return Call(
            model=self.model,
            asks=calls.choices_of(prompts, options, self, rules, count=self.n),
            prompts=len(prompts),
            stream=self.stream,
            **streamed,
            constraint=self.constraint,
            logprobs=self.logprobs,
            echo=[prompt for prompt in prompts for _ in range(self.n)] if self.echo else (),
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
    """The form of text completions; a piece of a stream looks like the whole."""

    prefix = "cmpl"
    whole = piece = "text_completion"
    opening = False

    @staticmethod
    def choice(index: int, turn: Turn, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """One choice of a whole answer."""
        return TextShape.part(index, {"content": turn.text}, logprobs, turn.finish)

    @staticmethod
    def part(
        index: int, delta: dict[str, Any], logprobs: Sequence[Entry] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """A piece of a choice; no tools are called here."""
        text = delta.get("content", "")
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
