"""Train the shipped draft head: `make drafts` does it for the default model.

It learns what the model says to questions of its own, and to prompts as chains send them: those of `router_texts`, made
from the sets in the folder POLAR_DATA where that is named, small tasks about single sentences of these sets, and
functions of Python's own library to explain or change.
The package's own prompts, on which drafts are measured, are left out. Ctrl-C loses a minute at most.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.router_texts import library_functions, rows, texts
from polar_sdk import PolarModel, lab
from polar_sdk.lab.items import PromptItem, builtin_items, item_id
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.lab.items import Item

SHIPPED: Final = Path(__file__).parents[1] / "polar_sdk" / "shipped" / "drafts" / "smollm2-135m-instruct.safetensors"
_LINES: Final = range(4, 22)
"""Lines of a function."""
_ASKED: Final = (
    "Explain what this code does:",
    "Add type hints to this code and show the whole code:",
    "Add a docstring to this function and show the whole code:",
    "Rewrite this code with other variable names:",
    "Find a bug in this code:",
)
_LANGUAGES: Final = ("French", "Spanish", "German", "Italian", "Portuguese")
_TRANSLATE: Final = (
    "Translate to {language}: {sentence}",
    "Translate this sentence into {language}: {sentence}",
    "{sentence}\n\nWhat is that in {language}?",
    "How would you write this in {language}? {sentence}",
    "Translate from English to {language}.\n\n{sentence}",
)
_ABOUT_SENTENCES: Final = (
    "Say the same in fewer words: {sentence}",
    "Rewrite this sentence in simple words: {sentence}",
    "Which names are in this sentence? {sentence}",
    "Is this about history, science, sport or art? {sentence}",
    "Correct the spelling and grammar: {sentence}",
    "Turn this into a question: {sentence}",
    "Find a short heading for this: {sentence}",
    "Write this in the future tense: {sentence}",
)
_WORDS: Final = range(4, 16)
"""Words of a sentence."""


def main() -> None:
    """Train it, from where an earlier run stopped."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--questions", type=int, default=6400, help="that the model asks itself")
    options.add_argument("--per-kind", type=int, default=120, help="prompts of each kind besides")
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--work", type=Path, default=Path("out/drafts"), help="folder of answers and checkpoint")
    options.add_argument("--out", type=Path, default=SHIPPED)
    chosen = options.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    model = PolarModel.from_pretrained(ledger=None)
    with RewardCache(chosen.work / "answers.sqlite") as cache, ProgressBars(quiet=False) as show:
        head = lab.train_draft_head(
            model,
            [*_chains(chosen.per_kind), *_code(2 * chosen.per_kind), *_about_sentences(10 * chosen.per_kind)],
            out=chosen.out,
            cache=cache,
            checkpoints=chosen.work / "checkpoints",
            on_progress=show,
            questions=chosen.questions,
            epochs=chosen.epochs,
        )
    print(head.facts.model_dump_json(indent=2))


def _chains(per_kind: int) -> list[Item]:
    measured = {item_id(item) for item in builtin_items()}
    return [item for item in texts("fit", per_kind) if item_id(item) not in measured]


def _code(count: int) -> list[Item]:
    dice = random.Random(0)
    functions = sorted("\n".join(lines) for _, lines in library_functions(_LINES))
    return [
        PromptItem(prompt=f"{dice.choice(_ASKED)}\n\n```python\n{function}\n```", task="code")
        for function in dice.sample(functions, min(count, len(functions)))
    ]


def _about_sentences(count: int) -> list[Item]:
    """Half of them translations: in other languages a head must know that it knows little."""
    dice = random.Random(0)
    sentences = sorted(_sentences())
    chosen = dice.sample(sentences, min(count, len(sentences)))
    wordings = [_TRANSLATE if place % 2 == 0 else _ABOUT_SENTENCES for place in range(len(chosen))]
    return [
        PromptItem(
            prompt=dice.choice(wording).format(sentence=sentence, language=dice.choice(_LANGUAGES)), task="sentences"
        )
        for wording, sentence in zip(wordings, chosen, strict=True)
    ]


def _sentences() -> Iterator[str]:
    """Sentences of passages, and questions."""
    for row in rows("passages.train"):
        yield from (each for each in re.findall(r"(?<=[.] )[A-Z][^.()]+[.]", row["passage"]) if _is_short(each))
    yield from (row["question"] for row in rows("trivia.train") if _is_short(row["question"]))


def _is_short(sentence: str) -> bool:
    return len(sentence.split()) in _WORDS


if __name__ == "__main__":
    main()
