"""GSM8K: word problems with a number as the answer, worked out in text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import field_validator

from polar_sdk.lab.items import PromptItem, Text
from polar_sdk.lab.rewards.measure import is_right
from polar_sdk.lab.suites.suite import Asked, Problem, Suite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.items import Item

_MAX_TOKENS: Final = 512
_MARKED: Final = (re.compile(r"####\s*(.+)"), re.compile(r"\\boxed\{([^{}]*)\}"))
"""How an answer marks its number: as the data set does, or as models were trained to."""
_NUMBER: Final = re.compile(r"-?[\d,]*\.?\d+")


class Gsm8kProblem(Problem, frozen=True):
    """A line of GSM8K."""

    question: Text
    answer: Text
    """Working, and the number after `####`; or the number alone."""

    @field_validator("answer")
    @classmethod
    def _has_a_number(cls, answer: str) -> str:
        if not _NUMBER.fullmatch(_right(answer)):
            raise ValueError("it does not end in a number; the data set writes it after ####")
        return answer

    @property
    def item(self) -> Item:
        """The question."""
        return PromptItem(prompt=self.question)


class Gsm8k(Suite[Gsm8kProblem]):
    """Grade school math."""

    name: ClassVar[str] = "gsm8k"
    form = Gsm8kProblem

    def ask(self, problem: Gsm8kProblem, shots: Sequence[Gsm8kProblem], *, chat: bool) -> Asked:
        """A chat model without examples is asked for a box; else the text goes on as the examples do."""
        if chat and not shots:
            wish = "Please reason step by step, and put your final answer within \\boxed{}."
            return Asked(f"{problem.question}\n{wish}", max_tokens=_MAX_TOKENS)
        solved = [f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots]
        text = "".join([*solved, f"Question: {problem.question}\nAnswer:"])
        return Asked(text, stops=("Question:",), max_tokens=_MAX_TOKENS)

    def judge(self, problem: Gsm8kProblem, answer: int | str) -> str:
        """By the number that the text marks as its answer, else by its last one."""
        number = final_number(str(answer))
        return "" if is_right(number, _right(problem.answer)) else number or "no number"


def final_number(text: str) -> str:
    """The number that a text gives as its answer; empty if it has none."""
    marked = next((found[-1] for mark in _MARKED if (found := mark.findall(text))), text)
    numbers = _NUMBER.findall(marked)
    return str(numbers[-1]) if numbers else ""


def _right(answer: str) -> str:
    return answer.rpartition("####")[2].strip().replace(",", "")
