"""Reads answers that may be tool calls, whole or in pieces. Knows no framework."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from polar_sdk.frameworks.tools import OURS, read_keywords, spellings, written_name

if TYPE_CHECKING:
    from polar_sdk.frameworks.tools import ToolUse
    from polar_sdk.request.call_format import CallFormat


@dataclass
class Call:
    """A call as far as it has been read."""

    name: str
    arguments: str = ""
    """JSON text."""
    complete: bool = False
    id: str = field(default_factory=lambda: f"call_{uuid4().hex[:24]}")

    def as_openai(self) -> dict[str, Any]:
        """The call as OpenAI's API spells it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def values(self) -> dict[str, Any] | None:
        """The arguments, or None if the call was cut off."""
        return json.loads(self.arguments) if self.complete else None


Piece = str | tuple[int, str | None, str]
"""New text of the answer; or of a call: its index, its name in the first piece, and new text of its arguments."""


class CallReader:
    """Reads an answer that may be calls, in whatever pieces it comes.

    Args:
        use: The tools of the request; None = the answer is text.
        form: How calls are written.
    """

    def __init__(self, use: ToolUse | None, form: CallFormat = OURS) -> None:
        self.calls: list[Call] = []
        self.text = ""
        self._first: dict[str, tuple[str, CallFormat]] = {}
        """The beginnings of an answer's first call, with the name of its tool and its form."""
        self._further: dict[str, tuple[str, CallFormat]] = {}
        """Those of one that follows."""
        for each in spellings(form):
            for tool in () if use is None else use.tools:
                head = each.head + written_name(tool.name, each) + each.middle
                self._first[each.opening + head] = tool.name, each
                if each.separator is not None:
                    self._further[each.tail + each.separator + head] = tool.name, each
        self._anywhere = [head for head, (_, each) in self._first.items() if each.after_text]
        """Those that may follow text."""
        self._form = form
        """Form of the call that was read last."""
        self._is_text = use is None
        """Whether all that comes is text."""
        self._held = ""
        """Text that was not read yet: it may be the beginning of a call."""
        self._written = ""
        """Arguments of the call that is open, as they were written; keywords are JSON once they are whole."""
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, text: str) -> list[Piece]:
        """Read more of the answer; returns what is new."""
        pieces: list[Piece] = []
        self._held += text
        while self._held:
            if self.calls and not self.calls[-1].complete:
                self._read_arguments(pieces)
            elif not (self._read_further(pieces) if self.calls else self._read_text(pieces)):
                break
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back: an answer that ended before it was certain whether it is a call is text."""
        held, self._held = "" if self.calls else self._held, ""
        self.text += held
        return [held] if held else []

    def _read_text(self, pieces: list[Piece]) -> bool:
        """Read text up to the first call; True if one begins."""
        start, head = self._first_call(self._held)
        if start:
            pieces.append(self._held[:start])
            self.text += self._held[:start]
            self._is_text = not self._anywhere
        self._held = self._held[start:]
        if head is not None:
            self._open(head, self._first, pieces)
        return head is not None

    def _first_call(self, held: str) -> tuple[int, str | None]:
        """Where the first call begins, or may begin, and its beginning where that is certain."""
        if self._is_text:
            return len(held), None
        heads = self._anywhere if self.text else list(self._first)
        if not self.text and (head := next((head for head in heads if held.startswith(head)), None)):
            return 0, head
        if found := {held.find(head): head for head in self._anywhere if head in held}:
            return min(found), found[min(found)]
        for place in range(max(0, len(held) - max(map(len, heads), default=0)), len(held)):
            if any(head.startswith(held[place:]) for head in (self._anywhere if place else heads)):
                return place, None
        return len(held), None

    def _read_further(self, pieces: list[Piece]) -> bool:
        """Read what is between two calls, or after the last; True where another begins."""
        if head := next((head for head in self._further if self._held.startswith(head)), None):
            self._open(head, self._further, pieces)
            return True
        if not any(head.startswith(self._held) for head in self._further):
            self._held = ""
        return False

    def _open(self, head: str, heads: dict[str, tuple[str, CallFormat]], pieces: list[Piece]) -> None:
        name, self._form = heads[head]
        self._held = self._held[len(head) :]
        self.calls.append(Call(name))
        self._written, self._depth = "", int(self._form.keywords)
        pieces.append((len(self.calls) - 1, name, ""))

    def _read_arguments(self, pieces: list[Piece]) -> None:
        """Read the arguments of the call that is open, as far as they have come."""
        call, end = self.calls[-1], len(self._held)
        for place, character in enumerate(self._held):
            self._follow(character)
            if not self._depth:
                call.complete, end = True, place + (not self._form.keywords)  # a bracket that ends keywords is no part
                break
        new, self._held = self._held[:end], self._held[end:]
        self._written += new
        if self._form.keywords:
            new = json.dumps(read_keywords(self._written), ensure_ascii=False) if call.complete else ""
        call.arguments += new
        if not new:
            return
        index = len(self.calls) - 1
        if pieces and pieces[-1][:2] == (index, call.name):  # its name is new as well
            pieces[-1] = (index, call.name, new)
        else:
            pieces.append((index, None, new))

    def _follow(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted and character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = not self._quoted
        elif not self._quoted:
            self._depth += (character in "{[(") - (character in "}])")
