"""From the problems of a suite to token ids, through a model's chat template. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic

from polar_sdk.engine.pack import Question
from polar_sdk.errors import InvalidRequestError
from polar_sdk.lab.items import ChoiceItem, PromptItem
from polar_sdk.lab.rewards.tasks import Task
from polar_sdk.lab.suites.suite import Asked, P

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.suites.suite import Suite
    from polar_sdk.model import PolarModel
    from polar_sdk.request.options import Template


@dataclass(frozen=True)
class Prepared(Generic[P]):
    """A problem, ready to be answered.

    Attributes:
        problem: Which one.
        asked: How it was put.
        tokens: The prompt.
        choices: Token ids of what may follow; empty = a text is written.
    """

    problem: P
    asked: Asked
    tokens: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @cached_property
    def task(self) -> Task:
        """The same for what scores choices, and its key in the cache."""
        asked = self.asked
        item = ChoiceItem(question=asked.text, choices=asked.choices, answer=0) if asked.choices else None
        return Task(item or PromptItem(prompt=asked.text), Question(self.tokens, self.choices))


@dataclass(frozen=True)
class Asker(Generic[P]):
    """Puts the problems of a suite to one model.

    Attributes:
        suite: The suite.
        model: The model.
        chat: Whether through its chat template.
        solved: Problems that may stand before one that is asked.
        shots: How many of them do, where there is room.
    """

    suite: Suite[P]
    model: PolarModel
    chat: bool
    solved: Sequence[P] = ()
    shots: int = 0

    def prepare(self, problem: P) -> Prepared[P] | None:
        """The problem with as many solved ones before it as there is room for; None if it does not fit alone."""
        shots = self.suite.shots(problem, self.solved, self.shots)
        for count in range(len(shots), -1, -1):
            prepared = self._prepared(problem, self.suite.ask(problem, shots[:count], chat=self.chat))
            longest = max(map(len, prepared.choices), default=prepared.asked.max_tokens)
            if len(prepared.tokens) + longest <= self.model.context_window:
                return prepared
        return None

    def _prepared(self, problem: P, asked: Asked) -> Prepared[P]:
        tokens = self.model.prompt_tokens(asked.text, "chat" if self.chat else "raw")
        tokens += self.model.encode(asked.start) if asked.start else []
        choices = tuple(tuple(self.model.encode(choice)) for choice in asked.choices)
        return Prepared(problem, asked, tuple(tokens), choices)

    @property
    def template_tokens(self) -> int:
        """Tokens that the chat template puts around a message."""
        return len(self.model.prompt_tokens("a", "chat")) - len(self.model.encode("a")) if self.chat else 0


def through_chat(model: PolarModel, template: Template) -> bool:
    """Whether a model is asked through its chat template.

    Raises:
        InvalidRequestError: It is to be, but has none.
    """
    known: tuple[Any, ...] = ("auto", "chat", "raw")
    if template not in known:
        raise InvalidRequestError(f"template {template!r} is unknown; use auto, chat or raw.")
    has_one = getattr(model.loaded.tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_one:
        raise InvalidRequestError(f"model {model.name!r} has no chat template; use --template raw.")
    return template != "raw" and has_one
