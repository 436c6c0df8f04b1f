"""Between LangChain and the engine: messages to the roles of a chat template, answers to messages and their metadata.

Text only: a block that is neither text nor a trace of tool use is refused, never silently dropped. Tokens go to
`usage_metadata` as integers only, since a float there breaks LangChain's own usage counter; money and compute go to the
response metadata. Knows no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage, ToolMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_polar.errors import langchain_errors
from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.cost import cost_facts, total_cost
from polar_sdk.frameworks.forms import listed_logprobs
from polar_sdk.frameworks.tools import call_turn, result_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polar_sdk import Chunk, Generation
    from polar_sdk.frameworks.call_reader import Piece
    from polar_sdk.frameworks.forms import AnswerForm
    from polar_sdk.frameworks.tools import Roles
    from polar_sdk.usage import UsageRecord


_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "tool": "tool",
    "function": "tool",
    "ai": "assistant",
    "assistant": "assistant",
}
_NOT_SPOKEN: Final = frozenset(
    {"reasoning", "thinking", "tool_call", "tool_use", "tool_call_chunk", "input_json_delta"}
)
"""Blocks of an earlier answer that are not part of its text; tool calls are read from `AIMessage.tool_calls`."""
UNKNOWN: Final = "unknown"
"""Model or router of a cache entry that another program wrote."""


def to_roles(messages: Sequence[BaseMessage]) -> Roles:
    """Map messages to roles and content, one for one, with calls of tools and their results.

    Raises:
        InvalidRequestError: A role or a content block that this model cannot read.
    """
    return [_turn(message, position) for position, message in enumerate(messages)]


def _turn(message: BaseMessage, position: int) -> dict[str, Any]:
    role, text = _role(message), _text(message, position)
    if isinstance(message, ToolMessage):
        return result_turn(message.tool_call_id, message.name, text, failed=message.status == "error")
    if role == "tool":
        return result_turn(None, getattr(message, "name", None), text)
    if isinstance(message, AIMessage):
        return call_turn(text, [(call["id"], call["name"], call["args"]) for call in message.tool_calls])
    return {"role": role, "content": text}


def _role(message: BaseMessage) -> str:
    name = message.role if isinstance(message, ChatMessage) else message.type.removesuffix("MessageChunk").lower()
    if name not in _ROLES:
        raise InvalidRequestError(
            f"a message of role {name!r} cannot be put into a chat template.",
            hint="Use system, human (user), ai (assistant) or tool messages.",
        )
    return _ROLES[name]


def _text(message: BaseMessage, position: int) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(_block(block, message, position) for block in message.content)


def _block(block: str | dict[Any, Any], message: BaseMessage, position: int) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type", "text" if "text" in block else "unknown")
    if kind == "text":
        return str(block.get("text", ""))
    if isinstance(message, AIMessage) and kind in _NOT_SPOKEN:
        return ""
    if kind == "tool_result":  # Anthropic's way to hand back what a tool said
        content = block.get("content") or ""
        parts = [content] if isinstance(content, str) else content
        return "Result of the tool: " + "".join(_block(part, message, position) for part in parts)
    raise InvalidRequestError(
        f"a content block of type {kind!r} in message {position + 1} ({message.type}) cannot be read: "
        "this model reads text only.",
        hint="Put its content into words, or use a model that accepts such input.",
    )


def usage_metadata(record: UsageRecord) -> UsageMetadata:
    """Tokens of one request, as LangChain counts them: `cache_read` is part of `input_tokens`."""
    tokens = record.tokens
    usage = UsageMetadata(
        input_tokens=tokens.input, output_tokens=tokens.output, total_tokens=tokens.input + tokens.output
    )
    if tokens.cached:
        usage["input_token_details"] = InputTokenDetails(cache_read=tokens.cached)
    return usage


def response_metadata(generation: Generation, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Model, finish reason, cost and compute of one answer, JSON-like; and whether it matches its schema, if any."""
    record = generation.usage
    facts = {
        "model_name": record.model,
        "finish_reason": generation.finish_reason,
        **listed_logprobs(generation, decode),
        **cost_facts(record, generation.receipt),
    }
    if generation.complete is not None:
        facts["complete"] = generation.complete
    return facts


def totals(generations: Sequence[Generation]) -> dict[str, Any]:
    """Sums over the prompts of one call, for `LLMResult.llm_output`.

    They are all under `token_usage`, the one key that LangChain empties for every prompt but the first, so that a
    callback that adds up results counts them once.
    """
    records = [generation.usage for generation in generations]
    cost = total_cost(generation.receipt for generation in generations)
    return {
        "model_name": records[0].model if records else UNKNOWN,
        "request_ids": [record.request_id for record in records],
        "token_usage": {
            "prompt_tokens": sum(record.tokens.input for record in records),
            "completion_tokens": sum(record.tokens.output for record in records),
            "total_tokens": sum(record.tokens.input + record.tokens.output for record in records),
            "flops": sum(record.flops.total for record in records),
            "identity_flops": sum(record.identity_flops for record in records),
            "cost": None if cost is None else float(cost),
        },
    }


class AnswerReader:
    """Reads one answer of a given form.

    Args:
        form: The form.
        decode: Text of token ids.
    """

    def __init__(self, form: AnswerForm, decode: Callable[[list[int]], str]) -> None:
        self._form, self._reader, self._decode = form, form.reader(), decode

    def result(self, generation: Generation, *others: Generation) -> ChatResult:
        """A whole answer, and others to the same messages.

        Raises:
            IncompleteAnswerError: A call was cut off.
        """
        self._reader.push(generation.text)
        self._reader.finish()
        self._check(generation)
        message = AIMessage(
            content=self._reader.text,
            tool_calls=[tool_call(name=call.name, args=call.values() or {}, id=call.id) for call in self._reader.calls],
            usage_metadata=usage_metadata(generation.usage),
            response_metadata=response_metadata(generation, self._decode),
        )
        rest = [AnswerReader(self._form, self._decode).result(other).generations[0] for other in others]
        return ChatResult(generations=[ChatGeneration(message=message), *rest])

    def chunks(self, chunk: Chunk) -> Iterator[ChatGenerationChunk]:
        """Chunks that one piece of a streamed answer completes; the last one has usage and cost.

        Raises:
            IncompleteAnswerError: A call was cut off; after the last chunk.
        """
        pieces = self._reader.push(chunk.text)
        if chunk.generation is None:
            if pieces:
                yield ChatGenerationChunk(message=self._message(pieces))
            return
        message = self._message([*pieces, *self._reader.finish()])
        message.usage_metadata = usage_metadata(chunk.generation.usage)
        message.response_metadata = response_metadata(chunk.generation, self._decode)
        message.chunk_position = "last"
        yield ChatGenerationChunk(message=message)
        self._check(chunk.generation)

    def _message(self, pieces: list[Piece]) -> AIMessageChunk:
        return AIMessageChunk(
            content="".join(piece for piece in pieces if isinstance(piece, str)),
            tool_call_chunks=[
                tool_call_chunk(
                    name=name, args=arguments, id=self._reader.calls[index].id if name else None, index=index
                )
                for index, name, arguments in (piece for piece in pieces if not isinstance(piece, str))
            ],
        )

    def _check(self, generation: Generation) -> None:
        with langchain_errors():
            self._form.check(self._reader.calls, generation)
