"""Whether a written answer is the right one. Knows texts only."""

from __future__ import annotations

import re
from typing import Final

from polar_sdk.data import normalised

__all__ = ["is_right"]

_NUMBER: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(written: str, answer: str) -> bool:
    """Whether what was written is the answer.

    Texts are compared after case, punctuation and spacing are evened out. Where the answer is a number, the last
    number that was written counts, so that working may come before it.
    """
    if _NUMBER.fullmatch(answer.strip()):
        numbers = _NUMBER.findall(written)
        return bool(numbers) and _value(numbers[-1]) == _value(answer.strip())
    return normalised(written) == normalised(answer)


def _value(number: str) -> float:
    return float(number.replace(",", ""))
