"""A response as JSON: its items whole, or the events that build them, in OpenAI's order and with its names.

One path makes both: the items of a whole response are those that its events would have built. Knows no body.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from polar_sdk import Chunk
from polar_server.errors import api_error
from polar_server.http.exchange import packed_json
from polar_server.openai.choices import ChoiceReader
from polar_server.openai.logprobs import ShownTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk import Generation
    from polar_server.openai.facts import Facts

_ALWAYS: Final = {
    "object": "response",
    "background": False,
    "conversation": None,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": False,
    "truncation": "disabled",
}


class ResponseWriter:
    """Writes one response.

    Args:
        facts: Of the answer.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts, self._call = facts, facts.call
        self._reader = ChoiceReader(self._call.form.reader())
        self._tokens = None if self._call.logprobs is None else ShownTokens(facts.token_bytes)
        self._output: list[dict[str, Any]] = []
        self._is_open = False
        """Whether the last item may still grow."""
        self._scored: list[dict[str, Any]] = []
        """Log-probabilities of text that is not shown yet."""
        self._events = 0
        self._incomplete = False

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The response as one object."""
        (generation,) = generations
        self.piece(0, Chunk(generation.text, generation, generation.logprobs))
        return self._response(self._status, closed=True)

    def opening(self) -> list[bytes]:
        """The events before the first piece."""
        begun = self._response("in_progress")
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def piece(self, index: int, chunk: Chunk) -> list[bytes]:
        """The events of one piece."""
        entries = [] if self._tokens is None else self._tokens.push(chunk)
        return self._add(chunk.text, [entry.wire for entry in entries], chunk.generation)

    def closing(self) -> list[bytes]:
        """The last event, with the whole response."""
        return [self._event(f"response.{self._status}", response=self._response(self._status, closed=True))]

    def failure(self, error: BaseException) -> list[bytes]:
        """The last events of a stream that was interrupted."""
        known = api_error(error)
        said = {"code": known.code, "message": str(known), "param": known.param}
        failed = self._response("failed") | {"error": {"code": "server_error", "message": str(known)}}
        return [self._event("error", **said), self._event("response.failed", response=failed)]

    # -- items ------------------------------------------------------------------------------------------------------

    def _add(self, text: str, entries: list[dict[str, Any]], generation: Generation | None) -> list[bytes]:
        """Add what was written, and the end of the answer if it is here; returns the events."""
        said, pieces = self._reader.read(text)
        said += self._reader.end() if generation is not None else ""
        self._scored += entries
        frames = self._say(said) if said else []
        for piece in pieces:
            frames += self._call_on(piece)
        if generation is not None:
            self._incomplete = self._reader.finish(generation) == "length"
            if not self._output:
                frames += self._say("")
            frames += self._close("incomplete" if self._incomplete else "completed")
        return frames

    def _say(self, text: str) -> list[bytes]:
        frames = []
        if not self._is_open or self._last["type"] != "message":
            item = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "content": []}
            frames = self._open({**item, "status": "in_progress"})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            frames.append(self._event("response.content_part.added", **self._place, content_index=0, part=part))
            self._last["content"].append(deepcopy(part))
        part, entries, self._scored = self._last["content"][0], self._scored, []
        part["text"] += text
        part["logprobs"] += entries
        if text or entries:
            delta = {"content_index": 0, "delta": text, "logprobs": entries}
            frames.append(self._event("response.output_text.delta", **self._place, **delta))
        return frames

    def _call_on(self, piece: dict[str, Any]) -> list[bytes]:
        """A piece of a call, as chat completions spell it."""
        function = piece["function"]
        if "id" in piece:
            item = {"id": f"fc_{uuid4().hex}", "type": "function_call", "call_id": piece["id"], "arguments": ""}
            return self._open({**item, "name": function["name"], "status": "in_progress"})
        self._last["arguments"] += function["arguments"]
        return [self._event("response.function_call_arguments.delta", **self._place, delta=function["arguments"])]

    def _open(self, item: dict[str, Any]) -> list[bytes]:
        frames = self._close("completed")
        self._output.append(item)
        self._is_open = True
        added = self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)
        return [*frames, added]

    def _close(self, status: str) -> list[bytes]:
        """The events that end the last item, if it may still grow."""
        if not self._is_open:
            return []
        self._is_open, item, frames = False, self._last, []
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            part["logprobs"] += self._scored
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            frames.append(self._event("response.output_text.done", **self._place, content_index=0, **text))
            frames.append(self._event("response.content_part.done", **self._place, content_index=0, part=part))
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            frames.append(self._event("response.function_call_arguments.done", **self._place, **done))
        done_item = self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)
        return [*frames, done_item]

    @property
    def _last(self) -> dict[str, Any]:
        return self._output[-1]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._last["id"], "output_index": len(self._output) - 1}

    # -- the response -----------------------------------------------------------------------------------------------

    @property
    def _status(self) -> str:
        return "incomplete" if self._incomplete else "completed"

    def _response(self, status: str, *, closed: bool = False) -> dict[str, Any]:
        """The response as it is now; `closed`: with what it took and cost."""
        bill = {"usage": self._usage(), **self._facts.bill()} if closed else {"usage": None}
        return {
            **_ALWAYS,
            "id": f"resp_{self._facts.request_id}",
            "created_at": self._facts.created,
            "model": self._call.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self._call.repeated,
            "output": self._output if closed or status == "failed" else [],
            **bill,
        }

    def _usage(self) -> dict[str, Any]:
        tokens = self._facts.tokens()
        return {
            "input_tokens": tokens.read,
            "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
            "output_tokens": tokens.written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens.read + tokens.written,
        }

    def _event(self, kind: str, **content: Any) -> bytes:
        number, self._events = self._events, self._events + 1
        data = packed_json({"type": kind, "sequence_number": number, **content})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
