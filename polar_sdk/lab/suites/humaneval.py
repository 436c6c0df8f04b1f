"""HumanEval: a function is written from its docstring, then run with its tests.

A chat model is asked for a script in a block of code, and the block is opened for it, as in EvalPlus, with which the
models' own makers measure; another model continues the prompt as it is (Chen et al., 2021).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Final

from polar_sdk.lab.items import PromptItem, Text
from polar_sdk.lab.suites.sandbox import run_code
from polar_sdk.lab.suites.suite import Asked, Problem, Suite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.lab.items import Item

_MAX_TOKENS: Final = 512
_WISH: Final = "Write a self-contained Python script that solves this problem, in a Markdown code block:"
_START: Final = "This Python script has a self-contained function that solves the problem:\n```python\n"
_CHAT_STOPS: Final = ("\n```", "\nif __name__", "\ndef main(", "\nprint(")
_STOPS: Final = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```")


class HumanEvalProblem(Problem, frozen=True):
    """A line of HumanEval."""

    task_id: Text
    prompt: str
    entry_point: Text
    test: Text

    @property
    def item(self) -> Item:
        """The prompt."""
        return PromptItem(prompt=self.prompt)


class HumanEval(Suite[HumanEvalProblem]):
    """Functions in Python; pass@1 of the greedy answer."""

    name: ClassVar[str] = "humaneval"
    form = HumanEvalProblem
    takes_shots: ClassVar[bool] = False
    runs_code: ClassVar[bool] = True

    def ask(self, problem: HumanEvalProblem, shots: Sequence[HumanEvalProblem], *, chat: bool) -> Asked:
        """See the top of this module."""
        if not chat:
            return Asked(problem.prompt, stops=_STOPS, max_tokens=_MAX_TOKENS)
        text = f"{_WISH}\n```\n{problem.prompt.strip()}\n```\n"
        return Asked(text, start=_START, stops=_CHAT_STOPS, max_tokens=_MAX_TOKENS)

    def judge(self, problem: HumanEvalProblem, answer: int | str) -> str:
        """By running it; what is wrong is the name of the error that ended it.

        An answer that defines the function takes the imports and helpers that the prompt has before it; one that does
        not is its body.
        """
        defined = re.search(rf"^def\s+{re.escape(problem.entry_point)}\b", str(answer), re.MULTILINE)
        before = problem.prompt
        if defined:
            before = re.split(rf"^def\s+{re.escape(problem.entry_point)}\b", before, maxsplit=1, flags=re.MULTILINE)[0]
        tests = f"\n{problem.test}\ncheck({problem.entry_point})\n"
        ended = run_code(str(answer), tests, head=before + "\n" * bool(defined))
        return "" if ended.passed else ended.reason
