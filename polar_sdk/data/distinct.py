"""Exact and near duplicates out, before anything is split: a test question must not have been trained on.

Texts are compared as sets of words and of pairs of neighbouring words, after case, punctuation and spacing are evened
out. Two items are near duplicates where their sets overlap by at least 80 % (Jaccard). The comparison is exact, not
sampled: sets that overlap so much must share one of their rarest members, so only those are looked up.

Which of several copies stays depends on their texts and not on their order.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from polar_sdk.data.items import ChoiceItem
from polar_sdk.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_sdk.data.items import Item

__all__ = ["NEAR", "data_hash", "distinct_items", "item_id", "normalised"]

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
