"""Tasks in packs, and a decoder whose maps may be set: what maps are fitted, trained and measured on.

Knows packs of questions, programs and tensors; no items and no files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polar_sdk.engine.maps import Bridge, Fill
from polar_sdk.engine.pack import PackedQuestions, packs, predictors
from polar_sdk.errors import DeviceError
from polar_sdk.programs.program import Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.programs.cost import Segment


@dataclass(frozen=True, eq=False)
class Pack:
    """Some tasks, packed without padding.

    Attributes:
        tasks: In order.
        packed: Their tokens' positions and attention, and one step of a program for all of them.
        sources: Rows that predict the continuations' tokens, (M,).
        targets: Those tokens, (M,).
    """

    tasks: tuple[Task, ...]
    packed: PackedQuestions
    sources: Tensor
    targets: Tensor

    @property
    def later(self) -> Tensor:
        """Whether each token is not at position 0, whose state is of another kind; (N,)."""
        return self.packed.positions != 0

    def run(self, decoder: Decoder, x: Tensor, steps: Iterable[Step]) -> Tensor:
        """Move states (N, E) along some steps."""
        for step in steps:
            x = self.packed.step(decoder, step, x)
        return x

    def states(self, decoder: Decoder, last: int) -> Iterator[tuple[int, Tensor]]:
        """The states (N, E) before each layer up to `last`, at full depth."""
        x = self.packed.embedded
        for layer in range(last + 1):
            yield layer, x
            if layer < last:
                x = self.run(decoder, x, layers(layer, layer + 1))


def put(decoder: Decoder, maps: Mapping[Segment, Map], dtype: torch.dtype | None = None) -> None:
    """Have a copy of a decoder run these maps, and no others, in that dtype; None = its own."""
    own = {segment: each.to(dtype or decoder.dtype, decoder.device) for segment, each in maps.items()}
    decoder.set_bridges({segment: each for segment, each in own.items() if isinstance(each, Bridge)})
    decoder.set_fills({segment: each for segment, each in own.items() if isinstance(each, Fill)})


def layers(first: int, end: int) -> list[Step]:
    """Visits of layers first … end − 1."""
    return [Step(layer, layer) for layer in range(first, end)]


def make_packs(decoder: Decoder, tasks: Sequence[Task], limit: int) -> list[Pack]:
    """Pack tasks, at most `limit` tokens in each pack."""
    remaining = iter(tasks)
    packed = []
    for questions in packs([task.question for task in tasks], limit):
        sources, targets = (
            torch.tensor(places, dtype=torch.long, device=decoder.device) for places in predictors(questions)
        )
        own = tuple(next(remaining) for _ in questions)
        packed.append(Pack(own, PackedQuestions(decoder, questions), sources, targets))
    return packed


def own_copy(decoder: Decoder) -> Decoder:
    """A copy of a decoder that shares the weights and has maps of its own, so that unfinished ones serve no request.

    Raises:
        DeviceError: Its layers are on several devices: states before and after a map are compared on one.
    """
    if len(decoder.placement.devices) > 1:
        raise DeviceError(f"maps are fitted on one device, not on {decoder.placement}; load the model on one device.")
    return copy.copy(decoder)
