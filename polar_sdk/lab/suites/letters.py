"""Questions with lettered choices, MMLU and ARC: the likeliest letter after `Answer:` is the answer.

The prompt is that of Hendrycks et al. (2021): a line that names the subject, solved examples, the question, its
choices in lines of their own, and `Answer:`.
"""

from __future__ import annotations

import string
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from polar_sdk.errors import DataError
from polar_sdk.lab.items import ChoiceItem, Text
from polar_sdk.lab.suites.suite import Asked, P, Problem, Suite, check_index

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from polar_sdk.lab.items import Item

_LETTERS = string.ascii_uppercase
_Texts = Annotated[tuple[Text, ...], Field(min_length=2, max_length=len(_LETTERS))]


class Lettered(Problem, frozen=True):
    """A question whose choices are shown under letters."""

    @property
    @abstractmethod
    def subject_name(self) -> str:
        """The subject of the questions, in words."""

    @property
    @abstractmethod
    def asked(self) -> tuple[str, tuple[str, ...], int]:
        """The question, its choices, and the index of the right one."""

    @property
    def item(self) -> Item:
        """The question with its choices."""
        question, choices, right = self.asked
        return ChoiceItem(question=question, choices=choices, answer=right)


class _Letters(Suite[P]):
    def ask(self, problem: P, shots: Sequence[P], *, chat: bool) -> Asked:
        """As one message, which a letter answers, or as a text that a letter continues."""
        assert isinstance(problem, Lettered)
        blocks = [_block(shot, solved=True) for shot in shots if isinstance(shot, Lettered)]
        blocks.append(_block(problem, solved=False))
        head = f"The following are multiple choice questions (with answers) about {problem.subject_name}.\n\n"
        before = "" if chat else " "
        choices = tuple(f"{before}{letter}" for letter in _LETTERS[: len(problem.asked[1])])
        return Asked(head + "\n\n".join(blocks), choices=choices)

    def judge(self, problem: P, answer: int | str) -> str:
        """By the index of the likeliest letter."""
        assert isinstance(problem, Lettered) and isinstance(answer, int)
        return "" if answer == problem.asked[2] else _LETTERS[answer]


def _block(problem: Lettered, *, solved: bool) -> str:
    question, choices, right = problem.asked
    shown = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    return "\n".join([question, *shown, f"Answer: {_LETTERS[right]}" if solved else "Answer:"])


def _index(value: object) -> object:
    """The index that a letter means, as the original files of MMLU write it."""
    if isinstance(value, str) and len(letter := value.strip()) == 1 and letter in _LETTERS:
        return _LETTERS.index(letter)
    return value


class MmluProblem(Lettered, frozen=True):
    """A line of MMLU."""

    question: Text
    subject: Text
    choices: _Texts
    answer: Annotated[int, BeforeValidator(_index), Field(ge=0)]
    """Index of the right choice, or its letter."""

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Self:
        check_index(self.answer, self.choices)
        return self

    @property
    def group(self) -> str:
        """Its subject."""
        return self.subject

    @property
    def subject_name(self) -> str:
        """Its subject, in words."""
        return self.subject.replace("_", " ")

    @property
    def asked(self) -> tuple[str, tuple[str, ...], int]:
        """As the line has it."""
        return self.question, self.choices, self.answer


class Mmlu(_Letters[MmluProblem]):
    """Massive multitask language understanding: 57 subjects; its dev split has the five usual shots of each."""

    name: ClassVar[str] = "mmlu"
    form = MmluProblem

    def shots(self, problem: MmluProblem, solved: Sequence[MmluProblem], count: int) -> list[MmluProblem]:
        """The first solved ones of the same subject.

        Raises:
            DataError: There are too few.
        """
        found = super().shots(problem, [other for other in solved if other.subject == problem.subject], count)
        if len(found) < count:
            raise DataError(
                f"there are {len(found)} solved problems of {problem.subject!r}, but {count} shots were asked for; add "
                "some to the file of shots, or ask for fewer."
            )
        return found


class _ArcChoices(BaseModel, frozen=True):
    text: _Texts
    label: tuple[Annotated[str, AfterValidator(str.strip)], ...]


class ArcProblem(Lettered, frozen=True):
    """A line of ARC."""

    question: Text
    choices: _ArcChoices
    answerKey: str  # noqa: N815  (the data set's own name)
    """The label of the right choice."""

    @model_validator(mode="after")
    def _key_is_a_label(self) -> Self:
        labels = self.choices.label
        if len(labels) != len(self.choices.text):
            raise ValueError(f"there are {len(self.choices.text)} choices, but {len(labels)} labels")
        if self.answerKey.strip() not in labels:
            raise ValueError(f"answerKey {self.answerKey!r} is not one of the labels {', '.join(labels)}")
        return self

    @property
    def subject_name(self) -> str:
        """All are of one field."""
        return "science"

    @property
    def asked(self) -> tuple[str, tuple[str, ...], int]:
        """With letters for labels, which are digits in some lines."""
        return self.question, self.choices.text, self.choices.label.index(self.answerKey.strip())


class Arc(_Letters[ArcProblem]):
    """AI2 reasoning challenge, either set of it."""

    name: ClassVar[str] = "arc"
    form = ArcProblem
