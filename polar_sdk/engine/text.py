"""Turn token ids into text piece by piece, and stop at stop strings, wherever token borders fall.

Knows a tokenizer's `decode` and nothing of models. Text that could still become part of a stop string, or of a
character of several bytes, is held back until that is decided; a stop string itself is never emitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer", "StopMatcher", "TextStream"]

_REPLACEMENT = "\ufffd"
"""What an incomplete character decodes to."""
_MOST_PENDING = 4
"""Tokens after which an incomplete character is given up on: no character is longer in UTF-8 bytes."""


class Detokenizer:
    """Decodes a growing list of tokens; each call returns only the new text.

    A token's text can depend on the one before it (leading spaces), so every step decodes a short window twice, with and
    without the new token, and takes the difference.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # start of the window
        self._done = 0  # tokens whose text was returned

    def push(self, token: int) -> str:
        """Add one token; returns the text that became certain, maybe none."""
        self._ids.append(token)
        return self._take(final=len(self._ids) - self._done > _MOST_PENDING)

    def finish(self) -> str:
        """Return what is left, incomplete characters included."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._done])
        now = self._decode(self._ids[self._context :])
        if now.endswith(_REPLACEMENT) and not final:
            return ""
        self._context, self._done = self._done, len(self._ids)
        return now[len(before) :]

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
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """Return what was held back and turned out to be no stop string."""
        shown, self._held = self._held, ""
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
