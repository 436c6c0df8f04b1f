"""Items: what the laboratory measures on, read from JSONL, hashed, without duplicates, and assigned to splits.

A data file has one JSON object per line, in one of these forms; other keys are ignored, and equal items count once:

- `{"question": …, "choices": […], "answer": index}`: the choice that the model prefers is compared with the right one;
- `{"prompt": …, "answer": text}` (or `question` for `prompt`): what the model writes is compared with the text;
- `{"prompt": …}`: label-free; the model's own answer at full depth is the reference. With `tokens` beside it, as in a
  file of kept prompts, these ids are what the model reads.

A text under the key `passage` is put before the question or prompt, with an empty line between them. A text under the
key `task` or `kind` names the class of an item: calibration and evaluation look at each class separately.

Duplicates, exact and near, are removed before anything is split, so that no test question was trained on. The split of
an item depends on its text alone: it stays where it is when a file is shuffled or grows. Knows no model.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, get_args

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, StringConstraints, ValidationError

from polar_sdk.errors import DataError
from polar_sdk.reading import Unreadable, parse_json, read_text, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
TaskName = Annotated[
    str | None, BeforeValidator(lambda value: value.strip() or None if isinstance(value, str) else None)
]
Split = Literal["train", "dev", "calibration", "test"]
SPLITS: Final[tuple[Split, ...]] = get_args(Split)
NEAR: Final = 0.8
"""Overlap from which two items are near duplicates."""
_MAX_FILE: Final = 512 * 2**20
_MAX_LINE: Final = 4 * 2**20
"""A text beyond the context window of any model. Unit: bytes."""
_FORMS: Final = "{prompt}, {prompt, answer} or {question, choices, answer}"
_KEPT: Final = re.compile(r"[\w+\-*/=<>%]")
"""Letters, digits, and the signs that tell one calculation from another."""
_NO_SPACES: Final = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff])")
"""Characters of scripts that put no spaces between words: each counts as a word."""


class _Item(BaseModel, frozen=True):
    task: TaskName = Field(default=None, exclude=True, validation_alias=AliasChoices("task", "kind"))
    """Class that it is reported with; not part of what is asked, so no hash includes it."""


class PromptItem(_Item):
    """A bare prompt."""

    prompt: Text


class TokensItem(PromptItem):
    """A bare prompt as a model of one tokenizer reads it, chat template included; `prompt` is its text."""

    tokens: tuple[int, ...] = Field(min_length=1)


class AnswerItem(_Item):
    """A prompt and the text that answers it."""

    prompt: Text = Field(validation_alias=AliasChoices("prompt", "question"))
    answer: Text


class ChoiceItem(_Item):
    """A question with several choices; `answer` is the index of the right one."""

    question: Text
    choices: tuple[Text, ...] = Field(min_length=2)
    answer: int = Field(ge=0)


Item = PromptItem | TokensItem | AnswerItem | ChoiceItem
PromptKind = Literal["choice", "prompt", "answer"]
"""A question with choices, a bare prompt, or a prompt whose right answer is known."""


def kind_of(item: Item) -> PromptKind:
    """The kind of an item, for each of which a promise holds by itself."""
    if isinstance(item, ChoiceItem):
        return "choice"
    return "answer" if isinstance(item, AnswerItem) else "prompt"


def text_of(item: Item) -> str:
    """The text that the model is asked, without choices."""
    return item.question if isinstance(item, ChoiceItem) else item.prompt


def builtin_items() -> list[Item]:
    """The bare prompts that come with the package, written or made from a grammar, interleaved by kind of task."""
    text = (resources.files("polar_sdk") / "shipped" / "prompts.jsonl").read_text(encoding="utf-8")
    kinds: dict[str, list[Item]] = {}
    for row in map(parse_json, text.splitlines()):
        kinds.setdefault(row["task"], []).append(PromptItem.model_validate(row))
    longest = max(map(len, kinds.values()))
    return [items[place] for place in range(longest) for items in kinds.values() if place < len(items)]


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Read a data file.

    Args:
        path: JSONL file.
        limit: Keep only the first N different items; None = all.

    Raises:
        DataError: The file is missing, empty, nothing but copies, or a line has none of the forms.
    """
    try:
        text = read_text(path, _MAX_FILE)
    except (OSError, Unreadable) as error:
        raise DataError(f"data file {str(path)!r} cannot be read ({error}).") from error
    lines = text.split("\n")  # not splitlines(), which also breaks at characters that JSON allows inside a text
    rows = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    items = list(dict.fromkeys(_item(line, f"{path}:{number}") for number, line in rows.items()))
    if not items:
        raise DataError(f"data file {str(path)!r} holds no prompt; give one JSON object per line.")
    if len(items) == 1 < len(rows):
        raise DataError(
            f"all {len(rows)} prompts of data file {str(path)!r} are copies of one; give different prompts."
        )
    return items[:limit]


