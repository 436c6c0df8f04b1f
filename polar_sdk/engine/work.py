"""Count what was really executed for one row, step by step, as it happens.

The forward pass reports each step after it has run, so a request that breaks off is counted up to its last finished
layer. Knows costs and counts only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.usage import FlopUsage, VisitUsage

if TYPE_CHECKING:
    from polar_sdk.cost import CostModel
    from polar_sdk.program import Step

__all__ = ["Work"]


class Work:
    """Executed visits and FLOPs of one row."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._prefill_visits = [0] * cost.depth
        self._decode_visits = [0] * cost.depth
        self._prefill_flops = 0
        self._decode_flops = 0
        self._head_flops = 0
        self.decode_steps = 0
        """Decode steps that ran to their end."""
        self.prefilled = False
        """Whether the whole prompt has run; whoever feeds the row says so with `end_prefill`."""

    def step(self, step: Step, queries: int, keys: int) -> None:
        """Count one finished step with that many new tokens over that many keys; a bridge is no visit."""
        flops = self._cost.step(step).flops(queries, keys)
        visits = self._decode_visits if self.prefilled else self._prefill_visits
        if self.prefilled:
            self._decode_flops += flops
        else:
            self._prefill_flops += flops
        if not step.bridge:
            visits[step.first] += 1

    def finish_pass(self) -> None:
        """Count one finished pass through the program."""
        if self.prefilled:
            self.decode_steps += 1

    def end_prefill(self) -> None:
        """The prompt has run to its end; what follows is decoding."""
        self.prefilled = True

    def head(self, positions: int = 1) -> None:
        """Count logits computed for that many positions."""
        self._head_flops += self._cost.head * positions

    def visits(self) -> VisitUsage:
        """Executed visits per layer."""
        return VisitUsage(prefill=tuple(self._prefill_visits), decode=tuple(self._decode_visits))

    def flops(self, router: int = 0) -> FlopUsage:
        """Executed FLOPs by part, with those of the router added; bridges count with the layers."""
        total = self._prefill_flops + self._decode_flops + self._head_flops + router
        return FlopUsage(
            layers_prefill=self._prefill_flops,
            layers_decode=self._decode_flops,
            head=self._head_flops,
            router=router,
            total=total,
        )
