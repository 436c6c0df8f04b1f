"""Prompts as chains send them, by kind, for fills and for the router.

Used by `train_router.py`. Kinds come from the package's own prompts, from `lab.fit.synthetic`, and, where
POLAR_DATA names a folder, from its passages, abstracts, trivia and sums. A hash deals each prompt to one of two parts:
fills are fitted on one, and the router is trained, calibrated and judged on the other, which no map has seen. It takes
tasks about passages that neither part has as well.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from polar_sdk.lab.fit.synthetic import TASKS as ABOUT_A_TEXT
from polar_sdk.lab.fit.synthetic import long_items
from polar_sdk.lab.items import (
    AnswerItem,
    ChoiceItem,
    PromptItem,
    Shares,
    builtin_items,
    distinct_items,
    item_id,
    split_of,
)
from polar_sdk.reading import parse_json
from polar_sdk.router.menu import MenuRouter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.programs.program import Program
    from polar_sdk.router.base import Router

__all__ = [
    "COMPARISON",
    "COMPARISONS",
    "FITTED",
    "PER_TASK",
    "ROUTED",
    "TASKS",
    "filling",
    "library_functions",
    "route_texts",
    "rows",
    "tasks_about",
    "texts",
    "unused_passages",
]

Part = Literal["fit", "route"]
_PARTS: Final = Shares(0.5, 0.5, 0.0, 0.0)
_NEIGHBOURS: Final = 5
"""Passages in one prompt, as a search would return them."""
FITTED, ROUTED, PER_TASK, COMPARISONS = 120, 100, 25, 110
"""Prompts of each kind for fills and for the router; for it also of each task, and comparisons."""
TASKS: Final = {
    **ABOUT_A_TEXT,
    "choice of a text": (
        "Document 1: {text}\n\nDocument 2: {other}\n\nWhich document is more useful to a historian, and why?",
        "A: {text}\n\nB: {other}\n\nWhich of these two texts is easier to read? Explain your choice.",
        "Here are two search results.\n\n[1] {text}\n\n[2] {other}\n\nWhat is each of them about? One sentence each.",
    ),
}
"""Tasks that chains give about one text or two, each in several wordings."""
COMPARISON: Final = {
    "comparison": (
        "Text A:\n{text}\n\nText B:\n{other}\n\nWhat do both texts have in common?",
        "Compare these two texts.\n\n1. {text}\n\n2. {other}",
        "First document: {text}\n\nSecond document: {other}\n\nHow do the two documents differ?",
        "{text}\n\n---\n\n{other}\n\nName one similarity and one difference of the two passages above.",
    )
}
"""A task that loses more than others: it has prompts enough for a class of its own in calibration."""


def texts(part: Part, per_kind: int, limit: int | None = None) -> list[Item]:
    """Prompts of one part, at most N of each kind, drawn by hash; `limit` cuts what they are made from."""
    made: list[Item] = [*builtin_items(), *long_items(4 * per_kind, seed=1), *_from_data(limit)]
    chosen: dict[str, list[Item]] = {}
    for item in sorted(distinct_items(made), key=item_id):
        if split_of(item_id(item), _PARTS, seed=7) == ("train" if part == "fit" else "dev"):
            chosen.setdefault(str(item.task), []).append(item)
    return [item for items in chosen.values() for item in items[:per_kind]][: None if limit is None else 12 * limit]


def rows(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of one of the sets in POLAR_DATA, the first N of them; none where it is not there."""
    folder = Path(os.environ.get("POLAR_DATA") or os.devnull)
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): JSON allows other breaks inside a text
    return [parse_json(line) for line in lines if line][:limit]


def library_functions(lengths: range) -> Iterator[tuple[ast.FunctionDef, list[str]]]:
    """Functions of Python's own library with a number of lines in this range, and their lines."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno in lengths:
                yield node, text.split("\n")[node.lineno - 1 : node.end_lineno]


def _from_data(limit: int | None) -> list[Item]:
    """Prompts made from the data sets: a passage or several with a question, summaries, extraction, facts, sums."""
    passages, abstracts = rows("passages.train", limit), rows("abstracts.train", limit)
    items: list[Item] = []
    for place, row in enumerate(passages):
        question = f"Question: {row['question']}?"
        if place % 3 == 0:
            around = [other["passage"] for other in passages[place : place + _NEIGHBOURS]]
            around.insert(place % len(around), around.pop(0))  # what answers is not always the first
            text = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(around, 1))
            items.append(PromptItem(prompt=f"{text}\n\n{question}", task="passages"))
        elif place % 3 == 1:
            items.append(PromptItem(prompt=f"{row['passage']}\n\n{question}", task="passage"))
        else:
            items.append(
                PromptItem(prompt=f"Summarise this text in two sentences:\n\n{row['passage']}", task="summaries")
            )
    for place, row in enumerate(abstracts):
        tasks = (f"Question: {row['question']}", "List the numbers in this text and what each of them counts.")
        kind = ("abstract", "extraction of numbers")[place % 2]
        items.append(PromptItem(prompt=f"{row['passage']}\n\n{tasks[place % 2]}", task=kind))
    items += [
        AnswerItem(prompt=row["question"], answer=row["answer"], task="facts") for row in rows("trivia.train", limit)
    ]
    items += [
        AnswerItem(prompt=row["question"], answer=str(row["answer"]), task="sums") for row in rows("gsm8k.train", limit)
    ]
    return items


def route_texts(
    fitted: Sequence[Item],
    per_kind: int = ROUTED,
    per_task: int = PER_TASK,
    comparisons: int = COMPARISONS,
    limit: int | None = None,
) -> list[Item]:
    """The texts that a router is made with and judged on; maps were fitted on none of them, nor on their passages.

    Args:
        fitted: The texts that fills are fitted on.
        per_kind: Maximum of each kind of `texts`.
        per_task: Maximum of each of `TASKS`.
        comparisons: Maximum of `COMPARISON`.
        limit: Maximum rows of each data set.
    """
    asked = texts("route", per_kind, limit)
    compared = tasks_about(unused_passages([*fitted, *asked])[:limit], COMPARISON, comparisons)
    return [*asked, *compared, *tasks_about(unused_passages([*fitted, *asked, *compared])[:limit], TASKS, per_task)]


def unused_passages(items: Sequence[Item]) -> list[str]:
    """The passages and abstracts that stand in none of the prompts."""
    used = "\n".join(item.prompt for item in items if not isinstance(item, ChoiceItem))
    passages = dict.fromkeys(row["passage"] for name in ("passages.train", "abstracts.train") for row in rows(name))
    return [passage for passage in passages if passage not in used]


def tasks_about(passages: Sequence[str], tasks: Mapping[str, Sequence[str]], per_task: int) -> list[Item]:
    """Each of the tasks about passages, at most N times; no passage stands in two prompts."""
    left = iter(passages)
    made: list[Item] = []
    for turn in range(per_task):
        for kind, wordings in tasks.items():
            wording = wordings[turn % len(wordings)]
            parts = {name: next(left, None) for name in ("text", "other") if f"{{{name}}}" in wording}
            if None in parts.values():
                return made
            made.append(PromptItem(prompt=wording.format(**parts), task=kind))
    return made


def filling(router: Router | None) -> list[Program]:
    """The programs of a menu that fill something and are for texts. None where no menu serves."""
    programs = router.programs_for("text") if isinstance(router, MenuRouter) else ()
    return [program for program in programs if program.fills]
