"""The work that a worker has executed, for comparison with what was billed. Knows plans, and no vLLM.

Every sum is of tokens by layers. `executed` counts each token that ran a layer whole. Of those

- `replayed` had run it before a preemption,
- `rejected` were drafts that the answer did not take,
- `unread` ran the last layer, though nothing reads their state,
- `late` ran for an answer that had ended, or ended before its first token.

The rest is what the answers need by the formula (`layer_tokens`), and so what their records need. If an answer was
interrupted, its record may need less, because of tokens that were not sent; `cut` is the total that such answers
needed. `left` and `filled` count tokens that did less than a layer. Fills are never missed: a pass with a token to fill
runs by plan.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from polar_sdk.programs.cost import layer_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_sdk.programs.program import Program
    from polar_vllm.plan import Span, Stretch, Turn


class End(NamedTuple):
    """How an answer ended."""

    tokens: int
    """Tokens of the answer, as the scheduler counts them."""
    is_cut: bool
    """Whether it was stopped from outside: its client left, or its text had a stop string."""


@dataclass
class _Run:
    """A request that runs."""

    program: Program
    prompt: int
    cached: int
    """Tokens of the prompt that it found in the cache."""
    reached: int
    """Position after the last token that has run, without rejected drafts."""
    drafts: int = 0
    """From this position on, the tokens of its last pass were drafts."""
    needed: int = 0
    """Its part of `executed` that was not replayed, rejected or unread."""


class Counts:
    """Sums since the worker started.

    Args:
        depth: Layers of the model.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        names = ("executed", "replayed", "rejected", "unread", "late", "cut", "left", "filled")
        self._sums = Counter(dict.fromkeys(names, 0))
        self._runs: dict[str, _Run] = {}

    def add(
        self, requests: Sequence[str], turns: Sequence[Turn], known: Sequence[int], plan: Sequence[Stretch] | None
    ) -> None:
        """Count a pass.

        Args:
            requests: Ids of the batch's requests.
            turns: Their new tokens.
            known: How many tokens of each are known; those after them are drafts.
            plan: How they ran; None = every token ran every layer.
        """
        runs = [self._run(*each) for each in zip(requests, turns, known, strict=True)]
        if plan is None:
            for (_, piece), run in zip(turns, runs, strict=True):
                self._ran(run, piece.start, piece.end, self._depth)
                unread = max(0, piece.wanted - max(piece.start, run.reached))
                self._sums["unread"] += unread
                run.needed -= unread
        for stretch in plan or ():
            layers = stretch.after - stretch.first
            for row, start, end in stretch.running:
                self._ran(runs[row], start, end, layers)
            self._sums["left"] += layers * _size(stretch.leaving)
            for (first, last), spans in stretch.filled.items():
                self._sums["filled"] += (last - first + 1) * _size(spans)
        for run, turn, drafts in zip(runs, turns, known, strict=True):
            run.reached, run.drafts = max(run.reached, turn.piece.end), drafts

    def end(self, ends: Mapping[str, End]) -> None:
        """Count what was wasted on answers that have ended, by the ids of their requests."""
        for request, (tokens, is_cut) in ends.items():
            if (run := self._runs.pop(request, None)) is None:
                continue
            self._reject(run, max(run.drafts, run.prompt + tokens - 1))
            needed = layer_tokens(run.program, run.prompt, tokens, cached=run.cached) if tokens else 0
            self._sums["late"] += run.needed - needed
            self._sums["cut"] += needed if is_cut else 0

    @property
    def running(self) -> int:
        """Number of requests that have begun and not ended."""
        return len(self._runs)

    def as_dict(self) -> Mapping[str, int]:
        """The sums by name."""
        return dict(self._sums)

    def _run(self, request: str, turn: Turn, known: int) -> _Run:
        piece = turn.piece
        if (run := self._runs.get(request)) is None:
            run = self._runs[request] = _Run(turn.program, piece.prompt, piece.start, piece.start)
        self._reject(run, max(piece.start, known - 1))  # the last known token was sampled, and runs now
        return run

    def _ran(self, run: _Run, start: int, end: int, layers: int) -> None:
        again = max(0, min(end, run.reached) - start)
        self._sums["executed"] += layers * (end - start)
        self._sums["replayed"] += layers * again
        run.needed += layers * (end - start - again)

    def _reject(self, run: _Run, kept: int) -> None:
        """Count tokens from the position `kept` on as rejected drafts, which ran every layer."""
        if (tokens := self._depth * (run.reached - kept)) > 0:
            self._sums["rejected"] += tokens
            run.needed -= tokens
            run.reached = kept


def _size(spans: Iterable[Span]) -> int:
    return sum(span.end - span.start for span in spans)
