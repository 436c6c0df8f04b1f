"""Items of a data file: JSONL of choice questions, of prompts with an answer, or of bare prompts, read and checked.

One object per line, in one of these forms; other keys are ignored, and items that are equal count once:

- `{"question": …, "choices": […], "answer": index}`: what the model prefers is compared with the right choice;
- `{"prompt": …, "answer": text}` (or `question` for `prompt`): what the model writes is compared with the text;
- `{"prompt": …}`: label-free, the model's own answer at full depth is the reference.

A text under the key `task` names the class that an item belongs to. Evaluations report each class apart; nothing else
looks at it.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from polar_sdk.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["AnswerItem", "ChoiceItem", "Item", "PromptItem", "builtin_items", "check_labels", "read_items"]

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_FORMS = "{prompt}, {prompt, answer} or {question, choices, answer}"
Task = Annotated[str | None, BeforeValidator(lambda value: value.strip() or None if isinstance(value, str) else None)]


class _Item(BaseModel):
    model_config = ConfigDict(frozen=True)

    task: Task = Field(default=None, exclude=True)
    """Class that it is reported with; no part of what is asked, so that no hash holds it."""


class PromptItem(_Item):
    """A bare prompt."""

    prompt: Text


class AnswerItem(_Item):
    """A prompt and the text that answers it."""

    prompt: Text = Field(validation_alias=AliasChoices("prompt", "question"))
    answer: Text


class ChoiceItem(_Item):
    """A question with several choices; `answer` is the index of the right one."""

    question: Text
    choices: tuple[Text, ...] = Field(min_length=2)
    answer: int = Field(ge=0)


Item = PromptItem | AnswerItem | ChoiceItem


def builtin_items() -> list[Item]:
    """The prompts that come with the package, bare, of eight kinds of task, kinds interleaved."""
    text = (resources.files("polar_sdk.data") / "prompts.jsonl").read_text(encoding="utf-8")
    kinds: dict[str, list[Item]] = {}
    for row in map(json.loads, text.splitlines()):
        kinds.setdefault(row["task"], []).append(PromptItem.model_validate(row))
    longest = max(map(len, kinds.values()))
    return [items[at] for at in range(longest) for items in kinds.values() if at < len(items)]


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Read a data file.

    Args:
        path: JSONL file.
        limit: Keep the first that many different items.

    Raises:
        DataError: The file is missing, empty, nothing but copies, or a line has none of the forms.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {str(path)!r} cannot be read ({error}).") from error
    lines = text.split("\n")  # not splitlines(), which also breaks at characters that JSON allows inside a text
    items = _different(_item(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    if not items:
        raise DataError(f"data file {str(path)!r} holds no prompt; give one JSON object per line.")
    rows = sum(bool(line.strip()) for line in lines)
    if len(items) == 1 < rows:
        raise DataError(f"all {rows} prompts of data file {str(path)!r} are copies of one; give different prompts.")
    return items[:limit]


def check_labels(items: Sequence[Item]) -> None:
    """Refuse choice questions that all have the same right index: always choosing that index would score 100 %.

    Raises:
        DataError: There are at least two, and they are of one class.
    """
    answers = [item.answer for item in items if isinstance(item, ChoiceItem)]
    if len(answers) > 1 and len(set(answers)) == 1:
        raise DataError(
            f"the answer of all {len(answers)} choice questions is index {answers[0]}, so that nothing can be learned "
            "from the labels; shuffle the choices of each question, or give bare prompts."
        )


def _item(line: str, where: str) -> Item:
    try:
        row: Any = json.loads(line)
        item = _form(row).model_validate(row)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error.msg}); give one object per line.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "line"
        raise DataError(f"{where}: {key}: {_reason(first)}; give {_FORMS}.") from error
    if isinstance(item, ChoiceItem) and item.answer >= len(item.choices):
        raise DataError(f"{where}: answer {item.answer} is no index of {len(item.choices)} choices (0 is the first).")
    return item


def _form(row: Any) -> type[Item]:
    if isinstance(row, dict) and "choices" in row:
        return ChoiceItem
    return AnswerItem if isinstance(row, dict) and "answer" in row else PromptItem


def _reason(error: Any) -> str:
    if error["loc"] == ("choices",) and error["type"] == "too_short":
        return f"{len(error['input'])} choice leaves nothing to choose, a question needs at least 2"
    if error["loc"] == ("answer",) and error["type"].startswith("int"):
        return f"{error['input']!r} is no index of a choice; write the number of the right one, 0 is the first"
    return str(error["msg"])


def _different(items: Iterable[Item]) -> list[Item]:
    return list(dict.fromkeys(items))
