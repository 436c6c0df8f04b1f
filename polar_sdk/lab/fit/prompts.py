"""The prompts of a fit: the caller's own, or the package's, distributed evenly over kinds and lengths.

If the caller gives none, tasks of chains are made from the grammar of `synthetic` and from the package's prompts. Knows
no model.
"""

from __future__ import annotations

import random
from itertools import islice
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import DataError
from polar_sdk.lab.fit.synthetic import decision_items, long_items, notes, step_parts, task_items
from polar_sdk.lab.items import AnswerItem, ChoiceItem, PromptItem, builtin_items, distinct_items, item_id, text_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_sdk.lab.items import Item

_MADE: Final = 240
"""Prompts about texts that are made of each kind."""
_LENGTHS: Final = (400, 2000)
"""Characters between which lengths differ: some 100 and 500 tokens."""
_FACTS: Final = (15, 24)
"""Facts in the notes that are asked about: some 430 to 720 tokens."""
_CHOICES: Final = 3
"""Questions with choices beside each text: they are short, and a change of the right answers is mostly chance."""
_WORDED: Final = 300
"""Decisions in many wordings, and as many requests that only resemble them."""
_A_TEXT: Final = 150
"""Characters from which a prompt can stand for a text that something is asked about."""
_WHETHER: Final = (
    "Does the text support this statement? {statement}",
    "Is this true, going by the text? {statement}",
    "Statement: {statement} Does it follow from the text?",
    "Can this question be answered from the text? {question}",
    "Is the text relevant to the question? {question}",
    "Does it say anything about {name}?",
    "Is a person named in it?",
    "Was it written by {person}?",
    "Does it contain a complaint?",
    "Is this answer right? {answer}",
    "Is it safe to show this to a customer?",
    "Should a person read this before it is sent?",
)
_YES_OR_NO: Final = (
    "Answer Yes or No.",
    "Reply with yes or no only.",
    "(yes/no)",
    "True or false?",
    "Output true or false.",
    "Say 1 for yes and 0 for no.",
    "Answer in a single word, yes or no.",
    "Respond YES or NO, nothing else.",
    "Just yes or no, no explanation.",
    "Answer (yes or no):",
)
_WHICH: Final = (
    "Which sort of text is this: letter, minutes, guide or report?",
    "Is the tone friendly, neutral or angry?",
    "Which department should get it, sales, accounts or repairs?",
    "Which language is it in?",
    "Choose the topic: travel, work, money or health.",
    "How urgent is it: low, medium or high?",
    "Label its sentiment: good, bad or mixed.",
    "Which of these tools serves it: book_room, send_mail or none?",
    "Pick the option that fits. A: a question, B: an order, C: a complaint.",
)
_A_LABEL: Final = (
    "Answer with one word.",
    "Reply with the label only.",
    "Give just the name, without an explanation.",
    "Label:",
    "Category:",
    "Return the class and nothing else.",
    "Output only one of these words.",
    "Answer with the letter only.",
)
_HOW_FAR: Final = (
    "How well does the text answer this question? {question}",
    "How relevant is the text to {name}?",
    "Rate how clear the text is.",
    "How sure is the writer?",
    "How far does the text support this? {statement}",
)
_A_SCORE: Final = (
    "Give a number from 0 to 10 only.",
    "Score from 1 to 5, just the digit:",
    "Answer with a single number.",
    "Only the score.",
    "Rating (1-10):",
)
_TASKS: Final = (
    "Summarise this letter in one sentence.",
    "Summarise it in one sentence.",
    "What does the writer want? Answer in one sentence.",
    "Write a reply to this letter.",
    "Rewrite the letter as minutes.",
    "Which tools are named here, and what does each do?",
    "Continue the text with one more paragraph.",
    "Translate the text into Italian.",
    "What happened first, and what then?",
    "List all names and numbers, one per line.",
    "Give a title of at most five words.",
    "What is said about {name}?",
    "{question}",
    "{question} Answer in one sentence.",
    "{question} Answer with a short phrase.",
    "Turn it into a table of names and tasks.",
    "Write a question with the answers A, B, C and D about this text.",
)
_IN_WORDS: Final = (
    "Explain why.",
    "Give your reasons.",
    "Quote what shows it.",
    "Answer in one or two sentences.",
    "Explain step by step.",
    "Answer briefly.",
    "Write it as JSON.",
)
_ORDERS: Final = (
    "{text}\n\n{asked} {form}",
    "{asked} {form}\n\n{text}",
    "{form} {asked}\n\n{text}",
    "Text:\n{text}\n\nTask: {asked}\n{form}",
    "{asked}\n\nText: {text}\n\n{form}",
    "You check texts for us. {form}\n\n{text}\n\n{asked}",
    "{text}\n\n{form} {asked}",
)
_DECIDES: Final = ((_WHETHER, _YES_OR_NO), (_WHICH, _A_LABEL), (_HOW_FAR, _A_SCORE))
"""What decisions ask, and in which form they want the answer."""
_EXPLAINS: Final = ((_TASKS, ("", "", *_IN_WORDS)), ((*_WHETHER, *_WHICH, *_HOW_FAR), _IN_WORDS))
"""The same of requests in like words that take a sentence or more."""


