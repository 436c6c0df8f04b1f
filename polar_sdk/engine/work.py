"""The work of a row: executed visits and FLOPs.

The forward pass reports what has run: a whole pass, or each finished step of an interrupted pass, so that a request is
counted up to its last finished layer. Knows costs and counts; no prices and no requests.
"""

from __future__ import annotations

from collections import Counter
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING

from polar_sdk.programs.cost import LayerCost
from polar_sdk.usage import FlopUsage, VisitUsage

if TYPE_CHECKING:
    from collections.abc import Collection

    from polar_sdk.programs.cost import CostModel, Piece, Share
    from polar_sdk.programs.program import Program


class Work:
    """Executed visits and FLOPs of one row."""

    def __init__(self, cost: CostModel, program: Program) -> None:
        self._cost, self._program = cost, program
        self._prefill_visits = [0] * cost.depth
        self._filled_visits = [0] * cost.depth
        self._decode_visits = [0] * cost.depth
        self._prefill_passes = self._decode_passes = 0
        """Whole passes of tokens that all run, whose visits are not in the lists."""
        self._prefill_flops = 0
        self._decode_flops = 0
        self._head_flops = 0
        self._draft_flops = 0
        """Executed for drafted tokens of which nobody has said yet that the answer keeps them."""
        self._drafted_pass = LayerCost(0, 0)
        """Cost of the steps that the last pass with drafts has finished."""
        self._draft_keys = 0
        """Number of keys that the first of its drafted tokens attends to that is not kept yet."""
        self.decode_steps = 0
        """Decode steps of the answer that ran to their end: one for each of its tokens, in whatever passes."""
        self.drafted = self.accepted = 0
        """Tokens that were drafted, and those of them that the answer kept."""
        self.prefilled = False
        """Whether the whole prompt has run; whoever feeds the row says so with `end_prefill`."""

    def copy(self) -> Work:
        """A copy of the counts, which later work does not change."""
        copied = copy(self)
        for name in ("_prefill_visits", "_filled_visits", "_decode_visits"):
            setattr(copied, name, list(getattr(self, name)))
        return copied

    def steps(self, piece: Piece, places: Collection[int], drafted: int = 0) -> None:
        """Count the finished steps of a pass, by their places in the program; its last `drafted` tokens are drafts."""
        if drafted:
            self._drafted_steps(piece, places, drafted)
            return
        if len(places) == len(self._program) and piece.runs_whole(self._program):
            self._whole_pass(piece)
            return
        for place, share in enumerate(self._cost.shares(self._program, piece)):
            if place in places:
                self._count(share)

    def _drafted_steps(self, piece: Piece, places: Collection[int], drafted: int) -> None:
        """Count the first token as the answer's, and all else as drafts, until `keep_draft` or `drop_pass`."""
        steps = [(step, self._cost.step(step)) for place, step in enumerate(self._program) if place in places]
        ran = LayerCost(sum(cost.linear for _, cost in steps), sum(cost.attention for _, cost in steps))
        first = ran.flops(1, piece.start + 1)
        self._decode_flops += first
        self._draft_flops += ran.flops(piece.end - piece.start, piece.end) - first
        for step, _ in steps:
            if not step.bridge:
                self._decode_visits[step.first] += 1
        self.drafted += drafted
        self._drafted_pass, self._draft_keys = ran, piece.start + 2

    def keep_draft(self) -> None:
        """Count one more drafted token of the last pass, and its logits, as the answer's."""
        self._keep(self._draft_keys, 1)
        self._draft_keys += 1
        self.accepted += 1

    def drop_pass(self) -> None:
        """Nothing of the last pass with drafts counts for the answer; its first token runs again."""
        self._keep(self._draft_keys - 1, -1)

    def guess(self, guesses: int, drafted: int) -> None:
        """Count guesses for a pass that runs N drafted tokens; those beyond that number count as drafted, too."""
        self._draft_flops += guesses * self._cost.guess
        self.drafted += max(guesses - drafted, 0)

    def _keep(self, keys: int, tokens: int) -> None:
        """Count a token over that many keys, and its logits, as the answer's instead of as a draft, or back (−1)."""
        flops = tokens * self._drafted_pass.flops(1, keys)
        self._decode_flops += flops
        self._head_flops += tokens * self._cost.head
        self._draft_flops -= flops + tokens * self._cost.head
        self.decode_steps += tokens

    def _count(self, share: Share) -> None:
        """Count one step; a bridge is not a visit, nor is a layer that no token ran."""
        step, parts, flops = share
        self._add(flops)
        if step.bridge:
            return
        visits = self._decode_visits if self.prefilled else self._prefill_visits
        visits[step.first] += bool(parts.running or parts.leaving)
        self._filled_visits[step.first] += bool(parts.filled)

    def _whole_pass(self, piece: Piece) -> None:
        self._add(self._whole.flops(piece.end - piece.start, piece.end))
        if self.prefilled:
            self._decode_passes += 1
        else:
            self._prefill_passes += 1

    @cached_property
    def _whole(self) -> LayerCost:
        """Cost of all steps together."""
        costs = [self._cost.step(step) for step in self._program]
        return LayerCost(sum(cost.linear for cost in costs), sum(cost.attention for cost in costs))

    def _add(self, flops: int) -> None:
        if self.prefilled:
            self._decode_flops += flops
        else:
            self._prefill_flops += flops

    def finish_pass(self) -> None:
        """Count one finished pass through the program."""
        if self.prefilled:
            self.decode_steps += 1

    def end_prefill(self) -> None:
        """The prompt has run to its end; what follows is decoding."""
        self.prefilled = True

    def head(self, positions: int = 1, drafted: int = 0) -> None:
        """Count logits computed for that many positions, and for that many drafted ones besides."""
        self._head_flops += self._cost.head * positions
        self._draft_flops += self._cost.head * drafted

    @property
    def total(self) -> int:
        """FLOPs executed so far for the answer, without those of the router."""
        return self._prefill_flops + self._decode_flops + self._head_flops

    @property
    def executed(self) -> int:
        """The same with those of drafts."""
        return self.total + self._draft_flops

    def next_token(self, keys: int) -> int:
        """FLOPs of one more token over that many keys, its own included."""
        return self._whole.flops(1, keys) + self._cost.head

    def visits(self) -> VisitUsage:
        """Executed visits per layer."""
        per_pass = Counter(self._program.layers)
        return VisitUsage(
            prefill=tuple(n + self._prefill_passes * per_pass[layer] for layer, n in enumerate(self._prefill_visits)),
            prefill_filled=tuple(self._filled_visits) if any(self._filled_visits) else (),
            decode=tuple(n + self._decode_passes * per_pass[layer] for layer, n in enumerate(self._decode_visits)),
        )

    def flops(self, router: int = 0) -> FlopUsage:
        """Executed FLOPs by part, with those of the router added; bridges count with the layers."""
        return FlopUsage(
            layers_prefill=self._prefill_flops,
            layers_decode=self._decode_flops,
            head=self._head_flops,
            router=router,
            total=self.total + router,
            drafts=self._draft_flops,
        )
