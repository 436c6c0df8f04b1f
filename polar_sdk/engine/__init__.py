"""Running programs: decoder families, key and value storage, the forward pass, sampling and generation.

Letters used for shapes throughout: B rows, N packed tokens of all rows, T tokens of one row, S keys, D layers,
E hidden size, H query heads, G key and value heads, d head size, V vocabulary.
"""

import os
from typing import Final

ENGINE_VERSION: Final = "6"
"""Incremented with every change to the arithmetic that may change an answer; certificates hold for one version only."""

# On a CPU, oneDNN and torch keep what they compiled for each number of rows that a matrix was multiplied by: up to
# 1,024 numbers at 0.6 MB, which prompts of all lengths reach within hours. Read at the first product, which is later.
for _capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "64")
