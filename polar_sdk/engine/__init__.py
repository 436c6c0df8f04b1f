"""Running programs: decoder families, key and value storage, the forward pass, sampling and generation.

Letters used for shapes throughout: B rows, N packed tokens of all rows, T tokens of one row, S keys, D layers,
E hidden size, H query heads, G key and value heads, d head size, V vocabulary.
"""

from typing import Final

ENGINE_VERSION: Final = "5"
"""Incremented with every change to the arithmetic that may change an answer; certificates hold for one version only."""