def prompts_of(data: Sequence[Item] | None, limit: int | None = None, *, right: bool = False) -> list[Item]:
    """The distinct prompts in the order in which they are taken: kinds and lengths in turn, each by hash.

    Beside each text there are three questions with choices, where the data has them. So the first N of them are as
    mixed as all are, and a larger N keeps what a smaller one had.

    Args:
        data: The caller's; None = the package's own.
        limit: Maximum number.
        right: Whether right answers in text count; if not, such prompts are bare ones, compared with full depth.

    Raises:
        DataError: There is none, or all are copies of one.
    """
    items = _own_prompts() if data is None else data
    if not items:
        raise DataError("the data holds no prompt; give at least one.")
    lots: dict[bool, dict[tuple[str, int], list[Item]]] = {False: {}, True: {}}
    for item in sorted(distinct_items(items), key=item_id):
        bare = isinstance(item, AnswerItem) and not right
        taken = PromptItem(prompt=text_of(item), task=item.task) if bare else item
        of_form = lots[isinstance(item, ChoiceItem)]
        of_form.setdefault((item.task or "", _length(item)), []).append(taken)
    texts, choices = ([*_in_turn(of_form[name] for name in sorted(of_form))] for of_form in lots.values())
    left = iter(choices)
    mixed = [item for text in texts for item in (text, *islice(left, _CHOICES))]
    return [*mixed, *left][:limit]


def fact_items(count: int) -> list[AnswerItem]:
    """Questions about one fact in long notes; none of them is among the package's own prompts."""
    made = notes(count, seed=2, facts=_FACTS)
    return [AnswerItem(prompt=text.prompt, answer=text.answer, task="facts") for text in made]


def worded(items: Sequence[Item]) -> list[PromptItem]:
    """Decisions, in turn with other requests in like words, about the texts of these items; none if none is a decision.

    Nobody need answer them: they show a router by which words a decision is told, whatever it is about. Of decisions in
    other wordings than those of a fit, its router recognised a third without them.
    """
    texts = [text_of(item) for item in items if not (isinstance(item, ChoiceItem) or _decides(item))]
    texts = [text for text in texts if len(text) >= _A_TEXT]
    made = []
    for place in range(_WORDED if texts and any(map(_decides, items)) else 0):
        for task, pairs in (("decision, worded", _DECIDES), ("", _EXPLAINS)):
            dice = random.Random(f"{task} {place}")
            asks, forms = pairs[place % len(pairs)]
            asked = dice.choice(asks).format(**step_parts(dice))
            prompt = dice.choice(_ORDERS).format(text=dice.choice(texts), asked=asked, form=dice.choice(forms))
            made.append(PromptItem(prompt=prompt.strip(), task=task or None))
    return made


def _decides(item: Item) -> bool:
    return (item.task or "").startswith("decision")


def _own_prompts() -> list[Item]:
    return [*builtin_items(), *long_items(_MADE, seed=1), *task_items(_MADE, seed=1), *decision_items(_MADE, seed=1)]


def _in_turn(lots: Iterable[list[Item]]) -> Iterable[Item]:
    left = [list(lot) for lot in lots]
    while left:
        for lot in left:
            yield lot.pop(0)
        left = [lot for lot in left if lot]


def _length(item: Item) -> int:
    size = len(text_of(item))
    return sum(size >= edge for edge in _LENGTHS)
