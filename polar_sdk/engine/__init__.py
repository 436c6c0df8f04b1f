"""Running programs: decoder families, key and value storage, the forward pass, sampling and generation.

Letters used for shapes throughout: B rows, N packed tokens of all rows, T tokens of one row, S keys, D layers,
E hidden size, H query heads, G key and value heads, d head size, V vocabulary.
"""

import os
from typing import Final

from polar_sdk.engine.allocator import keep_few_arenas

ENGINE_VERSION: Final = "6"
"""Incremented with every change to the arithmetic that may change an answer; certificates hold for one version only."""
_OF_INTEGERS: Final = "7"


def engine_version(dtype: str) -> str:
    """The version of the arithmetic of models whose weights are held like that, see `Decoder.dtype_name`."""
    return _OF_INTEGERS if dtype.startswith("int") else ENGINE_VERSION


# On a CPU, oneDNN and torch keep what they compiled for each number of rows that a matrix was multiplied by: up to
# 1,024 numbers at 0.6 MB, which prompts of all lengths reach within hours. Read at the first product, which is later.
for _capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "64")

keep_few_arenas()
