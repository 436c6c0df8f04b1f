"""Items of a data file: JSONL of choice questions, of prompts with an answer, or of bare prompts, read and checked.

One object per line, in one of these forms; other keys are ignored, and items that are equal count once:

- `{"question": …, "choices": […], "answer": index}`: what the model prefers is compared with the right choice;
- `{"prompt": …, "answer": text}` (or `question` for `prompt`): what the model writes is compared with the text;
- `{"prompt": …}`: label-free, the model's own answer at full depth is the reference.

A text under the key `task` names the class that an item belongs to. Evaluations report each class apart; nothing else
looks at it.

Splits by hash: where an item goes depends on its text and on nothing else.

So an item stays where it is when a file is shuffled or grows, and copies of it cannot land on two sides. Shares are
met on average, not exactly.

Exact and near duplicates out, before anything is split: a test question must not have been trained on.

Texts are compared as sets of words and of pairs of neighbouring words, after case, punctuation and spacing are evened
out. Two items are near duplicates where their sets overlap by at least 80 % (Jaccard). The comparison is exact, not
sampled: sets that overlap so much must share one of their rarest members, so only those are looked up.

Which of several copies stays depends on their texts and not on their order.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, get_args

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from polar_sdk.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_FORMS = "{prompt}, {prompt, answer} or {question, choices, answer}"
TaskName = Annotated[
    str | None, BeforeValidator(lambda value: value.strip() or None if isinstance(value, str) else None)
]


class _Item(BaseModel):
    model_config = ConfigDict(frozen=True)

    task: TaskName = Field(default=None, exclude=True)
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
    text = (resources.files("polar_sdk") / "shipped" / "prompts.jsonl").read_text(encoding="utf-8")
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


Split = Literal["train", "dev", "calibration", "test"]
SPLITS: Final[tuple[Split, ...]] = get_args(Split)


class Shares(NamedTuple):
    """How much of the data each split gets; the shares add up to 1."""

    train: float = 0.5
    dev: float = 0.1
    calibration: float = 0.2
    test: float = 0.2

    def check(self) -> None:
        """Raise DataError where the shares are no shares.

        Raises:
            DataError: One is negative or no number, or they do not add up to 1.
        """
        if not all(math.isfinite(share) and share >= 0 for share in self) or abs(sum(self) - 1) > 1e-6:
            raise DataError(
                f"split shares {tuple(self)} must be 0 or more and add up to 1; write for example 0.5,0.1,0.2,0.2."
            )


DEFAULT_SHARES: Final = Shares()


def split_of(item_id: str, shares: Shares = DEFAULT_SHARES, seed: int = 0) -> Split:
    """The split of an item.

    Args:
        item_id: What `item_id` says of it.
        shares: Of the splits.
        seed: Another seed deals all items anew.
    """
    digest = hashlib.sha256(f"{seed} {item_id}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    edge = 0.0
    for split, share in zip(SPLITS, shares, strict=True):
        edge += share
        if place < edge:
            return split
    return next(split for split, share in zip(reversed(SPLITS), reversed(shares), strict=True) if share > 0)


NEAR: Final = 0.8
"""Least overlap of near duplicates."""
_KEPT: Final = re.compile(r"[\w+\-*/=<>%]")
"""Letters, digits, and the signs that make one calculation another."""
_NO_SPACES: Final = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff])")
"""Characters of scripts that put no spaces between words: each counts as a word."""


def normalised(text: str) -> str:
    """The text in lower case, with one space between words and no punctuation (unless there is nothing else)."""
    even = _NO_SPACES.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c if _KEPT.match(c) else " " for c in even).split()) or even.strip()


def item_id(item: Item) -> str:
    """Hash of what an item asks, normalised; the answer is no part of it, nor is the order of the choices."""
    return hashlib.sha256(_asked(item).encode()).hexdigest()[:32]


def data_hash(items: Iterable[Item]) -> str:
    """Hash of a whole set, whatever its order; the answers are part of it."""
    lines = sorted(f"{type(item).__name__} {item.model_dump_json()}" for item in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def distinct_items(items: Sequence[Item], near: float = NEAR) -> list[Item]:
    """The items without exact and near duplicates, in the order given.

    Args:
        items: At least one.
        near: Least overlap of near duplicates, above 0; 1 removes copies only.

    Raises:
        DataError: There is no item, or there are several and all are copies of one.
    """
    if not items:
        raise DataError("the data holds no prompt; give at least one.")
    copies: dict[str, Item] = {}
    for item in items:  # of copies that differ in spelling or label, the one with the smallest text stays
        key = item_id(item)
        copies[key] = min(item, copies.get(key, item), key=lambda one: one.model_dump_json())
    kept = set(_far_apart({key: _members(_asked(item)) for key, item in copies.items()}, near))
    if len(items) > 1 and len(kept) == 1:
        raise DataError(f"all {len(items)} prompts are copies of one; give different prompts.")
    return [copies[key] for key in dict.fromkeys(map(item_id, items)) if key in kept]


def _asked(item: Item) -> str:
    if isinstance(item, ChoiceItem):
        return normalised(item.question) + "\n" + "\n".join(sorted(map(normalised, item.choices)))
    return normalised(item.prompt)


def _members(text: str) -> frozenset[str]:
    words = text.split()
    return frozenset(words) | {f"{one} {two}" for one, two in pairwise(words)}


def _far_apart(sets: dict[str, frozenset[str]], near: float) -> Iterable[str]:
    """Keys whose sets overlap less than `near` with every key kept before, keys in order of their hash."""
    frequency = Counter(member for members in sets.values() for member in members)
    kept_by_member: dict[str, list[str]] = defaultdict(list)
    for key in sorted(sets):
        members = sets[key]
        rarest = sorted(members, key=lambda member: (frequency[member], member))
        # Sets with an overlap of `near` have at least that share of either in common, so not all of these are missing.
        leading = rarest[: len(rarest) - math.ceil(near * len(rarest) - 1e-9) + 1]
        candidates = {other for member in leading for other in kept_by_member[member]}
        if any(_overlap(members, sets[other]) >= near for other in candidates):
            continue
        for member in leading:
            kept_by_member[member].append(key)
        yield key


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 1.0
