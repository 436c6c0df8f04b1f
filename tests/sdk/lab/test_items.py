"""Data files: what is read, what counts as a duplicate, and that splits do not move."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.errors import DataError
from polar_sdk.lab.fit.prompts import worded
from polar_sdk.lab.fit.synthetic import (
    STEPS,
    TASKS,
    decision_items,
    decisions,
    long_items,
    messages,
    notes,
    passages,
    task_items,
)
from polar_sdk.lab.items import (
    NEAR,
    SPLITS,
    AnswerItem,
    ChoiceItem,
    Item,
    PromptItem,
    Shares,
    builtin_items,
    check_labels,
    data_hash,
    distinct_items,
    item_id,
    normalised,
    read_items,
    split_of,
)

if TYPE_CHECKING:
    import random
    from pathlib import Path

WORDS = st.lists(st.sampled_from(["a", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]), min_size=1, max_size=12)
PROMPTS = st.lists(WORDS.map(lambda words: PromptItem(prompt=" ".join(words))), min_size=2, max_size=25)


def overlap(one: PromptItem, other: PromptItem) -> float:
    """Jaccard overlap of words and pairs of neighbouring words, from its definition."""
    words = [normalised(item.prompt).split() for item in (one, other)]
    left, right = ({*some, *map(" ".join, pairwise(some))} for some in words)
    return len(left & right) / len(left | right)


@given(PROMPTS)
def test_no_two_that_stay_are_near_duplicates_and_every_other_has_one_that_stays(items: list[PromptItem]) -> None:
    """The index by rare members finds exactly what comparing all pairs finds."""
    try:
        kept = distinct_items(items)
    except DataError:
        assert any(all(overlap(item, one) >= NEAR for item in items) for one in items)
        return
    prompts = [item for item in kept if isinstance(item, PromptItem)]
    assert all(overlap(a, b) < NEAR for number, a in enumerate(prompts) for b in prompts[:number])
    assert all(any(overlap(item, one) >= NEAR for one in prompts) for item in items)


@given(PROMPTS, st.randoms(use_true_random=False))
def test_what_stays_does_not_depend_on_order(items: list[PromptItem], dice: random.Random) -> None:
    mixed = items.copy()
    dice.shuffle(mixed)
    try:
        kept = distinct_items(items)
    except DataError:
        with pytest.raises(DataError):
            distinct_items(mixed)
    else:
        assert set(distinct_items(mixed)) == set(kept)
        assert kept == [item for item in dict.fromkeys(items) if item in kept]


def test_copies_differ_in_case_punctuation_spacing_and_order_of_choices_only() -> None:
    one = ChoiceItem(question="What is up?", choices=("the sky", "a dog"), answer=0)
    items: list[Item] = [
        PromptItem(prompt="Hello,  World!"),
        PromptItem(prompt="hello world"),
        one,
        ChoiceItem(question="what is UP", choices=("A dog.", "The sky."), answer=1),
        PromptItem(prompt="What is 17 + 26?"),
        PromptItem(prompt="What is 17 - 26?"),
        PromptItem(prompt="???"),
        PromptItem(prompt="!"),
    ]
    kept = distinct_items(items)
    assert len(kept) == 6
    assert item_id(items[2]) == item_id(items[3])
    assert {normalised("今日は晴れ"), normalised("今日 は 晴れ")} == {"今 日 は 晴 れ"}


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=30, unique=True), st.integers(0, 5))
def test_an_item_stays_in_its_split_when_the_file_is_shuffled_or_grows(texts: list[str], seed: int) -> None:
    before = {text: split_of(text, seed=seed) for text in texts[: len(texts) // 2]}
    after = {text: split_of(text, seed=seed) for text in reversed(texts)}
    assert before.items() <= after.items()


def test_shares_are_met_on_average_and_a_seed_deals_anew() -> None:
    ids = [str(number) for number in range(8000)]
    counts = Counter(split_of(one, Shares(0.4, 0.3, 0.2, 0.1)) for one in ids)
    assert [round(counts[split] / 8000, 1) for split in SPLITS] == [0.4, 0.3, 0.2, 0.1]
    assert sum(split_of(one) != split_of(one, seed=1) for one in ids) > 4000
    assert {split_of(one, Shares(0, 0, 1, 0)) for one in ids[:500]} == {"calibration"}


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, 0), (1.5, -0.5, 0, 0), (float("nan"), 0, 0, 1)])
def test_shares_that_are_none(shares: tuple[float, float, float, float]) -> None:
    with pytest.raises(DataError, match="add up to 1"):
        Shares(*shares).check()


def test_all_three_forms_are_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a b"},
        {"prompt": "2 + 2", "answer": "4"},
        {"question": "3 + 3", "answer": "6", "solution": "counted"},
        {"question": "q", "choices": ["x", "y"], "answer": 1},
        {"prompt": "a\u2028b"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_items(file) == [
        PromptItem(prompt="a b"),
        AnswerItem(prompt="2 + 2", answer="4"),
        AnswerItem(prompt="3 + 3", answer="6"),
        ChoiceItem(question="q", choices=("x", "y"), answer=1),
        PromptItem(prompt="a\u2028b"),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no prompt"),
        ("nonsense", r"data\.jsonl:1: .*JSON"),
        ("[1]", r"data\.jsonl:1: line"),
        ('{"prompt": " "}', r"data\.jsonl:1: prompt"),
        ('{"answer": "4"}', r"data\.jsonl:1: prompt"),
        ('{"prompt": "p", "answer": 4}', r"data\.jsonl:1: answer"),
        ('{"question": "q", "choices": ["only"], "answer": 0}', r"data\.jsonl:1: .*2 choices"),
        ('{"question": "q", "choices": ["a", "b"]}', r"data\.jsonl:1: answer"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "a"}', r"data\.jsonl:1: .*'a'"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', r"data\.jsonl:1: .*2 is not an index of 2"),
    ],
)
def test_a_line_without_a_valid_form_is_named(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=says):
        read_items(file)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_items(tmp_path / "none.jsonl")


def test_a_file_of_copies_is_told_from_a_file_of_one(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "p"}\n' * 3)
    with pytest.raises(DataError, match=r"all 3 prompts of data file .* are copies of one"):
        read_items(file)
    file.write_text('{"prompt": "p"}\n{"prompt": "p "}\n\n{"prompt": "q"}\n{"prompt": "r"}\n')
    assert [item.prompt for item in read_items(file, limit=2) if isinstance(item, PromptItem)] == ["p", "q"]


def test_a_task_is_read_and_is_no_part_of_what_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "p", "task": " chat "}\n{"prompt": "q", "task": 7}\n{"prompt": "r"}')
    first, second, third = read_items(file)
    assert (first.task, second.task, third.task) == ("chat", None, None)
    bare = PromptItem(prompt="p")
    assert item_id(first) == item_id(bare) and data_hash([first]) == data_hash([bare])


def test_sets_that_hold_nothing_to_learn_from() -> None:
    with pytest.raises(DataError, match="no prompt"):
        distinct_items([])
    with pytest.raises(DataError, match="all 3 prompts are copies of one"):
        distinct_items([PromptItem(prompt=text) for text in ("Hi", "hi!", " HI ")])
    assert distinct_items([PromptItem(prompt="Hi")]) == [PromptItem(prompt="Hi")]
    same = [ChoiceItem(question=text, choices=("x", "y"), answer=1) for text in ("a", "b", "c")]
    with pytest.raises(DataError, match="all 3 choice questions is index 1"):
        check_labels([*same, PromptItem(prompt="p")])
    check_labels([*same, ChoiceItem(question="d", choices=("x", "y"), answer=0)])
    check_labels(same[:1])


def test_the_hash_of_a_set_knows_answers_and_no_order() -> None:
    one = ChoiceItem(question="q", choices=("x", "y"), answer=1)
    other = PromptItem(prompt="p")
    assert data_hash([one, other]) == data_hash([other, one])
    assert data_hash([one]) != data_hash([one.model_copy(update={"answer": 0})])


def test_the_prompts_of_the_package() -> None:
    items = builtin_items()
    kinds = Counter(item.task for item in items)
    assert min(kinds.values()) >= 20
    assert distinct_items(items) == items  # no near duplicates among them


# -- long prompts made from a grammar -----------------------------------------------------------------------------


def test_the_asked_fact_stands_at_the_stated_depth() -> None:
    for text in notes(80, seed=1, facts=(9, 21)):
        lines = [line for line in text.prompt.split("\n") if line]
        (asked,) = (line for line in lines if line.endswith("?"))
        facts = [line for line in lines if line != asked and not line.startswith("Notes of")]
        subject = next(word for word in reversed(asked.rstrip("?").split()) if word[0].isupper())
        holding = [place for place, line in enumerate(facts) if text.answer in line and f" {subject}" in line]
        assert round(text.depth * (len(facts) - 1)) in holding


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


def test_chains_ask_what_a_text_tells_and_what_it_does_not() -> None:
    items = task_items(100, seed=2)
    assert items[: 2 * len(TASKS | STEPS)] == task_items(2, seed=2)
    assert len(distinct_items(items)) > 0.9 * len(items)
    assert Counter(item.task for item in items) == dict.fromkeys(TASKS | STEPS, 100)
    graded = [re.split("Question: |this question\\? ", item.prompt) for item in items if item.task == "grading"]
    told = [any(f"{name} " in text or f"{name}." in text for name in _projects(asked)) for text, asked in graded]
    assert 25 <= sum(told) <= 75


def test_the_right_choice_of_a_decision_follows_from_its_text() -> None:
    made = decisions(24, seed=3)
    assert made[:10] == decisions(2, seed=3) and len({one.prompt for one in made}) == len(made)
    for one in made:
        right = one.choices[one.answer]
        if one.kind in ("support", "relevance"):
            told = one.prompt.replace("\n", " ")
            asked = re.search(r"(?:Statement|Question): ([^\n]+)|from the text above\? ([^?]+\?)", one.prompt)
            assert asked is not None
            if one.kind == "support":
                assert (told.count(asked[1]) == 2) == (right == "Yes")
        elif one.kind == "letter":
            answer = re.search(rf"{right}\. ([^\n]+)", one.prompt)
            assert answer is not None and one.prompt.count(answer[1]) >= 2
        elif one.kind == "tool":
            assert f"- {right}(" in one.prompt
    for kind, choices in {"support": 2, "relevance": 2, "letter": 4, "tool": 4, "sort": 3}.items():
        assert set(Counter(one.answer for one in made if one.kind == kind).values()) == {24 // choices}


def test_decisions_in_unseen_wordings_ask_what_the_others_ask() -> None:
    seen, unseen = decisions(4, seed=3), decisions(4, seed=3, unseen=True)
    assert [(one.kind, one.choices, one.answer) for one in seen] == [
        (one.kind, one.choices, one.answer) for one in unseen
    ]
    assert not {one.prompt for one in seen} & {one.prompt for one in unseen}


def test_worded_decisions_are_about_the_texts_of_a_fit() -> None:
    texts = [PromptItem(prompt=f"{name} lives in the north. " * 12, task="letters") for name in ("Ada", "Bo")]
    decided = PromptItem(prompt="Is Ada at home? Answer Yes or No. " * 12, task="decision, own")
    made = worded([*texts, decided])
    assert made == worded([*texts, decided])
    assert Counter(item.task for item in made) == {"decision, worded": 300, None: 300}
    assert all("lives in the north" in item.prompt and "Is Ada at home" not in item.prompt for item in made)
    assert worded(texts) == worded([decided]) == []


def test_decisions_are_of_one_wide_class() -> None:
    assert Counter(item.task for item in decision_items(3)) == {
        f"decision, {kind}": 3 for kind in ("support", "relevance", "letter", "tool", "sort")
    }


def _projects(question: str) -> list[str]:
    """Names in a question, without the word that it begins with."""
    return re.findall(r" ([A-Z][a-z]+)", question.split("?", maxsplit=1)[0])


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
