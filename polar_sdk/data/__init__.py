"""Prompts to learn from and to measure on: read, freed of duplicates, split. Knows no tokenizer and no model."""

from polar_sdk.data.distinct import data_hash, distinct_items, item_id, normalised
from polar_sdk.data.items import AnswerItem, ChoiceItem, Item, PromptItem, builtin_items, check_labels, read_items
from polar_sdk.data.splits import DEFAULT_SHARES, SPLITS, Shares, Split, split_of

__all__ = [
    "DEFAULT_SHARES",
    "SPLITS",
    "AnswerItem",
    "ChoiceItem",
    "Item",
    "PromptItem",
    "Shares",
    "Split",
    "builtin_items",
    "check_labels",
    "data_hash",
    "distinct_items",
    "item_id",
    "normalised",
    "read_items",
    "split_of",
]
