"""The prompts of a fit: the caller's own, or the package's, distributed evenly over kinds and lengths.

If the caller gives none, tasks of chains are made from the grammar of `synthetic` and from the package's prompts. Knows
no model.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import DataError
from polar_sdk.lab.fit.synthetic import decision_items, long_items, notes, task_items
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
