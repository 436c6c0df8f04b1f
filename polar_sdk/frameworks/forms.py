"""The form of an answer: free text, tool calls, JSON by a schema, or either of the last two.

Frameworks use OpenAI's `tools`, `tool_choice`, `parallel_tool_calls` and `response_format`; the engine takes a schema
or a grammar, and the prompt says what to write. Knows no framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import IncompleteAnswerError, InvalidRequestError
from polar_sdk.frameworks.call_reader import CallReader
from polar_sdk.frameworks.tools import OURS, Tool, ToolUse, arranged, instructed, schema_instructions
from polar_sdk.request.constraint import json_schema

if TYPE_CHECKING:
    from polar_sdk import Generation
    from polar_sdk.frameworks.call_reader import Call
    from polar_sdk.frameworks.tools import Roles
    from polar_sdk.request.call_format import CallFormat
    from polar_sdk.request.options import RequestOptions


FORM_OPTIONS: Final = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


@dataclass(frozen=True)
class AnswerForm:
    """The form of one answer."""

    use: ToolUse | None = None
    schema: Mapping[str, Any] | None = None
    """JSON schema of an answer that is not a call; None = text."""
    instruct: bool = True
    """Whether the prompt describes the schema."""
    calls: CallFormat = OURS
    """How calls are written."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> AnswerForm:
        """Read the options of a call.

        Raises:
            InvalidRequestError: One of them is not what OpenAI's interface takes.
        """
        tools = options.get("tools") or ()
        if isinstance(tools, Mapping | str) or not isinstance(tools, Sequence):
            raise InvalidRequestError(f"tools={str(tools)[:80]!r} is not a list of tools; pass one.")
        use = ToolUse.choose(
            [Tool.of_openai(tool) for tool in tools],
            options.get("tool_choice"),
            parallel=bool(options.get("parallel_tool_calls")),
        )
        schema, instruct = _read_format(options.get("response_format"))
        return cls(use, None if use is not None and use.required else schema, instruct)

    def written_as(self, form: CallFormat | None) -> AnswerForm:
        """The same with calls in the form of a model's template; None = it has none."""
        return replace(self, calls=form or OURS)

    def teach(self, messages: Sequence[Mapping[str, Any]]) -> Roles:
        """The messages as the model's template takes them, with instructions on the form."""
        roles = arranged(messages, self.calls)
        if self.use is not None and not self.calls.templated:
            roles = self.use.teach(roles)
        if self.schema is not None and self.instruct:
            roles = instructed(roles, schema_instructions(self.schema))
        return roles

    @property
    def shown(self) -> list[dict[str, Any]] | None:
        """Tools that the template shows."""
        return [tool.shown for tool in self.use.tools] if self.use is not None and self.calls.templated else None

    def options(self) -> RequestOptions:
        """Options that make the engine enforce the form."""
        if self.use is None:
            return {} if self.schema is None else {**_FREE, "schema": self.schema}
        return {**_FREE, "grammar": self.use.grammar(self.calls, self.schema), "tools": self.shown}

    def reader(self) -> CallReader:
        """A reader of the answer."""
        return CallReader(self.use, self.calls)

    @staticmethod
    def check(calls: Sequence[Call], generation: Generation) -> None:
        """Refuse calls that were cut off.

        Raises:
            IncompleteAnswerError: The last one was.
        """
        if generation.complete is False and any(not call.complete for call in calls):
            raise IncompleteAnswerError(
                f"the call of {calls[-1].name} was cut off after {len(generation.token_ids)} tokens "
                f"(finish_reason={generation.finish_reason}).",
                hint="Raise max_tokens, or remove the stop string.",
                text=generation.text,
            )


_FREE: Final[RequestOptions] = {"schema": None, "regex": None, "choice": None, "grammar": None}


def listed_logprobs(generation: Generation, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """`logprobs` as OpenAI's chat has them; empty if the request asks for none."""
    if generation.logprobs is None:
        return {}

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": decode([token]), "logprob": logprob}

    content = [
        {**one(scored.token, scored.logprob), "top_logprobs": [one(*pair) for pair in scored.top]}
        for scored in generation.logprobs
    ]
    return {"logprobs": {"content": content}}


def _read_format(value: Any) -> tuple[Mapping[str, Any] | None, bool]:
    """Schema of a `response_format`, and whether the prompt must describe it."""
    if value is None:
        return None, True
    if not isinstance(value, Mapping):
        return json_schema(value), True
    kind = value.get("type")
    if kind == "text":
        return None, True
    if kind == "json_object":
        schema = value.get("schema") or _ANY_OBJECT
        if not isinstance(schema, Mapping):
            raise InvalidRequestError(f"response_format['schema']={str(schema)[:80]!r} is not a JSON schema; pass one.")
        return schema, False
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, Mapping):
            raise InvalidRequestError("response_format has no schema; put it under response_format['json_schema'].")
        about = inner.get("description") if isinstance(inner, Mapping) else None
        return ({"description": about, **schema} if about else schema), True
    return dict(value), True
