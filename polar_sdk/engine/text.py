"""Turn token ids into text piece by piece, and stop at stop strings, wherever the borders of tokens fall.

Text that could still become part of a stop string, or of a character of several bytes, is held back until that is
decided; a stop string itself is never emitted. Where several match, the one that begins first cuts, so the result does
not depend on the pieces in which the text arrived. Knows a tokenizer's `decode`, and nothing of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


_REPLACEMENT = "\ufffd"
"""What an incomplete character decodes to."""
MAX_HELD = 3
"""Maximum number of characters held back: what the bytes of one incomplete character can decode to."""
MAX_WINDOW = 64
"""Maximum number of tokens without a whole character at their end; after that, bytes are shown as they are."""


class Detokenizer:
    """Decodes a growing list of tokens; each call returns only the new text.

    A token's text can depend on the one before it (leading spaces, bytes of one character), so every step decodes a
    short window of tokens as a whole. The window moves up wherever the text ends in a whole character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
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
            self._shown = len(self._decode(self._ids[self._context :]))
        return piece

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopMatcher:
    """Watches text for the first of several stop strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; returns what may be shown now. After a match nothing more is returned."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        start = self._first_stop()
        # A longer stop that begins earlier may still be coming: of `abc` and `b`, the text `ab` decides nothing yet.
        undecided = len(self._held) - max(_overlap(self._held, stop) for stop in self._stops)
        if start is not None and start <= undecided:
            return self._cut(start)
        shown, self._held = self._held[:undecided], self._held[undecided:]
        return shown

    def finish(self) -> str:
        """Return what was held back and did not become a stop string."""
        start = self._first_stop()
        return self._cut(len(self._held) if start is None else start, stopped=start is not None)

    def _first_stop(self) -> int | None:
        return min((start for stop in self._stops if (start := self._held.find(stop)) >= 0), default=None)

    def _cut(self, end: int, *, stopped: bool = True) -> str:
        shown, self._held = self._held[:end], ""
        self.stopped = self.stopped or stopped
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class TextStream:
    """Detokenizer and stop matcher of one row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
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
