"""Answers of the engine as LangChain's messages: text, calls of tools, or both in pieces. Knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_polar._messages import response_metadata, usage_metadata
from langchain_polar.errors import langchain_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polar_sdk
    from polar_sdk.frameworks.forms import AnswerForm
    from polar_sdk.frameworks.tools import Piece


class AnswerReader:
    """Reads one answer of a given form."""

    def __init__(self, form: AnswerForm) -> None:
        self._form, self._reader = form, form.reader()
        self._ids: list[str] = []

    def result(self, generation: polar_sdk.Generation) -> ChatResult:
        """A whole answer.

        Raises:
            IncompleteAnswerError: A call was cut off.
        """
        self._reader.push(generation.text)
        self._reader.finish()
        self._check(generation)
        message = AIMessage(
            content=self._reader.text,
            tool_calls=[
                tool_call(name=call.name, args=call.values() or {}, id=self._id(index))
                for index, call in enumerate(self._reader.calls)
            ],
            usage_metadata=usage_metadata(generation.usage),
            response_metadata=response_metadata(generation),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def chunks(self, chunk: polar_sdk.Chunk) -> Iterator[ChatGenerationChunk]:
        """What one piece of a streamed answer makes certain; the last one has usage and cost.

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
        message.response_metadata = response_metadata(chunk.generation)
        message.chunk_position = "last"
        yield ChatGenerationChunk(message=message)
        self._check(chunk.generation)

    def _message(self, pieces: list[Piece]) -> AIMessageChunk:
        return AIMessageChunk(
            content="".join(piece for piece in pieces if isinstance(piece, str)),
            tool_call_chunks=[
                tool_call_chunk(name=name, args=arguments, id=self._id(index) if name else None, index=index)
                for index, name, arguments in (piece for piece in pieces if not isinstance(piece, str))
            ],
        )

    def _check(self, generation: polar_sdk.Generation) -> None:
        with langchain_errors():
            self._form.check(self._reader.calls, generation)

    def _id(self, index: int) -> str:
        while len(self._ids) <= index:
            self._ids.append(f"call_{uuid4().hex}")
        return self._ids[index]
