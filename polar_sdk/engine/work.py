"""Count what was really executed for one row, layer by layer, as it happens.

The forward pass reports each visit after it has run, so a request that breaks off is counted up to its last finished
layer. Knows costs and counts only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.usage import FlopUsage, VisitUsage

if TYPE_CHECKING:
    from polar_sdk.cost import CostModel

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
        """Whether the prefill ran to its end."""

    def visit(self, layer: int, queries: int, keys: int, *, decoding: bool) -> None:
        """Count one finished visit of a layer with that many new tokens over that many keys."""
        flops = self._cost.layers[layer].flops(queries, keys)
        if decoding:
            self._decode_visits[layer] += 1
            self._decode_flops += flops
        else:
            self._prefill_visits[layer] += 1
            self._prefill_flops += flops

    def finish_pass(self, *, decoding: bool) -> None:
        """Count one finished pass through the program."""
        if decoding:
            self.decode_steps += 1
        else:
            self.prefilled = True

    def head(self, positions: int = 1) -> None:
        """Count logits computed for that many positions."""
        self._head_flops += self._cost.head * positions

    def visits(self) -> VisitUsage:
        """Executed visits per layer."""
        return VisitUsage(prefill=tuple(self._prefill_visits), decode=tuple(self._decode_visits))

    def flops(self, router: int = 0) -> FlopUsage:
        """Executed FLOPs by part, with those of the router added."""
        total = self._prefill_flops + self._decode_flops + self._head_flops + router
        return FlopUsage(
            layers_prefill=self._prefill_flops,
            layers_decode=self._decode_flops,
            head=self._head_flops,
            router=router,
            total=total,
        )
