"""Train bridges through the frozen rest of the model, so that its predictions approach those of full depth.

The base model's weights get no gradient. Every random choice depends on the seed and the step alone, so that a run that
was interrupted and resumed ends where an uninterrupted one does. Knows packs and bridges, no items.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from polar_sdk.engine.bridge import Bridge
from polar_sdk.errors import BridgeError
from polar_sdk.lab.healing.bridge_fit import layers
from polar_sdk.lab.healing.loss import ChoiceSlots, Reference, choice_scores, loss_of, slots_of
from polar_sdk.programs.program import Program
from polar_sdk.reading import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.lab.healing.bridge_fit import Pack
    from polar_sdk.programs.cost import Segment


_WARM_UP: Final = 15
"""Steps over which the learning rate rises."""
_CHECKPOINT_EVERY: Final = 20
"""Steps between checkpoints."""
_SAMPLED_TOKENS: Final = 256
"""Predicted tokens of a pack whose whole distributions are compared."""
_MEASURED: Final = -1
"""The step number of a loss that is measured, not trained."""


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
class DistilPlan:
    """How to train.

    Attributes:
        steps: Batches.
        rate: Peak learning rate of Adam.
        choices: Weight of the difference between the choices' scores.
        labels: Weight of the cross-entropy on the right choice.
        drop: Probability that a bridge is left out in every other step and its layers run instead, so that the bridges
            also serve programs that use only some of them.
        seed: Of the order and of dropping.
    """

    steps: int
    rate: float
    choices: float
    labels: float
    drop: float
    seed: int

    def rate_at(self, step: int) -> float:
        """Learning rate: a short rise, then half a cosine down to 5 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        return self.rate * min(1, (step + 1) / _WARM_UP) * (0.05 + 0.95 * cosine)


class BridgeTrainer:
    """Trains the bridges of all groups together; groups take turns.

    Args:
        decoder: A copy whose bridges may be set; see `fit.trainable_copy`.
        packs: What to train on.
        groups: Segments that are used together.
        bridges: Where training starts.
        plan: How to train.
        mark: Names the run's data, segments and settings; a checkpoint with another mark is refused.
        checkpoint: File of the checkpoint; None keeps none.
    """

    def __init__(
        self,
        decoder: Decoder,
        packs: Sequence[Pack],
        groups: Sequence[Sequence[Segment]],
        bridges: Mapping[Segment, Bridge],
        plan: DistilPlan,
        mark: str,
        checkpoint: Path | None,
    ) -> None:
        self._decoder, self._packs, self._groups = decoder, packs, groups
        self._plan, self._mark, self._checkpoint = plan, mark, checkpoint
        self._values = {
            segment: [tensor.detach().float().clone().requires_grad_() for tensor in bridge.tensors]
            for segment, bridge in bridges.items()
        }
        self._adam = torch.optim.Adam(self._all(), lr=plan.rate, betas=(0.9, 0.99))
        self._lead = min(group[0][0] for group in groups)
        self._starts: dict[int, _Start] = {}
        self.done = 0
        """Steps done."""
        self.losses: list[float] = []
        """One per step."""

    def run(self, on_step: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Train to the end of the plan; whatever stops it leaves a checkpoint."""
        consistent = True
        try:
            while self.done < self._plan.steps:
                self._backward(self.done)
                consistent = False  # interrupted from here on, the values would be half old and half new
                self._adam.step()
                self.done += 1
                consistent = True
                if self.done % _CHECKPOINT_EVERY == 0:
                    self.keep()
                on_step(self.done, self._plan.steps)
        except BaseException:
            if consistent:
                self.keep()
            raise

    def bridges(self) -> dict[Segment, Bridge]:
        """The bridges as they are now, in the decoder's dtype."""
        exact = {segment: _bridge([value.detach() for value in values]) for segment, values in self._values.items()}
        return {segment: bridge.to(self._decoder.dtype, self._decoder.device) for segment, bridge in exact.items()}

    def loss(self, packs: Sequence[Pack], bridges: Mapping[Segment, Bridge]) -> float:
        """Mean loss of bridges over packs and groups, with none dropped."""
        self._decoder.set_bridges(bridges)
        with torch.no_grad():
            values = [
                float(self._loss(pack, start, Program.bridging(self._decoder.depth, group), _MEASURED))
                for pack, start in ((pack, self._start(pack)) for pack in packs)
                for group in self._groups
            ]
        return sum(values) / len(values)

    def keep(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self._checkpoint is None:
            return
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{index}.value": value.detach() for index, value in enumerate(self._all())}
        for index, value in enumerate(self._all()):
            for name, moment in self._adam.state.get(value, {}).items():
                tensors[f"{index}.{name}"] = moment.detach().clone()
        draft = self._checkpoint.with_suffix(".tmp")
        save_file(tensors, draft, {"mark": self._mark, "done": str(self.done), "losses": json.dumps(self.losses)})
        draft.replace(self._checkpoint)

    def resume(self) -> bool:
        """Continue from the checkpoint; False where there is none.

        Raises:
            BridgeError: It is from another run, or damaged.
        """
        if self._checkpoint is None or not self._checkpoint.is_file():
            return False
        try:
            with safe_open(str(self._checkpoint), framework="pt", device=str(self._decoder.device)) as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError) as error:
            raise BridgeError(
                f"checkpoint {str(self._checkpoint)!r} cannot be read ({error}); start without --resume."
            ) from error
        if facts.get("mark") != self._mark:
            raise BridgeError(
                f"checkpoint {str(self._checkpoint)!r} is from a run with other data, segments or settings; use those "
                "again, or start without --resume."
            )
        try:
            self.done, self.losses = int(facts["done"]), parse_json(facts["losses"])
            self._restore(tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise BridgeError(
                f"checkpoint {str(self._checkpoint)!r} is damaged ({error}); start without --resume."
            ) from error
        return True

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for index, value in enumerate(self._all()):
            with torch.no_grad():
                value.copy_(tensors.pop(f"{index}.value"))
            moments = {name.partition(".")[2]: tensors[name] for name in tensors if name.startswith(f"{index}.")}
            if moments:
                self._adam.state[value] = moments

    def _all(self) -> list[Tensor]:
        return [value for values in self._values.values() for value in values]

    def _backward(self, step: int) -> None:
        """Gradients of one batch."""
        for group in self._adam.param_groups:
            group["lr"] = self._plan.rate_at(step)
        self._adam.zero_grad()
        self._decoder.set_bridges({segment: self._trainable(segment) for segment in self._values})
        index = self._pack_of(step)
        if index not in self._starts:
            self._starts[index] = self._start(self._packs[index])
        loss = self._loss(self._packs[index], self._starts[index], self._program(step), step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._all(), 1.0)
        del self.losses[step:]
        self.losses.append(float(loss.detach()))

    def _trainable(self, segment: Segment) -> Bridge:
        return _bridge([value.to(self._decoder.dtype) for value in self._values[segment]])

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
        predicted = len(start.final)
        dice = random.Random(f"{self._plan.seed} {step} shown")
        rows = sorted(dice.sample(range(predicted), min(_SAMPLED_TOKENS, predicted)))
        sampled = torch.tensor(rows, device=self._decoder.device)
        with torch.no_grad():
            return Reference(sampled, self._decoder.head(start.final[sampled]), start.scores)

    def _pack_of(self, step: int) -> int:
        """Index of a step's pack: each pack once per epoch, in an order of the epoch's own."""
        epoch, place = divmod(step, len(self._packs))
        order = list(range(len(self._packs)))
        random.Random(f"{self._plan.seed} {epoch}").shuffle(order)
        return order[place]

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
