"""What a load has seen so far: ends, latencies and which requests were admitted, in few bytes per request.

Knows no ledger; `audit` compares the two.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

End = Literal["answered", "refused", "queue full", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class Sent:
    """How one request ended."""

    number: int
    tenant: str
    tier: str
    """That it was sent on."""
    end: End
    """`refused`: by a budget. `failed`: by an error, which `error` names."""
    latency: float
    """From the moment it was due to its end. Unit: seconds."""
    late: float
    """How long after that moment it was sent. Unit: seconds; included in `latency`."""
    answer: int | None = None
    """A hash of the tokens of the answer."""
    error: str | None = None


@dataclass
class Tally:
    """Counts requests that have ended; for one thread at a time.

    Args:
        keep_answers: Whether to keep a hash of each answer, to compare those of two trials.
    """

    keep_answers: bool = True
    ends: Counter[End] = field(default_factory=Counter)
    refused_by_tenant: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, array[float]] = field(default_factory=dict)
    """Tier → of its answered requests. Unit: seconds."""
    admitted: array[int] = field(default_factory=lambda: array("Q"))
    """Numbers of the arrivals whose records must be in the ledger."""
    failed: array[int] = field(default_factory=lambda: array("Q"))
    """Those whose records may be."""
    answers: dict[int, int] = field(default_factory=dict)
    """Number of the arrival → hash of its answer."""
    _tiers: dict[str, array[int]] = field(default_factory=dict)
    """Tier → numbers of its answered requests, where answers are kept."""
    latest: float = 0.0
    """By how much a request was sent late at most. Unit: seconds."""

    @property
    def sent(self) -> int:
        """All requests that have ended."""
        return self.ends.total()

    def add(self, one: Sent) -> None:
        """Count a request that has ended."""
        self.ends[one.end] += 1
        self.latest = max(self.latest, one.late)
        if one.error is not None:
            self.errors[one.error] += 1
        if one.end == "refused":
            self.refused_by_tenant[one.tenant] += 1
        elif one.end == "failed":
            self.failed.append(one.number)
        elif one.end in ("answered", "cancelled"):
            self.admitted.append(one.number)
        if one.end == "answered":
            self.latencies.setdefault(one.tier, array("d")).append(one.latency)
            if self.keep_answers and one.answer is not None:
                self.answers[one.number] = one.answer
                self._tiers.setdefault(one.tier, array("Q")).append(one.number)

    def numbers_of(self, tier: str) -> Sequence[int]:
        """Numbers of the arrivals answered on a tier, where answers are kept."""
        return self._tiers.get(tier, array("Q"))
