"""Calibration sets: JSONL of bare prompts or of choice questions, read and checked. Knows no tokenizer and no model.

One object per line, of either form: `{"prompt": …}` (label-free: the model's own answer at full depth is the
reference) or `{"question": …, "choices": […], "answer": index}`. Other keys are ignored; equal items count once.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from polar_sdk.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CalibrationItem", "ChoiceItem", "PromptItem", "builtin_items", "read_items"]

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class PromptItem(BaseModel):
    """A bare prompt."""

    model_config = ConfigDict(frozen=True)
    prompt: Text


class ChoiceItem(BaseModel):
    """A question with several choices; `answer` is the index of the right one."""

    model_config = ConfigDict(frozen=True)
    question: Text
    choices: tuple[Text, ...] = Field(min_length=2)
    answer: int = Field(ge=0)


CalibrationItem = PromptItem | ChoiceItem


def builtin_items() -> list[CalibrationItem]:
    """The 70 prompts that come with the package, of eight kinds of task, kinds interleaved."""
    text = (resources.files("polar_sdk.scan") / "prompts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    kinds: dict[str, list[CalibrationItem]] = {}
    for row in rows:
        kinds.setdefault(row["task"], []).append(PromptItem(prompt=row["prompt"]))
    longest = max(map(len, kinds.values()))
    return [items[at] for at in range(longest) for items in kinds.values() if at < len(items)]


def read_items(path: str | Path, limit: int | None = None) -> list[CalibrationItem]:
    """Read a calibration file.

    Args:
        path: JSONL file.
        limit: Keep the first that many distinct items.

    Raises:
        DataError: The file is missing, empty, or a line is neither form.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"calibration file {str(path)!r} cannot be read ({error}).") from error
    lines = text.splitlines()
    items = _distinct(_item(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    if not items:
        raise DataError(f"calibration file {str(path)!r} holds no prompt; give one JSON object per line.")
    return items[:limit]


def _item(line: str, where: str) -> CalibrationItem:
    try:
        row: Any = json.loads(line)
        kind = ChoiceItem if isinstance(row, dict) and "choices" in row else PromptItem
        item = kind.model_validate(row)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error.msg}); give one object per line.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "line"
        raise DataError(f"{where}: {key}: {first['msg']}; give {{prompt}} or {{question, choices, answer}}.") from error
    if isinstance(item, ChoiceItem) and item.answer >= len(item.choices):
        raise DataError(f"{where}: answer {item.answer} is no index of {len(item.choices)} choices (0 is the first).")
    return item


def _distinct(items: Iterable[CalibrationItem]) -> list[CalibrationItem]:
    return list(dict.fromkeys(items))
