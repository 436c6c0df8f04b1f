"""When an answer in text counts as lost: one rule for calibration and for audits.

The reference is identity's own greedy answer. A program keeps those tokens of it that it would also choose, given the
tokens before them (teacher-forced).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.promises.audit import AuditedLoss

ANSWER_TOKENS: Final = 48
"""Maximum tokens of identity's answers to prompts."""
SAME_ANSWER: Final = 0.75
"""Share of the tokens of identity's answer that a program must choose too, for its answer to count as the same one.

Not all of them: where two tokens are almost as likely, identity itself chooses otherwise 1 time in 100 when it is run
in other packs, and one such token in an answer changes nothing that a reader would notice.
"""
STRICT_ANSWER: Final = 0.95
"""Share of the tokens of identity's answer that a program must choose too where a promise is strict."""
_ROUNDING: Final = 1e-6
"""Shares may have been held in float32."""


def tokens_kept(chosen: Sequence[int], reference: Sequence[int]) -> int:
    """Number of places at which a program chose what identity chose."""
    return sum(a == b for a, b in zip(chosen, reference, strict=True))


def is_lost(share: float, loss: AuditedLoss) -> bool:
    """Whether an answer of which this share is kept counts as lost."""
    return share < (STRICT_ANSWER if loss == "strict" else SAME_ANSWER) - _ROUNDING
