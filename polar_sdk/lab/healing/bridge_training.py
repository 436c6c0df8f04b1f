"""Train bridges, those of several groups in turns. Knows packs and bridges, no items."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from polar_sdk.engine.bridge import Bridge
from polar_sdk.errors import BridgeError
from polar_sdk.lab.healing.bridge_fit import layers
from polar_sdk.lab.healing.loss import ChoiceSlots, Reference, choice_scores, loss_of, slots_of
from polar_sdk.lab.healing.training import MEASURED, MapTrainer, TrainingPlan, sampled
from polar_sdk.programs.program import Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.lab.healing.bridge_fit import Pack
    from polar_sdk.programs.cost import Segment


class _Start(NamedTuple):
    """What one pack contributes to every step: N tokens, M of them predicted."""

    states: Tensor
    """Before the first layer that any program leaves out, (N, E)."""
    final: Tensor
    """Identity's last states where it predicts, (M, E)."""
    choices: ChoiceSlots | None
    scores: Tensor | None
    """Identity's scores of the choices, (Q, C)."""


@dataclass(frozen=True)
class BridgePlan(TrainingPlan):
    """How to train bridges.

    Attributes:
        choices: Weight of the difference between the choices' scores.
        labels: Weight of the cross-entropy on the right choice.
        drop: Probability that a bridge is left out in every other step and its layers run instead, so that the bridges
            also serve programs that use only some of them.
    """

    choices: float
    labels: float
    drop: float


class BridgeTrainer(MapTrainer):
    """Trains the bridges of all groups together; groups take turns.

    Args:
        decoder: See `MapTrainer`.
        packs: See `MapTrainer`.
        groups: Segments that are used together.
        bridges: Where training starts.
        plan: How to train.
        mark: See `MapTrainer`.
        checkpoint: See `MapTrainer`.
    """

    damaged = BridgeError

    def __init__(
        self,
        decoder: Decoder,
        packs: Sequence[Pack],
        groups: Sequence[Sequence[Segment]],
        bridges: Mapping[Segment, Bridge],
        plan: BridgePlan,
        mark: str,
        checkpoint: Path | None,
    ) -> None:
        super().__init__(
            decoder, packs, {segment: bridge.tensors for segment, bridge in bridges.items()}, plan, mark, checkpoint
        )
        self._groups, self._plan = groups, plan
        self._lead = min(group[0][0] for group in groups)
        self._starts: dict[int, _Start] = {}

    def bridges(self) -> dict[Segment, Bridge]:
        """The bridges as they are now, in the decoder's dtype."""
        exact = {segment: _bridge(values) for segment, values in self._trained().items()}
        return {segment: bridge.to(self._decoder.dtype, self._decoder.device) for segment, bridge in exact.items()}

    def _gradients(self, step: int, index: int) -> float:
        self._decoder.set_bridges({segment: _bridge(self._running(segment)) for segment in self._values})
        if index not in self._starts:
            self._starts[index] = self._start(self._packs[index])
        loss = self._loss(self._packs[index], self._starts[index], self._program(step), step)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def loss(self, packs: Sequence[Pack], bridges: Mapping[Segment, Bridge]) -> float:
        """Mean loss of bridges over packs and groups, with none dropped."""
        self._decoder.set_bridges(bridges)
        with torch.no_grad():
            values = [
                float(self._loss(pack, start, Program.bridging(self._decoder.depth, group), MEASURED))
                for pack, start in ((pack, self._start(pack)) for pack in packs)
                for group in self._groups
            ]
        return sum(values) / len(values)

    def _start(self, pack: Pack) -> _Start:
        with torch.no_grad():
            states = pack.run(self._decoder, pack.packed.embedded, layers(0, self._lead))
            final = pack.run(self._decoder, states, layers(self._lead, self._decoder.depth))[pack.sources]
            choices = slots_of(pack.tasks, self._decoder.device)
            scores = None if choices is None else choice_scores(self._decoder.head(final), pack.targets, choices)
            return _Start(states, final, choices, scores)

    def _loss(self, pack: Pack, start: _Start, program: Program, step: int) -> Tensor:
        ours = pack.run(self._decoder, start.states, program.steps[self._lead :])
        logits = self._decoder.head(ours[pack.sources])
        full = self._reference(start, step)
        plan = self._plan
        return loss_of(logits, full, pack.targets, start.choices, distil=plan.choices, labels=plan.labels)

    def _reference(self, start: _Start, step: int) -> Reference:
        rows = sampled(len(start.final), self._plan.seed, step).to(self._decoder.device)
        with torch.no_grad():
            return Reference(rows, self._decoder.head(start.final[rows]), start.scores)

    def _program(self, step: int) -> Program:
        """The program of the step's group; in every other step with some bridges dropped, but never all."""
        group = self._groups[step % len(self._groups)]
        dice = random.Random(f"{self._plan.seed} {step} drop")
        stays = dice.choice(group)
        dropping = step // len(self._groups) % 2 == 1
        kept = [segment for segment in group if segment == stays or not dropping or dice.random() >= self._plan.drop]
        return Program.bridging(self._decoder.depth, kept)


def _bridge(values: Sequence[Tensor]) -> Bridge:
    return Bridge(tuple(values[:-2]), values[-2], values[-1])