def _item(line: str, where: str) -> Item:
    try:
        row = _with_passage(parse_json(line, max_bytes=_MAX_LINE))
        item = _form(row).model_validate(row)
    except Unreadable as error:
        raise DataError(f"{where}: {error}; give one object per line.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "line"
        raise DataError(f"{where}: {key}: {_reason(first)}; give {_FORMS}.") from error
    if isinstance(item, ChoiceItem) and item.answer >= len(item.choices):
        last = len(item.choices) - 1
        raise DataError(
            f"{where}: answer {item.answer} is not an index of {len(item.choices)} choices; use 0 to {last}."
        )
    return item


def _with_passage(row: Any) -> Any:
    """The row with its passage before its question, where it has one."""
    if not isinstance(row, dict) or "passage" not in row:
        return row
    key = "question" if "question" in row else "prompt"
    if not (isinstance(row["passage"], str) and isinstance(row.get(key), str)):
        return row
    return {**row, key: f"{row['passage'].strip()}\n\nQuestion: {row[key].strip()}"}


def _form(row: Any) -> type[Item]:
    if isinstance(row, dict) and "choices" in row:
        return ChoiceItem
    if isinstance(row, dict) and "tokens" in row:
        return TokensItem
    return AnswerItem if isinstance(row, dict) and "answer" in row else PromptItem


def _reason(error: Any) -> str:
    if error["loc"] == ("choices",) and error["type"] == "too_short":
        return f"a question needs at least 2 choices (got {len(error['input'])})"
    if error["loc"] == ("answer",) and error["type"].startswith("int"):
        return f"{shown(error['input'])} is not the index of a choice; write the index of the right one, counted from 0"
    return str(error["msg"])


def check_labels(items: Sequence[Item]) -> None:
    """Refuse choice questions that all have the same right index: always choosing that index would score 100 %.

    Raises:
        DataError: There are at least two choice questions, and their answers are all the same index.
    """
    answers = [item.answer for item in items if isinstance(item, ChoiceItem)]
    if len(answers) > 1 and len(set(answers)) == 1:
        raise DataError(
            f"the answer of all {len(answers)} choice questions is index {answers[0]}, so nothing can be learned from "
            "the labels; shuffle the choices of each question, or give bare prompts."
        )


def normalised(text: str) -> str:
    """The text in lower case, with one space between words and no punctuation (unless there is nothing else)."""
    even = _NO_SPACES.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c if _KEPT.match(c) else " " for c in even).split()) or even.strip()


def item_id(item: Item) -> str:
    """Hash of what an item asks, normalised; neither the answer nor the order of the choices is part of it."""
    return hashlib.sha256(_question_text(item).encode()).hexdigest()[:32]


