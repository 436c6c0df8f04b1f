"""Training of maps through the frozen rest of the model, so that its predictions approach those of full depth.

The base model's weights get no gradient. Every random choice depends on the seed and the step alone, so that a run that
was interrupted and resumed ends where an uninterrupted one does. Here is what the trainers of bridges and of fills have
in common. Knows packs and tensors, no items.
"""

from __future__ import annotations

import json
import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from polar_sdk.engine.native import has_tiles
from polar_sdk.errors import PolarError
from polar_sdk.reading import parse_json
from polar_sdk.writing import replacing

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
MEASURED: Final = -1
"""The step number of a loss that is measured, not trained."""


@dataclass(frozen=True)
class TrainingPlan:
    """How to train.

    Attributes:
        steps: Batches.
        rate: Peak learning rate of Adam.
        seed: Of the order, and of everything else that is drawn.
    """

    steps: int
    rate: float
    seed: int

    def rate_at(self, step: int) -> float:
        """Learning rate: a short rise, then half a cosine down to 5 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        return self.rate * min(1, (step + 1) / _WARM_UP) * (0.05 + 0.95 * cosine)


class MapTrainer(ABC):
    """Trains the maps of segments, one pack per step.

    Args:
        decoder: A copy whose maps may be set; see `bridge_fit.trainable_copy`.
        packs: What to train on.
        values: Where training starts: the tensors of each segment's map.
        plan: How to train.
        mark: Names the run's data, segments and settings; a checkpoint with another mark is refused.
        checkpoint: File of the checkpoint; None keeps none.
    """

    damaged: type[PolarError] = PolarError
    """Raised for a checkpoint that cannot be used."""

    def __init__(
        self,
        decoder: Decoder,
        packs: Sequence[Pack],
        values: Mapping[Segment, Sequence[Tensor]],
        plan: TrainingPlan,
        mark: str,
        checkpoint: Path | None,
    ) -> None:
        self._decoder, self._packs = decoder, packs
        self._schedule, self._mark, self._checkpoint = plan, mark, checkpoint
        self._values = {
            segment: [tensor.detach().float().clone().requires_grad_() for tensor in tensors]
            for segment, tensors in values.items()
        }
        self._adam = torch.optim.Adam(self._all(), lr=plan.rate, betas=(0.9, 0.99))
        self.done = 0
        """Steps done."""
        self.losses: list[float] = []
        """One per step."""

    def run(self, on_step: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Train to the end of the plan; whatever stops it leaves a checkpoint."""
        consistent = True
        try:
            while self.done < self._schedule.steps:
                self._backward(self.done)
                consistent = False  # interrupted from here on, the values would be half old and half new
                self._adam.step()
                self.done += 1
                consistent = True
                if self.done % _CHECKPOINT_EVERY == 0:
                    self.keep()
                on_step(self.done, self._schedule.steps)
        except BaseException:
            if consistent:
                self.keep()
            raise

    @abstractmethod
    def _gradients(self, step: int, index: int) -> float:
        """Add the gradients of one step on the pack of that index; returns the loss."""

    def _backward(self, step: int) -> None:
        """Gradients of one batch."""
        for group in self._adam.param_groups:
            group["lr"] = self._schedule.rate_at(step)
        self._adam.zero_grad()
        device = self._decoder.device
        with torch.autocast(device.type, torch.bfloat16, enabled=_halves_pay(device)):
            loss = self._gradients(step, self._pack_of(step))
        torch.nn.utils.clip_grad_norm_(self._all(), 1.0)
        del self.losses[step:]
        self.losses.append(loss)

    def _trained(self) -> dict[Segment, list[Tensor]]:
        """The maps' tensors as they are now, in float32."""
        return {segment: [value.detach().clone() for value in values] for segment, values in self._values.items()}

    def _running(self, segment: Segment) -> list[Tensor]:
        """The tensors of one map in the decoder's dtype, with derivatives."""
        return [value.to(self._decoder.dtype) for value in self._values[segment]]

    def keep(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self._checkpoint is None:
            return
        tensors = {f"{index}.value": value.detach() for index, value in enumerate(self._all())}
        for index, value in enumerate(self._all()):
            for name, moment in self._adam.state.get(value, {}).items():
                tensors[f"{index}.{name}"] = moment.detach().clone()
        with replacing(self._checkpoint) as draft:
            save_file(tensors, draft, {"mark": self._mark, "done": str(self.done), "losses": json.dumps(self.losses)})

    def resume(self) -> bool:
        """Continue from the checkpoint; False where there is none.

        Raises:
            PolarError: The error of `damaged`: it is from another run, or damaged.
        """
        if self._checkpoint is None or not self._checkpoint.is_file():
            return False
        try:
            with safe_open(str(self._checkpoint), framework="pt", device=str(self._decoder.device)) as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError) as error:
            raise self.damaged(
                f"checkpoint {str(self._checkpoint)!r} cannot be read ({error}); start without --resume."
            ) from error
        if facts.get("mark") != self._mark:
            raise self.damaged(
                f"checkpoint {str(self._checkpoint)!r} is from a run with other data, segments or settings; use those "
                "again, or start without --resume."
            )
        try:
            self.done, self.losses = int(facts["done"]), parse_json(facts["losses"])
            self._restore(tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise self.damaged(
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

    def _pack_of(self, step: int) -> int:
        """Index of a step's pack: each pack once per epoch, in an order of the epoch's own."""
        epoch, place = divmod(step, len(self._packs))
        order = list(range(len(self._packs)))
        random.Random(f"{self._schedule.seed} {epoch}").shuffle(order)
        return order[place]


def _halves_pay(device: torch.device) -> bool:
    """Whether products of bfloat16 take far less time there than those of float32; losses come out the same."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and has_tiles()


def sampled(predicted: int, seed: int, step: int) -> Tensor:
    """Some of the predicted tokens, (S,), whose whole distributions are compared in this step."""
    dice = random.Random(f"{seed} {step} shown")
    return torch.tensor(sorted(dice.sample(range(predicted), min(_SAMPLED_TOKENS, predicted))))
