"""Train fills on identity's own answers: only the maps learn, through the frozen layers above them.

All groups of segments take part in every step, each as one program; groups that share a segment train its map together.
A pack's states at full depth are computed once and kept, as long as they fit in some memory, so that later passes over
the packs begin with the first filled layer. Knows packs and fills, no items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from polar_sdk.errors import FillError
from polar_sdk.lab.healing.bridge_fit import layers
from polar_sdk.lab.healing.fill_fit import states
from polar_sdk.lab.healing.loss import fill_loss
from polar_sdk.lab.healing.training import MEASURED, MapTrainer, TrainingPlan, sampled
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.fill import Fill
    from polar_sdk.lab.healing.bridge_fit import Pack
    from polar_sdk.lab.healing.fill_fit import Group
    from polar_sdk.programs.cost import Segment


_MAX_KEPT: Final = 4 * 2**30
"""Memory for the states of packs at full depth: a hundred packs of the default model take 2.4 GB. Unit: bytes."""


@dataclass(frozen=True)
class FillPlan(TrainingPlan):
    """How to train fills.

    Attributes:
        hidden: Weight of the error of the last states.
        tail: Last tokens of each prompt that run all layers.
    """

    hidden: float
    tail: int


class _Start(NamedTuple):
    """What one pack contributes to every step: N tokens, M of them predicted."""

    entries: dict[int, Tensor]
    """States before the first filled layer of each group, (N, E), at full depth."""
    final: Tensor
    """Identity's last states where it predicts, (M, E)."""

    @property
    def bytes(self) -> int:
        """Size of its tensors. Unit: bytes."""
        return self.final.nbytes + sum(states.nbytes for states in self.entries.values())


class FillLoss:
    """How far programs that fill are from full depth.

    Args:
        decoder: A copy whose maps may be set; see `bridge_fit.trainable_copy`.
        groups: Segments that one program fills, for each program.
        plan: Its weights, tail and seed.
    """

    def __init__(self, decoder: Decoder, groups: Sequence[Group], plan: FillPlan) -> None:
        self._decoder, self._plan, self.groups = decoder, plan, tuple(groups)

    def means(self, packs: Sequence[Pack], fills: Mapping[Segment, Fill]) -> dict[Group, float]:
        """Mean loss of each group over packs."""
        decoder = self._decoder
        decoder.set_fills({segment: fill.to(decoder.dtype, decoder.device) for segment, fill in fills.items()})
        totals = dict.fromkeys(self.groups, 0.0)
        with torch.no_grad():
            for pack in packs:
                start = self.start(pack)
                for group in self.groups:
                    totals[group] += float(self.of(pack, start, group, MEASURED))
        return {group: total / len(packs) for group, total in totals.items()}

    def start(self, pack: Pack) -> _Start:
        """What a pack contributes, computed at full depth."""
        decoder, depth = self._decoder, self._decoder.depth
        entries: dict[int, Tensor] = {}
        with torch.no_grad():
            x = pack.packed.embedded
            for layer, x in states(decoder, pack, depth - 1):
                if any(group[0][0] == layer for group in self.groups):
                    entries[layer] = x
            return _Start(entries, pack.run(decoder, x, layers(depth - 1, depth))[pack.sources])

    def of(self, pack: Pack, start: _Start, group: Group, step: int) -> Tensor:
        """Loss of one group on one pack, with the fills that the decoder has."""
        decoder, plan, first = self._decoder, self._plan, group[0][0]
        program = Program.filling(decoder.depth, group, plan.tail)
        ours = pack.run(decoder, start.entries[first], program.steps[first:])[pack.sources]
        rows = sampled(len(start.final), plan.seed, step).to(decoder.device)
        with torch.no_grad():
            full = decoder.head(start.final[rows])
        return fill_loss(decoder.head(ours[rows]), full, ours, start.final, hidden=plan.hidden)


class FillTrainer(MapTrainer):
    """Trains the fills of all groups together.

    Args:
        decoder: See `MapTrainer`.
        packs: See `MapTrainer`.
        fills: Where training starts, by segment.
        groups: What is filled together.
        plan: How to train.
        mark: See `MapTrainer`.
        checkpoint: See `MapTrainer`.
    """

    damaged = FillError

    def __init__(
        self,
        decoder: Decoder,
        packs: Sequence[Pack],
        fills: Mapping[Segment, Fill],
        groups: Sequence[Group],
        plan: FillPlan,
        mark: str,
        checkpoint: Path | None,
    ) -> None:
        super().__init__(
            decoder, packs, {segment: fill.tensors for segment, fill in fills.items()}, plan, mark, checkpoint
        )
        self._kinds = dict(fills)
        self.loss = FillLoss(decoder, groups, plan)
        """What is trained down."""
        self._starts: dict[int, _Start] = {}
        self._room = _MAX_KEPT
        """Bytes that more packs' states may take."""

    def fills(self) -> dict[Segment, Fill]:
        """The fills as they are now, in float32."""
        return {segment: self._kinds[segment].of(values) for segment, values in self._trained().items()}

    def _gradients(self, step: int, index: int) -> float:
        start = self._starts.get(index)
        if start is None:
            start = self.loss.start(self._packs[index])
            if start.bytes <= self._room:
                self._room -= start.bytes
                self._starts[index] = start
        total = 0.0
        for group in self.loss.groups:  # one after another, so that one graph is held at a time
            self._decoder.set_fills({segment: self._kinds[segment].of(self._running(segment)) for segment in group})
            loss = self.loss.of(self._packs[index], start, group, step) / len(self.loss.groups)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total
