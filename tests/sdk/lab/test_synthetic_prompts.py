"""Prompts made from the grammar: one fact answers the question, it stands where it should, and seeds repeat."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from polar_sdk.errors import DataError
from polar_sdk.lab.items import AnswerItem, PromptItem, distinct_items, long_items, read_items
from polar_sdk.lab.synthetic_prompts import messages, notes, passages

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_asked_fact_stands_at_its_depth(depth: float) -> None:
    for text in notes(20, seed=1, facts=(9, 21), depth=depth):
        lines = text.prompt.split("\n")
        facts = [line for line in lines[1:] if line and not line.endswith("?")]
        asked = lines[-1]
        subject = next(word for word in reversed(asked.rstrip("?").split()) if word[0].isupper())
        holding = [place for place, line in enumerate(facts) if text.answer in line and f" {subject}" in line]
        assert round(depth * (len(facts) - 1)) in holding
        assert abs(text.depth - depth) < 1 / len(facts)


def test_a_question_has_one_answer_in_its_passages() -> None:
    for text in passages(60, seed=2):
        question = text.prompt.rsplit("Question: ", 1)[1]
        place = next(word for word in question.rstrip("?").split()[1:] if word[0].isupper())
        (passage,) = (part for part in text.prompt.split("\n\n") if f"] {place} is" in part)
        assert text.answer in passage


def test_a_seed_repeats_its_prompts_and_another_gives_others() -> None:
    for make in (notes, passages, messages):
        assert make(5, seed=3) == make(5, seed=3)
        assert make(5, seed=3)[:2] == make(2, seed=3)
        assert not {text.prompt for text in make(5, seed=3)} & {text.prompt for text in make(5, seed=4)}


def test_long_items_are_no_near_duplicates_of_each_other_and_name_their_kind() -> None:
    items = long_items(100)
    assert len(distinct_items(items)) == len(items) == 300
    assert {item.task for item in items} == {"notes", "retrieval", "message"}
    assert all(isinstance(item, AnswerItem) == (item.task != "message") for item in items)


def test_a_passage_stands_before_its_question_and_kind_is_another_word_for_task(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [
        {"passage": "Bees make honey. ", "question": "What do bees make?", "answer": "honey", "kind": "passages"},
        {"passage": "Rain is wet.", "prompt": "Is rain wet?", "task": "facts"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = read_items(path)
    assert isinstance(first, AnswerItem)
    assert first.prompt == "Bees make honey.\n\nQuestion: What do bees make?"
    assert (first.task, second.task) == ("passages", "facts")
    assert isinstance(second, PromptItem)
    path.write_text('{"passage": "x"}', encoding="utf-8")
    with pytest.raises(DataError, match="prompt"):
        read_items(path)
