"""Hidden states of packs of questions, moved along step by step. What fitting and training of bridges look at.

Works on a copy of the decoder, so that bridges in the making never serve a request, with the plain kernels, whose
arithmetic has derivatives. Knows programs and tensors.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from polar_sdk.engine.eager import EagerKernels
from polar_sdk.engine.scoring import PackedQuestions, packs, predictors
from polar_sdk.errors import BridgeError, DeviceError
from polar_sdk.programs.program import Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.lab.rewards.tasks import Task


@dataclass(frozen=True, eq=False)
class Pack:
    """Some tasks, packed without padding.

    Attributes:
        tasks: In order.
        packed: Where their tokens are, and which attend to which.
        sources: Places that predict the continuations' tokens, (M,).
        targets: Those tokens, (M,).
    """

    tasks: tuple[Task, ...]
    packed: PackedQuestions
    sources: Tensor
    targets: Tensor

    def run(self, decoder: Decoder, x: Tensor, steps: Iterable[Step]) -> Tensor:
        """Move states (N, E) along some steps."""
        for step in steps:
            x = self.packed.step(decoder, step, x)
        return x


def workshop(decoder: Decoder) -> Decoder:
    """A copy that shares the weights and has bridges of its own, run by the plain kernels.

    Raises:
        DeviceError: Layers lie on several devices: states before and behind a bridge are compared on one.
    """
    if len(decoder.placement.devices) > 1:
        raise DeviceError(f"bridges are made on one device, not on {decoder.placement}; load the model on one.")
    own = copy.copy(decoder)
    own.kernels = EagerKernels(decoder.family)
    own.set_bridges(decoder.bridges)
    return own


def layers(first: int, behind: int) -> list[Step]:
    """Visits of layers first … behind − 1."""
    return [Step(layer, layer) for layer in range(first, behind)]


def make_packs(decoder: Decoder, tasks: Sequence[Task], limit: int) -> list[Pack]:
    """Pack tasks, at most `limit` tokens together.

    Raises:
        BridgeError: There is no task.
    """
    if not tasks:
        raise BridgeError("there is no prompt to fit bridges on; give more prompts.")
    waiting = iter(tasks)
    made = []
    for questions in packs([task.question for task in tasks], limit):
        sources, targets = predictors(questions)
        made.append(
            Pack(
                tasks=tuple(next(waiting) for _ in questions),
                packed=PackedQuestions(decoder, questions),
                sources=_tensor(sources, decoder.device),
                targets=_tensor(targets, decoder.device),
            )
        )
    return made


def _tensor(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
