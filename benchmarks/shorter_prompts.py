"""Shorter prompts: a part of the sentences of a long text is kept, chosen by libraries that people use for it.

LexRank (sumy) keeps what is central in the text and reads no question; BM25 (bm25s) keeps what has words in common with
the question. Paragraphs of few words, such as questions, stay as they are. Neither needs a model; LLMLingua, which
does, fetches one from the hub when it is made, and so cannot run here.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD: Final = re.compile(r"\w+")
_SHORT: Final = 40
"""Paragraphs of fewer words stay."""


def shortened(prompt: str, share: float, pick: Callable[[Sequence[str], str, int], set[int]]) -> str:
    """The prompt with that share of the sentences of its long paragraphs, in their order.

    Args:
        prompt: As a user wrote it.
        share: Of the sentences of long paragraphs.
        pick: Chooses sentences, given them, the rest of the prompt and how many stay.
    """
    paragraphs = prompt.split("\n\n")
    long = [place for place, text in enumerate(paragraphs) if len(text.split()) >= _SHORT]
    rest = " ".join(text for place, text in enumerate(paragraphs) if place not in long)
    sentences = [(place, text) for place in long for text in _SENTENCE.split(paragraphs[place]) if text.strip()]
    if len(sentences) < 2:
        return prompt
    kept = pick([text for _, text in sentences], rest, math.ceil(share * len(sentences)))
    for place in long:
        paragraphs[place] = " ".join(
            text for index, (at, text) in enumerate(sentences) if at == place and index in kept
        )
    return "\n\n".join(text for text in paragraphs if text)


def by_lexrank(sentences: Sequence[str], rest: str, count: int) -> set[int]:
    """The sentences that are most central among all."""
    from sumy.models.dom import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        ObjectDocumentModel,
        Paragraph,
        Sentence,
    )
    from sumy.summarizers.lex_rank import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        LexRankSummarizer,
    )

    words = _Words()
    document = ObjectDocumentModel([Paragraph([Sentence(text, words) for text in sentences])])
    chosen = {str(sentence) for sentence in LexRankSummarizer()(document, count)}
    return {index for index, text in enumerate(sentences) if text.strip() in chosen}


def by_bm25(sentences: Sequence[str], rest: str, count: int) -> set[int]:
    """The sentences that have most in common with the rest of the prompt, its question."""
    import bm25s  # type: ignore[import-not-found, import-untyped, unused-ignore]

    index = bm25s.BM25()
    index.index([_words(text) for text in sentences], show_progress=False)
    scores = index.get_scores(_words(rest))
    return set(sorted(range(len(sentences)), key=lambda place: -float(scores[place]))[:count])


class _Words:
    """What sumy asks of a tokenizer; its own needs data that is downloaded."""

    def to_words(self, sentence: str) -> tuple[str, ...]:
        return tuple(_words(sentence))


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]
