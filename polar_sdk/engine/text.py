"""Turn token ids into text piece by piece, and stop at stop strings, also where they cross the borders of tokens.

Text that could still become part of a stop string, or of a character of several bytes, is held back until that is
decided; a stop string itself is never emitted. If several match, the one that begins first ends the text, so the result
does not depend on the pieces in which the text arrived. Knows a tokenizer's `decode`, and nothing of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


_REPLACEMENT = "\ufffd"
"""The text of an incomplete character."""
MAX_HELD = 3
"""Maximum number of characters held back: what the bytes of one incomplete character can decode to."""
_lengths: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[dict[int, int], dict[int, int]]] = WeakKeyDictionary()
"""By tokenizer, by whether special tokens are text, and by token, the number of characters of its text alone."""
MAX_WINDOW = 64
"""Maximum number of tokens without a whole character at their end; after that, bytes are shown as they are."""


class Detokenizer:
    """Decodes a growing list of tokens; each call returns only the new text.

    A token's text can depend on the one before it (leading spaces, bytes of one character), so every step decodes a
    short window of tokens as a whole. The window moves up wherever the text ends in a whole character.

    Args:
        tokenizer: Of the model.
        special: Whether special tokens are text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._lengths = _lengths.setdefault(tokenizer, ({}, {}))[special]
        self._ids: list[int] = []
        self._context = 0  # start of the window
        self._border = 0  # tokens up to the last whole character
        self._shown = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Add one token; returns the text that became certain, which may be empty."""
        self._ids.append(token)
        return self._take(final=len(self._ids) - self._border > MAX_WINDOW)

    def finish(self) -> str:
        """Return what is left, incomplete characters included."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        text = self._decode(self._ids[self._context :])
        whole = text.rstrip(_REPLACEMENT)
        end = len(text) if final else max(len(whole), len(text) - MAX_HELD)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if end == len(text):
            self._context, self._border = self._border, len(self._ids)
            self._shown = self._length(self._ids[self._context :])
        return piece

    def _length(self, ids: list[int]) -> int:
        if len(ids) != 1:
            return len(self._decode(ids))
        if ids[0] not in self._lengths:
            self._lengths[ids[0]] = len(self._decode(ids))
        return self._lengths[ids[0]]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopMatcher:
    """Watches text for the first of several stop strings.

    Every character is looked at once per stop string that it may belong to (Knuth, Morris, Pratt), however long those
    are and in whatever pieces the text comes: the engine's thread does this after every token, for all callers.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._by_first: dict[str, list[_Stop]] = {}
        for stop in dict.fromkeys(stops):
            self._by_first.setdefault(stop[0], []).append(_Stop(stop))
        self._begun: list[_Stop] = []
        """Those of which the text ends in a beginning."""
        self._found: int | None = None
        """The beginning of the first stop string that was met, while one that begins earlier may still come."""
        self._seen = self._shown = 0
        """Number of characters pushed, and of those shown."""
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; returns what may be shown now. After a match nothing more is returned."""
        if self.stopped:
            return ""
        if not self._begun and not any(first in text for first in self._by_first):
            self._seen += len(text)
            self._shown = self._seen
            return text
        self._held += text
        for character in text:
            self._take(character)
            # A longer one that begins earlier may still be coming: of `abc` and `b`, the text `ab` decides nothing yet.
            if self._found is not None and self._found <= self._undecided:
                return self._cut(self._found)
        end = self._undecided
        shown, self._held = self._held[: end - self._shown], self._held[end - self._shown :]
        self._shown = end
        return shown

    def finish(self) -> str:
        """Return what was held back and did not become a stop string."""
        return self._cut(self._seen) if self._found is None else self._cut(self._found)

    @property
    def _undecided(self) -> int:
        """The beginning of the earliest stop string that the text may still become, or else its end."""
        return self._seen - max((stop.matched for stop in self._begun), default=0)

    def _take(self, character: str) -> None:
        self._seen += 1
        candidates = self._begun + [stop for stop in self._by_first.get(character, ()) if not stop.matched]
        self._begun = []
        for stop in candidates:
            if stop.ends_with(character):
                start = self._seen - len(stop.text)
                self._found = start if self._found is None else min(self._found, start)
            elif stop.matched:
                self._begun.append(stop)

    def _cut(self, end: int) -> str:
        shown, self._held = self._held[: end - self._shown], ""
        self.stopped = self.stopped or self._found is not None
        return shown


class _Stop:
    """One stop string, and how much of it the text ends in."""

    __slots__ = ("_borders", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Length of the longest beginning of the stop string that the text ends in."""
        self._borders = [0, 0]
        """For each length, that of the longest shorter beginning in which such a beginning ends; made as needed."""

    def ends_with(self, character: str) -> bool:
        """Take the text's next character; True if the stop string ends with it. It is not looked for any further."""
        stop, borders, matched = self.text, self._borders, self.matched
        while matched and stop[matched] != character:
            matched = borders[matched]
        matched += stop[matched] == character
        if matched == len(stop):
            self.matched = 0
            return True
        if matched == len(borders):
            border = borders[-1]
            while border and stop[border] != character:
                border = borders[border]
            borders.append(border + (stop[border] == character))
        self.matched = matched
        return False


class TextStream:
    """Detokenizer and stop matcher of one row.

    Args:
        tokenizer: Of the model.
        stops: What ends the answer.
        special: Whether special tokens are text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, special: bool = False) -> None:
        self._detokenizer = Detokenizer(tokenizer, special=special)
        self._matcher = StopMatcher(stops)
        self.text = ""
        """All text shown so far."""

    @property
    def stopped(self) -> bool:
        """True once a stop string was met."""
        return self._matcher.stopped

    def push(self, token: int) -> str:
        """Add one token; returns the text to show now."""
        return self._show(self._matcher.push(self._detokenizer.push(token)))

    def finish(self) -> str:
        """Return the text that was still held back."""
        tail = self._matcher.push(self._detokenizer.finish())
        return self._show(tail + self._matcher.finish())

    def _show(self, piece: str) -> str:
        self.text += piece
        return piece