def data_hash(items: Iterable[Item]) -> str:
    """Hash of a whole set, whatever its order; the answers are part of it."""
    lines = sorted(f"{type(item).__name__} {item.model_dump_json()}" for item in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _question_text(item: Item) -> str:
    if isinstance(item, ChoiceItem):
        return normalised(item.question) + "\n" + "\n".join(sorted(map(normalised, item.choices)))
    return normalised(item.prompt)


class Shares(NamedTuple):
    """How much of the data each split gets; the shares add up to 1, and are met on average, not exactly."""

    train: float = 0.5
    dev: float = 0.1
    calibration: float = 0.2
    test: float = 0.2

    def check(self) -> None:
        """Check that these are shares.

        Raises:
            DataError: One is negative or not a number, or they do not add up to 1.
        """
        if not all(math.isfinite(share) and share >= 0 for share in self) or abs(sum(self) - 1) > 1e-6:
            raise DataError(f"split shares {tuple(self)} must be 0 or more and add up to 1, e.g. 0.5,0.1,0.2,0.2.")


DEFAULT_SHARES: Final = Shares()


def split_of(item_id: str, shares: Shares = DEFAULT_SHARES, seed: int = 0) -> Split:
    """The split of an item.

    Args:
        item_id: See the function `item_id`.
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


def distinct_items(items: Sequence[Item]) -> list[Item]:
    """The items without exact and near duplicates, in their order.

    Items are compared as sets of words and of pairs of neighbouring words, after case, punctuation and spacing are
    evened out; near duplicates are sets that overlap by at least `NEAR` (Jaccard). Which of several copies stays
    depends on their texts and not on their order.

    Args:
        items: At least one.

    Raises:
        DataError: There is no item, or there are several and all are copies of one.
    """
    if not items:
        raise DataError("the data holds no prompt; give at least one.")
    copies: dict[str, Item] = {}
    for item in items:  # of copies that differ in spelling or label, the one with the smallest text stays
        key = item_id(item)
        copies[key] = min(item, copies.get(key, item), key=lambda copy: copy.model_dump_json())
    kept = set(_far_apart({key: _members(_question_text(item)) for key, item in copies.items()}))
    if len(items) > 1 and len(kept) == 1:
        raise DataError(f"all {len(items)} prompts are copies of one; give different prompts.")
    return [copies[key] for key in dict.fromkeys(map(item_id, items)) if key in kept]


def _members(text: str) -> frozenset[str]:
    words = text.split()
    return frozenset(words) | {f"{first} {second}" for first, second in pairwise(words)}


def _far_apart(sets: dict[str, frozenset[str]]) -> Iterable[str]:
    """Keys whose sets overlap less than `NEAR` with every key kept before, keys in order of their hash.

    Exact, not sampled: sets that overlap so much share one of their rarest members, so only those are looked up.
    """
    frequency = Counter(member for members in sets.values() for member in members)
    kept_by_member: dict[str, list[str]] = defaultdict(list)
    for key in sorted(sets):
        members = sets[key]
        rarest = sorted(members, key=lambda member: (frequency[member], member))
        # Sets with an overlap of `NEAR` share at least that part of either, so they share at least one of these.
        leading = rarest[: len(rarest) - math.ceil(NEAR * len(rarest) - 1e-9) + 1]
        candidates = {other for member in leading for other in kept_by_member[member]}
        rarer = frozenset(rarest[: 2 * len(leading)])
        if any(_are_near(members, rarer, sets[other]) for other in candidates):
            continue
        for member in leading:
            kept_by_member[member].append(key)
        yield key


def _are_near(members: frozenset[str], rarer: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two sets overlap by at least `NEAR`; `rarer` has those of the first that few sets have.

    Most candidates share only what all texts of a kind share, which the few are enough to tell.
    """
    if not members or not other:
        return members == other
    least = NEAR * (len(members) + len(other)) / (1 + NEAR) - 1e-9  # members that such sets share
    if len(rarer & other) + len(members) - len(rarer) < least:
        return False
    return len(members & other) >= least
