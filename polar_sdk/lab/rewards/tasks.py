"""From items to tasks: what is scored for each item, as token ids. Identity's own answers are the reference.

A choice question is a plain text that ends in `Answer:`, with every choice as a continuation. A prompt goes through the
chat template, continued by identity's greedy answer: one pass over it shows for each token whether a program would
have chosen the same. Knows a model's tokenizer; scores nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from polar_sdk.engine.pack import Question
from polar_sdk.lab.items import ChoiceItem, TokensItem, item_id, kind_of
from polar_sdk.programs.program import Program
from polar_sdk.promises.losses import ANSWER_TOKENS
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.lab.items import Item, PromptKind
    from polar_sdk.lab.rewards.cache import RewardCache
    from polar_sdk.model import PolarModel
    from polar_sdk.request.options import Prompt


@dataclass(frozen=True)
class Task:
    """One item, ready to be scored.

    Attributes:
        item: Where it comes from.
        question: Its prompt, and what may follow: the choices, or identity's answer.
    """

    item: Item
    question: Question

    @cached_property
    def id(self) -> str:
        """Hash of what the item asks; see `lab.items.item_id`."""
        return item_id(self.item)

    @cached_property
    def key(self) -> str:
        """Hash of the token ids, on which a score depends."""
        return _key((self.question.prompt, self.question.continuations))

    @property
    def kind(self) -> PromptKind:
        """The kind of the item."""
        return kind_of(self.item)

    @property
    def characters(self) -> tuple[int, ...]:
        """Length of each choice; 1 for a prompt, which is not a choice question."""
        return tuple(map(len, self.item.choices)) if isinstance(self.item, ChoiceItem) else (1,)


def make_tasks(
    model: PolarModel,
    items: Sequence[Item],
    cache: RewardCache,
    *,
    answer_tokens: int = ANSWER_TOKENS,
    on_progress: Progress = silent,
) -> list[Task]:
    """One task per item, in order; prompts are answered at full depth where the cache has no answer.

    An item whose question does not fit the model's context window is left out.
    """
    asked: dict[str, Prompt] = {
        item.prompt: item.tokens if isinstance(item, TokensItem) else item.prompt
        for item in items
        if not isinstance(item, ChoiceItem)
    }
    answers = _answers(model, asked, cache, answer_tokens, on_progress)
    tasks = [
        Task(item, choice_question(model, item) if isinstance(item, ChoiceItem) else answers[item.prompt])
        for item in items
        if isinstance(item, ChoiceItem) or item.prompt in answers
    ]
    return [task for task in tasks if _length(task.question) <= model.context_window]


def choice_question(model: PolarModel, item: ChoiceItem) -> Question:
    """A choice question as a model sees it, in training and evaluation alike: plain text, choices after `Answer:`."""
    prompt = tuple(model.encode(f"Question: {item.question}\nAnswer:"))
    return Question(prompt, tuple(tuple(model.encode(f" {choice}")) for choice in item.choices))


def _length(question: Question) -> int:
    """Tokens of the prompt and its longest continuation."""
    return len(question.prompt) + max(map(len, question.continuations))


def _answers(
    model: PolarModel,
    prompts: Mapping[str, Prompt],
    cache: RewardCache,
    answer_tokens: int,
    on_progress: Progress,
) -> dict[str, Question]:
    """Prompt tokens and identity's answer, by text; prompts that leave no room for an answer are left out."""
    tokens = {text: tuple(model.prompt_tokens(prompt)) for text, prompt in prompts.items()}
    room = model.context_window - answer_tokens
    keys = {prompt: _key(ids) for prompt, ids in tokens.items() if len(ids) <= room}
    texts = {key: prompt for prompt, key in keys.items()}
    known = cache.complete(
        sorted(texts, key=lambda key: len(tokens[texts[key]])),
        f"{Program.identity(model.depth)} answers {answer_tokens}",
        lambda batch: model.greedy_answers([prompts[texts[key]] for key in batch], max_tokens=answer_tokens),
        lambda done, total: on_progress("identity's answers", done, total),
    )
    return {prompt: Question(tokens[prompt], (tuple(known[key]),)) for prompt, key in keys.items()}


def _key(ids: object) -> str:
    """Hash of token ids."""
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:40]
