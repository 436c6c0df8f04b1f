"""Chat and text completions as JSON: whole, or as a stream of chunks with the same content.

A choice is text or tool calls; log-probabilities belong to the text that the model wrote, calls included. Knows the two
endpoints by their shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from polar_sdk import Chunk
from polar_server.errors import api_error
from polar_server.http.exchange import packed_json
from polar_server.openai.logprobs import LEAST, Entry, ShownTokens, prompt_entries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk import Generation
    from polar_sdk.frameworks.call_reader import CallReader
    from polar_server.openai.facts import Facts

_DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Turn:
    """The whole of one choice."""

    text: str
    calls: Sequence[dict[str, Any]]
    """Calls of tools, as the API spells them."""
    finish: str


class Shape(Protocol):
    """The form of the answers of an endpoint."""

    prefix: str
    """Prefix of an answer's id."""
    whole: str
    """`object` of a whole answer."""
    piece: str
    """`object` of a piece of a stream."""
    opening: bool
    """Whether a choice begins with a piece that says the role."""

    @staticmethod
    def choice(index: int, turn: Turn, logprobs: Sequence[Entry] | None) -> dict[str, Any]:
        """One choice of a whole answer."""

    @staticmethod
    def part(
        index: int, delta: dict[str, Any], logprobs: Sequence[Entry] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """A piece of a choice, from its delta as chat completions spell it."""


class ChoiceWriter:
    """Writes one answer.

    Args:
        shape: Of the endpoint.
        facts: Of the answer.
    """

    def __init__(self, shape: Shape, facts: Facts) -> None:
        self._shape, self._facts, self._call = shape, facts, facts.call
        self._readers = [ChoiceReader(self._call.form.reader()) for _ in self._call.asks]
        scored = self._call.logprobs is not None
        self._tokens = [ShownTokens(facts.token_bytes) for _ in self._call.asks] if scored else None
        self._left = set(range(len(self._call.asks)))
        self._opened: set[int] = set()
        self._written = [0] * len(self._call.asks)
        """Tokens of each choice so far, where every event says how many there are."""
        self._beginning = b""

    # -- whole ------------------------------------------------------------------------------------------------------

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The answer as one object."""
        choices = [self._choice(index, generation) for index, generation in enumerate(generations)]
        shared = self._shared(self._shape.whole)
        if self._call.prompt_logprobs:
            listed = [self._scored(generation) for generation in generations]
            if self._shape.opening:  # a chat has one prompt
                shared["prompt_logprobs"] = listed[0]
            else:
                choices = [{**choice, "prompt_logprobs": one} for choice, one in zip(choices, listed, strict=True)]
        return {**shared, "choices": choices, "usage": self._usage(), **self._facts.bill()}

    def _choice(self, index: int, generation: Generation) -> dict[str, Any]:
        reader = self._readers[index]
        _, _, logprobs = self._read(index, Chunk(generation.text, generation, generation.logprobs))
        echoed = self._echoed(index)
        if self._call.only_echo:
            return self._shape.choice(index, Turn(echoed, (), "length"), self._prompt(generation))
        if logprobs is not None and generation.prompt_logprobs is not None:
            logprobs = [*self._prompt(generation), *(entry.after(len(echoed)) for entry in logprobs)]
        turn = Turn(echoed + reader.text, reader.calls(), reader.finish(generation))
        return self._shape.choice(index, turn, logprobs)

    def _scored(self, generation: Generation) -> list[dict[str, Any] | None]:
        """The tokens of a prompt as vLLM lists them: by id, none for the first."""
        listed: list[dict[str, Any] | None] = [None]
        for scored in generation.prompt_logprobs or ():
            ranks = {token: place for place, (token, _) in enumerate(scored.top, 1)}
            several = {scored.token: scored.logprob, **dict(scored.top)}
            listed.append(
                {
                    str(token): {
                        "logprob": max(logprob, LEAST),
                        "rank": ranks.get(token),
                        "decoded_token": self._facts.token_bytes.text([token]),
                    }
                    for token, logprob in several.items()
                }
            )
        return listed

    def _prompt(self, generation: Generation) -> list[Entry]:
        return prompt_entries(self._facts.token_bytes, generation.prompt_ids, generation.prompt_logprobs or ())

    def _echoed(self, index: int) -> str:
        """The part of the prompt that a choice repeats."""
        if not self._call.echo:
            return ""
        prompt = self._call.echo[index]
        return prompt if isinstance(prompt, str) else self._facts.token_bytes.text(prompt)

    # -- streamed ---------------------------------------------------------------------------------------------------

    def opening(self) -> list[bytes]:
        """Events before the first piece: none."""
        return []

    def piece(self, index: int, chunk: Chunk) -> list[bytes]:
        """The events of one piece."""
        frames = []
        self._written[index] += chunk.generation is None or len(chunk.generation.token_ids) > self._written[index]
        if index not in self._opened:
            self._opened.add(index)
            if self._shape.opening:
                frames.append(self._event({"choices": [self._shape.part(index, {"role": "assistant", "content": ""})]}))
            if self._call.echo:
                frames.append(self._event({"choices": [self._shape.part(index, {"content": self._echoed(index)})]}))
        text, calls, entries = self._read(index, chunk)
        deltas = [self._shape.part(index, {"content": text}, entries)] if text or entries else []
        deltas += [self._shape.part(index, {"tool_calls": [call]}) for call in calls]
        frames += [self._event({"choices": [delta]}) for delta in deltas]
        if chunk.generation is not None:
            self._left.discard(index)
            bill = {} if self._left or self._call.include_usage else self._facts.bill()
            finished = self._shape.part(index, {}, finish=self._readers[index].finish(chunk.generation))
            frames.append(self._event({"choices": [finished], **bill}))
        return frames

    def closing(self) -> list[bytes]:
        """The events after the last piece."""
        last = {"choices": [], "usage": self._usage(), **self._facts.bill()}
        return [*([self._event(last)] if self._call.include_usage else []), _DONE]

    def failure(self, error: BaseException) -> list[bytes]:
        """The last event of a stream that was interrupted."""
        return [b"data: " + packed_json(api_error(error).body) + b"\n\n"]

    def _event(self, rest: dict[str, Any]) -> bytes:
        if not self._beginning:  # of every event of this stream, up to what differs
            self._beginning = b"data: " + packed_json(self._shared(self._shape.piece))[:-1] + b","
        usage: dict[str, Any] = {"usage": None} if self._call.include_usage else {}
        if self._call.each_usage:
            usage = {"usage": _counted(self._facts.read(), sum(self._written))}
        return self._beginning + packed_json({**usage, **rest})[1:] + b"\n\n"

    # -- both -------------------------------------------------------------------------------------------------------

    def _read(self, index: int, chunk: Chunk) -> tuple[str, list[dict[str, Any]], list[Entry] | None]:
        """Additions of a piece to its choice: text, calls, and the log-probabilities of what is shown."""
        text, calls = self._readers[index].read(chunk.text)
        if chunk.generation is not None:
            text += self._readers[index].end()
        return text, calls, None if self._tokens is None else self._tokens[index].push(chunk)

    def _shared(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self._shape.prefix}-{self._facts.request_id}",
            "object": kind,
            "created": self._facts.created,
            "model": self._call.model,
            "system_fingerprint": self._facts.fingerprint,
        }

    def _usage(self) -> dict[str, Any]:
        tokens = self._facts.tokens()
        return {
            **_counted(tokens.read, tokens.written),
            # All of OpenAI's, as LangChain warns of those that are missing.
            "prompt_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0, "audio_tokens": 0},
        }


def _counted(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class ChoiceReader:
    """Reads one choice: its text, and its calls with ids."""

    def __init__(self, reader: CallReader) -> None:
        self._reader = reader

    @property
    def text(self) -> str:
        """All of the text so far."""
        return self._reader.text

    def read(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Read a piece: text, and pieces of calls; the first of a call has its id and name and no arguments."""
        said, calls = "", []
        for piece in self._reader.push(text):
            if isinstance(piece, str):
                said += piece
                continue
            index, name, arguments = piece
            if name is not None:
                function = {"name": name, "arguments": ""}
                calls.append({"index": index, **self._reader.calls[index].as_openai(), "function": function})
            if arguments:
                calls.append({"index": index, "function": {"arguments": arguments}})
        return said, calls

    def end(self) -> str:
        """Text that was held back until it was certain that it begins no call."""
        return "".join(piece for piece in self._reader.finish() if isinstance(piece, str))

    def calls(self) -> list[dict[str, Any]]:
        """The calls, whole."""
        return [call.as_openai() for call in self._reader.calls]

    def finish(self, generation: Generation) -> str:
        """Why it ended: `tool_calls` only where every call is whole."""
        called = bool(self._reader.calls) and generation.complete is not False
        return "tool_calls" if called else generation.finish_reason
