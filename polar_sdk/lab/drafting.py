"""Making a draft table: what a model says to questions, counted, so that its next answers are drafted from the first.

The questions may be given. Otherwise the model asks itself: what it writes after the start of a user's message is what
it was trained to be asked (Xu et al. 2024, "Magpie", arXiv:2406.08464), so a table needs no data. Questions are sampled
with seeds and answers are greedy, at full depth: the same call makes the same table where answers repeat to the bit.
Both are kept in the cache of rewards, so that what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, Field, ValidationError

from polar_sdk.errors import DataError, DraftTableError
from polar_sdk.lab.items import ChoiceItem, PromptItem, data_hash
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.tasks import BATCH, make_tasks
from polar_sdk.models.load import saved_table_path
from polar_sdk.programs.program import Program
from polar_sdk.request.encoder import PromptEncoder
from polar_sdk.serving.draft_table import CONTEXT, MAX_VOCABULARY, DraftTable, DraftTableFacts
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.model import PolarModel

_QUESTION_TOKENS: Final = 96
_TOP_P: Final = 0.95
"""Of sampled questions: without the least likely tokens, of which a small model makes nonsense."""
_HELD_OUT: Final = 10
"""One answer of so many is held out to see what a table of the others guesses."""


class DraftOptions(BaseModel, frozen=True, extra="forbid"):
    """How a draft table is made."""

    questions: int = Field(default=2000, ge=1)
    """That the model asks itself; of no meaning where items are given."""
    answer_tokens: int = Field(default=96, ge=2)
    """Maximum tokens of an answer."""
    seed: int = Field(default=0, ge=0)
    """Of the questions."""


def make_draft_table(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    *,
    out: str | Path | None = None,
    cache: RewardCache | None = None,
    on_progress: Progress = silent,
    **options: int,
) -> DraftTable:
    """Make a draft table from a model's own answers, and store it.

    Models that are loaded from then on use it.

    Args:
        model: The model.
        items: Prompts to answer; None = the model asks itself. Choice questions are left out.
        out: File to write; None = your own table for this model.
        cache: Where questions and answers are kept; None = in memory.
        on_progress: Called with (stage, steps done, steps in all).
        **options: Fields of `DraftOptions`.

    Raises:
        DraftTableError: An option is out of range, the file cannot be written, or the model's vocabulary is too large.
        DataError: The items hold no prompt, or the model has no chat template to ask itself by.
    """
    try:
        chosen = DraftOptions.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise DraftTableError(f"option {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    if model.decoder.vocab > MAX_VOCABULARY:
        raise DraftTableError(
            f"the model has {model.decoder.vocab:,} tokens, more than the {MAX_VOCABULARY:,} of a draft table."
        )
    target = Path(out or saved_table_path(model.fingerprint))
    _check_writable(target)  # before minutes are spent on answers
    table = _Maker(model, chosen, cache or RewardCache(), on_progress).make(items)
    table.save(target)
    return table


@dataclass(frozen=True)
class _Maker:
    model: PolarModel
    options: DraftOptions
    cache: RewardCache
    on_progress: Progress

    def make(self, items: Sequence[Item] | None) -> DraftTable:
        prompts = self._asked() if items is None else _prompts(items)
        asked = [PromptItem(prompt=prompt) for prompt in prompts]
        count = self.options.answer_tokens
        tasks = make_tasks(self.model, asked, self.cache, answer_tokens=count, on_progress=self.on_progress)
        if not tasks:
            raise DataError(
                f"no prompt leaves room for an answer of {count} tokens in the {self.model.context_window:,} tokens of "
                "the model's context window.",
                hint="Use shorter prompts, or fewer answer tokens.",
            )
        answers = [[*task.question.prompt[-CONTEXT:], *task.question.continuations[0]] for task in tasks]
        facts = DraftTableFacts(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            answers=len(answers),
            tokens=sum(len(task.question.continuations[0]) for task in tasks),
            data=data_hash(asked),
        )
        held_out = answers[_HELD_OUT - 1 :: _HELD_OUT]
        others = [answer for place, answer in enumerate(answers, start=1) if place % _HELD_OUT]
        right = _right(DraftTable.count(others, facts), held_out)
        return DraftTable.count(answers, facts.model_copy(update={"right": right}))

    def _asked(self) -> list[str]:
        """What the model asks itself, each question once."""
        start = PromptEncoder(self.model.loaded.tokenizer).message_start()
        if not start:
            raise DataError(
                f"model {self.model.name} has no chat template by which it could ask itself questions.",
                hint="Give it prompts: a JSONL file, or items.",
            )
        count, name = self.options.questions, f"asked {_QUESTION_TOKENS} {_TOP_P}"
        seeds = [str(self.options.seed + number) for number in range(count)]
        known = self.cache.get(seeds, name)
        missing = [seed for seed in seeds if seed not in known]
        for first in range(0, len(missing), BATCH):
            batch = missing[first : first + BATCH]
            asked = self.model.generate_batch(
                [start] * len(batch),
                each=[{"seed": int(seed)} for seed in batch],
                temperature=1.0,
                top_p=_TOP_P,
                max_tokens=_QUESTION_TOKENS,
                template="raw",
                program=Program.identity(self.model.depth),
            )
            # One that was cut off is no whole question.
            texts = [each.text.strip() if each.finish_reason == "stop" else "" for each in asked]
            fresh = dict(zip(batch, texts, strict=True))
            self.cache.put(name, fresh)
            known |= fresh
            self.on_progress("questions", first + len(batch), len(missing))
        questions = [text for text in dict.fromkeys(known[seed] for seed in seeds) if text]
        if not questions:
            raise DataError(
                f"of {count} questions that the model was to ask itself, none was whole within {_QUESTION_TOKENS} "
                "tokens.",
                hint="Give it prompts: a JSONL file, or items.",
            )
        return questions


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise DraftTableError(f"draft table {str(path)!r} cannot be written: {error.strerror}.") from error
    if path.is_dir():
        raise DraftTableError(f"draft table {str(path)!r} cannot be written: it is a folder; name a file.")


def _prompts(items: Sequence[Item]) -> list[str]:
    prompts = list(dict.fromkeys(item.prompt for item in items if not isinstance(item, ChoiceItem)))
    if not prompts:
        raise DataError("the data holds choice questions alone; a draft table is made from answers in text.")
    return prompts


def _right(table: DraftTable, answers: Sequence[Sequence[int]]) -> float | None:
    """Share of the tokens of answers that a table guesses."""
    guessed = [
        (guess := table.guess(answer[max(place - CONTEXT, 0) : place])) is not None and guess.token == answer[place]
        for answer in answers
        for place in range(CONTEXT, len(answer))
    ]
    return sum(guessed) / len(guessed) if guessed else None
