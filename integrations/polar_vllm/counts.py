"""The work that a worker has executed, to be held against what was billed. Knows plans, and no vLLM.

Every sum is of tokens by layers. `executed` counts each token that ran a layer whole; of those, `repeated` had run it
before, as after a preemption or where drafts were rejected, and `unread` ran the last layer though nothing reads their
state. So `executed - repeated - unread` is what the programs need, as the formula (`polar_sdk.programs.cost`) counts.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_vllm.plan import Span, Stretch, Turn

_KEPT = 4096
"""Requests that are remembered, the last ones first; more than a server runs at once."""


class Counts:
    """Sums since the worker started.

    Args:
        depth: Layers of the model.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._sums = Counter(executed=0, left=0, filled=0, repeated=0, unread=0)
        self._reached: dict[str, int] = {}
        """How many tokens of a request have run, by its id."""

    def add(self, requests: Sequence[str], turns: Sequence[Turn], plan: Sequence[Stretch] | None) -> None:
        """Count a pass.

        Args:
            requests: Ids of the batch's requests.
            turns: Their new tokens.
            plan: How they ran; None = every token ran every layer.
        """
        reached = [self._reached.get(request, 0) for request in requests]
        sums, depth = self._sums, self._depth
        if plan is None:
            for (_, piece), old in zip(turns, reached, strict=True):
                sums["executed"] += depth * (piece.end - piece.start)
                sums["repeated"] += depth * _overlap(piece.start, piece.end, old)
                sums["unread"] += max(0, piece.wanted - max(piece.start, old))
        for stretch in plan or ():
            layers = stretch.after - stretch.first
            sums["executed"] += layers * _size(stretch.running)
            sums["repeated"] += layers * sum(_overlap(start, end, reached[row]) for row, start, end in stretch.running)
            sums["left"] += layers * _size(stretch.leaving)
            for (first, last), spans in stretch.filled.items():
                sums["filled"] += (last - first + 1) * _size(spans)
        for request, turn, old in zip(requests, turns, reached, strict=True):
            self._reached.pop(request, None)  # the last ones stand last
            self._reached[request] = max(old, turn.piece.end)
        while len(self._reached) > _KEPT:
            del self._reached[next(iter(self._reached))]

    def as_dict(self) -> Mapping[str, int]:
        """The sums by name."""
        return dict(self._sums)


def _size(spans: Iterable[Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _overlap(start: int, end: int, reached: int) -> int:
    return max(0, min(end, reached) - start)
