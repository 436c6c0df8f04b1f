"""`POST /v1/chat/completions`: messages in, a message out, whole or in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import ConfigDict, WithJsonSchema

from polar_server.openai import tools
from polar_server.openai.calls import Call, ChoicesBody, TurnBody, max_tokens_of
from polar_server.openai.fields import Only, Tokens, invalid, unserved
from polar_server.openai.messages import read_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_server.openai.calls import Rules
    from polar_server.openai.choices import Turn
    from polar_server.openai.logprobs import Entry

_OLDER: Final = "functions are the older form of tools; use tools and tool_choice."
_DEFAULT_MAX_TOKENS: Final = 256


class ChatBody(ChoicesBody, TurnBody):
    """A body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "messages"]})

    messages: Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "object"}, "minItems": 1})] = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool = False
    response_format: Annotated[Any, WithJsonSchema({"type": "object"})] = None
    modalities: Annotated[None, Only(["text"], why="this engine reads and writes text only.")] = None
    verbosity: Annotated[None, Only("medium", why="this engine has no such setting; leave it out.")] = None
    reasoning_effort: Annotated[
        None, Only("none", why="this engine has no reasoning separate from the answer; leave it out.")
    ] = None
    function_call: Annotated[None, Only("none", "auto", why=_OLDER)] = None
    functions: Annotated[None, unserved(_OLDER)] = None
    audio: Annotated[None, unserved("this engine writes text only.")] = None
    prediction: Annotated[
        None, unserved("drafts of a client are not taken; the engine makes its own, see speculate.")
    ] = None
    web_search_options: Annotated[None, unserved("this engine has no tools of its own.")] = None

    def call(self, rules: Rules) -> Call:
        """As `CallBody.call`."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise invalid("max_tokens", f"it says {old}, max_completion_tokens {new}; give one of them.")
        length = "max_tokens" if new is None else "max_completion_tokens"
        form = tools.read_form(
            self.tools,
            self.tool_choice,
            tools.read_format("response_format", self.response_format),
            parallel=self.parallel_tool_calls,
            nested=True,
        )
        return self.answered(
            rules,
            read_messages(self.messages),
            form,
            max_tokens=max_tokens_of(old if new is None else new, _DEFAULT_MAX_TOKENS, rules, name=length),
            length_param=length,
            count=self.n,
            **self.streamed(rules),
            logprobs=self.scored(self.logprobs, "logprobs=true"),
        )


class ChatShape:
    """The form of chat answers."""

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
    def part(
        index: int, delta: dict[str, Any], logprobs: Sequence[Entry] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """A piece of a choice."""
        return {"index": index, "delta": delta, "logprobs": _shown(logprobs), "finish_reason": finish}


def _shown(logprobs: Sequence[Entry] | None) -> dict[str, Any] | None:
    return None if logprobs is None else {"content": [entry.wire for entry in logprobs], "refusal": None}
