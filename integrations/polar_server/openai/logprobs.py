"""Log-probabilities of the tokens that are shown, with the bytes of each.

The engine reports every sampled token; the API reports those whose bytes are in the text: not the end of text, nor what
a stop string hides. The bytes of a choice join to its text, so a token that a stop string cuts in two is cut as well.
Knows a tokenizer's vocabulary.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedTokenizerBase

    from polar_sdk import Chunk, TokenLogprobs

LEAST: Final = -9999.0
"""Stands for −inf, which JSON cannot express."""
_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes that each token stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset([*tokenizer.all_special_ids, *(index for index, token in added if token.special)])

    @cached_property
    def _alphabet(self) -> dict[str, int] | None:
        """The byte that each character of a byte-level vocabulary stands for; None for other vocabularies."""
        vocabulary = self._tokenizer.get_vocab()
        if "Ġ" not in vocabulary or "▁" in vocabulary:
            return None
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in set(plain)]
        return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}

    def of(self, token: int) -> bytes:
        """The bytes of a token; none for one that is never shown."""
        if token in self._special:
            return b""
        written = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(written, str):  # a row of the head that stands for no token
            return b""
        if self._alphabet is not None and all(character in self._alphabet for character in written):
            return bytes(self._alphabet[character] for character in written)
        if (byte := _BYTE.fullmatch(written)) is not None:
            return bytes([int(byte[1], 16)])
        return written.replace("▁", " ").encode()

    def text(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""
        return b"".join(map(self.of, tokens)).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Entry:
    """One token of a text: as the API shows it, and where in the text it begins."""

    wire: dict[str, Any]
    offset: int

    def after(self, characters: int) -> Entry:
        """The same after another text."""
        return Entry(self.wire, self.offset + characters)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A token whose text has not been shown yet. `start` and `end` count characters of the text."""

    logprobs: TokenLogprobs
    before: bytes
    """The incomplete character before it, which this token continues or interrupts."""
    raw: bytes
    start: int
    end: int


class ShownTokens:
    """The tokens of one choice, released as their text is shown."""

    def __init__(self, names: TokenBytes) -> None:
        self._names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: list[_Waiting] = []
        self._decoded = self._shown = 0

    def push(self, chunk: Chunk) -> list[Entry]:
        """Add a piece of the answer; returns the tokens whose whole text has been shown, at its end all others too."""
        for logprobs in chunk.logprobs or ():
            raw, start, before = self._names.of(logprobs.token), self._decoded, self._decoder.getstate()[0]
            self._decoded += len(self._decoder.decode(raw))
            self._waiting.append(_Waiting(logprobs, before, raw, start, self._decoded))
        self._shown += len(chunk.text)
        count = 0
        for place, token in enumerate(self._waiting, 1):
            if token.end > self._shown:
                break
            # A token of no characters goes with the text after it: it may be the end, or begin a character.
            count = place if token.end > token.start else count
        released, self._waiting = self._waiting[:count], self._waiting[count:]
        entries = [self._entry(token, token.raw) for token in released]
        return entries if chunk.generation is None else [*entries, *self._rest()]

    def _rest(self) -> list[Entry]:
        """The rest of the tokens that are in the text, the last one cut where the text is."""
        rest, self._waiting = self._waiting, []
        entries = []
        for token in rest:
            if token.start >= self._shown:
                break
            raw = token.raw
            if token.end > self._shown:
                raw = _cut(token, self._shown - token.start)
            if raw or not token.raw:
                entries.append(self._entry(token, raw))
        return entries

    def _entry(self, token: _Waiting, raw: bytes) -> Entry:
        return Entry(_scored(self._names, raw, token.logprobs), token.start)


def _scored(names: TokenBytes, raw: bytes, logprobs: TokenLogprobs) -> dict[str, Any]:
    """A token as the API shows it, with the likeliest ones at its place."""
    top = [_wire(names.of(other), logprob) for other, logprob in logprobs.top]
    return {**_wire(raw, logprobs.logprob), "top_logprobs": top}


def _wire(raw: bytes, logprob: float | None) -> dict[str, Any]:
    shown = None if logprob is None else max(logprob, LEAST)
    return {"token": raw.decode("utf-8", "replace"), "logprob": shown, "bytes": list(raw)}


def _cut(token: _Waiting, characters: int) -> bytes:
    """The bytes of a token that are within the next N characters."""
    kept = 0
    while len((token.before + token.raw[: kept + 1]).decode("utf-8", "replace")) <= characters:
        kept += 1
    return token.raw[:kept]


def prompt_entries(names: TokenBytes, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[Entry]:
    """The tokens of a prompt, the first of which follows nothing and has no log-probability."""
    entries: list[Entry] = []
    decoder, offset = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token, scored in zip(tokens, [None, *logprobs], strict=True):
        raw = names.of(token)
        wire = {**_wire(raw, None), "top_logprobs": []} if scored is None else _scored(names, raw, scored)
        entries.append(Entry(wire, offset))
        offset += len(decoder.decode(raw))
    return entries
