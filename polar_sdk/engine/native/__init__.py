"""Kernels of our own in C++, for what torch does slowly on processors with AVX512-BF16: see `library.py`."""

from polar_sdk.engine.native.library import (
    attend_pages,
    attend_prompt,
    attends,
    load_library,
    multiplies,
    multiplies_integers,
    product,
    product_int4,
    product_int8,
    version,
)

__all__ = [
    "attend_pages",
    "attend_prompt",
    "attends",
    "load_library",
    "multiplies",
    "multiplies_integers",
    "product",
    "product_int4",
    "product_int8",
    "version",
]
