"""Fit the bridges of one group in closed form, one after another along the program that uses them all.

Each bridge is fitted on the states that this program really has before the segment, those after earlier bridges
included, and aims at the states that full depth has after it; so later bridges correct what earlier ones got wrong.
The fit is ridge least squares on the change that the segment makes. Position 0 is left out of the fit; it gets the mean
of its own changes.

All of this runs on a copy of the decoder, so that unfinished bridges never serve a request, with the plain kernels,
whose arithmetic has derivatives. Knows packs of questions, programs and tensors; no items and no files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polar_sdk.engine.bridge import Bridge
from polar_sdk.engine.eager import EagerKernels
from polar_sdk.engine.pack import PackedQuestions, packs, predictors
from polar_sdk.errors import BridgeError, DeviceError
from polar_sdk.lab.healing.ridge import RidgeSums
from polar_sdk.programs.program import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from polar_sdk.engine.decoder import Decoder
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

    def run(self, decoder: Decoder, x: Tensor, steps: Iterable[Step]) -> Tensor:
        """Move states (N, E) along some steps."""
        for step in steps:
            x = self.packed.step(decoder, step, x)
        return x


def trainable_copy(decoder: Decoder) -> Decoder:
    """A copy of a decoder that shares the weights and has bridges of its own, run by the plain kernels.

    Raises:
        DeviceError: Its layers are on several devices: states before and after a bridge are compared on one.
    """
    if len(decoder.placement.devices) > 1:
        raise DeviceError(
            f"bridges are fitted on one device, not on {decoder.placement}; load the model on one device."
        )
    own = copy.copy(decoder)
    own.kernels = EagerKernels(decoder.family)
    own.set_bridges(decoder.bridges)
    return own


def layers(first: int, end: int) -> list[Step]:
    """Visits of layers first … end − 1."""
    return [Step(layer, layer) for layer in range(first, end)]


def make_packs(decoder: Decoder, tasks: Sequence[Task], limit: int) -> list[Pack]:
    """Pack tasks, at most `limit` tokens in each pack.

    Raises:
        BridgeError: There is no task.
    """
    if not tasks:
        raise BridgeError("there is no prompt to fit bridges on; give more prompts.")
    remaining = iter(tasks)
    packed = []
    for questions in packs([task.question for task in tasks], limit):
        sources, targets = predictors(questions)
        packed.append(
            Pack(
                tasks=tuple(next(remaining) for _ in questions),
                packed=PackedQuestions(decoder, questions),
                sources=_tensor(sources, decoder.device),
                targets=_tensor(targets, decoder.device),
            )
        )
    return packed


def _tensor(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


class BridgeSums:
    """Sums over pairs of states (N, E), from which a bridge is solved.

    Args:
        width: E.
        device: Where the states are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._ridge = RidgeSums(width, [width], device)
        self._first, self._firsts = torch.zeros(width, device=device), 0

    @property
    def count(self) -> int:
        """Pairs added so far, position 0 left out."""
        return self._ridge.count

    def add(self, before: Tensor, after: Tensor, positions: Tensor) -> None:
        """Add states before and after the segment, (N, E) each, at positions (N,)."""
        inputs, moves = before.float(), after.float() - before.float()
        later = positions != 0
        self._first += moves[~later].sum(0)
        self._firsts += int((~later).sum())
        self._ridge.add(inputs[later], [moves[later]])

    def solve(self, strength: float, rank: int | None = None) -> Bridge:
        """The bridge, in float32; see `RidgeSums.solve`."""
        found = self._ridge.solve(strength, rank)
        return Bridge(found.weight, found.bias, self._first / max(self._firsts, 1))


def unexplained(before: Tensor, after: Tensor, carried: Tensor, positions: Tensor) -> tuple[float, float]:
    """Squared error of a bridge, and of a plain skip, over one pack: two sums over all but position 0.

    Args:
        before: States before the segment, (N, E).
        after: States that the segment computes, (N, E).
        carried: States that the bridge computes, (N, E).
        positions: (N,).
    """
    later = positions != 0
    target = after[later].float()
    bridge = (carried[later].float() - target).square().sum()
    skip = (before[later].float() - target).square().sum()
    return float(bridge), float(skip)


def fit_group(
    decoder: Decoder,
    packs: Sequence[Pack],
    group: Sequence[Segment],
    *,
    known: Mapping[Segment, Bridge],
    strength: float,
    rank: int | None,
    on_segment: Callable[[Segment], None] = lambda segment: None,
) -> dict[Segment, Bridge]:
    """Fit those bridges of a group that are not known yet.

    Args:
        decoder: A copy whose bridges may be set; see `trainable_copy`.
        packs: What to fit on.
        group: Segments in order.
        known: Bridges that stay as they are.
        strength: See `RidgeSums.solve`.
        rank: See `RidgeSums.solve`.
        on_segment: Called after each segment.
    """
    fitted: dict[Segment, Bridge] = {}
    with torch.inference_mode():
        states = _PackStates(decoder, packs)
        for segment in group:
            states.to(segment)
            if segment not in known:
                sums = BridgeSums(states.ours[0].shape[-1], decoder.device)
                for pack, ours, theirs in zip(packs, states.ours, states.theirs, strict=True):
                    sums.add(ours, theirs, pack.packed.positions)
                fitted[segment] = sums.solve(strength, rank).to(decoder.dtype, decoder.device)
            decoder.set_bridges({**decoder.bridges, segment: known.get(segment) or fitted[segment]})
            states.cross(segment)
            on_segment(segment)
    return {segment: _outside_inference(bridge) for segment, bridge in fitted.items()}


def held_out_errors(decoder: Decoder, packs: Sequence[Pack], group: Sequence[Segment]) -> dict[Segment, float]:
    """Per segment, the squared error of its bridge over that of a plain skip, along the program that uses them all."""
    errors = {}
    with torch.inference_mode():
        states = _PackStates(decoder, packs)
        for segment in group:
            before, theirs = states.to(segment)
            states.cross(segment)
            pairs = [
                unexplained(ours, after, carried, pack.packed.positions)
                for pack, ours, after, carried in zip(packs, before, theirs, states.ours, strict=True)
            ]
            skip = sum(of_skip for _, of_skip in pairs)
            errors[segment] = sum(of_bridge for of_bridge, _ in pairs) / skip if skip else float("nan")
    return errors


class _PackStates:
    """States of all packs, along the program (`ours`) and at full depth (`theirs`), each after one layer."""

    def __init__(self, decoder: Decoder, packs: Sequence[Pack]) -> None:
        self._decoder, self._packs = decoder, packs
        self.ours = [pack.packed.embedded for pack in packs]
        self.theirs = self.ours
        self._ours_at = self._theirs_at = 0

    def to(self, segment: Segment) -> tuple[list[Tensor], list[Tensor]]:
        """Advance `ours` to the start of the segment and `theirs` to its end."""
        first, last = segment
        shared = self.ours is self.theirs
        self.ours = self._run(self.ours, layers(self._ours_at, first))
        if shared:
            self.theirs, self._theirs_at = self.ours, first
        self.theirs = self._run(self.theirs, layers(self._theirs_at, last + 1))
        self._ours_at, self._theirs_at = first, last + 1
        return self.ours, self.theirs

    def cross(self, segment: Segment) -> None:
        """Carry `ours` over the segment by its bridge."""
        self.ours = self._run(self.ours, [Step(*segment, bridge=True)])
        self._ours_at = segment[1] + 1

    def _run(self, states: list[Tensor], steps: list[Step]) -> list[Tensor]:
        return [pack.run(self._decoder, x, steps) for pack, x in zip(self._packs, states, strict=True)]


def _outside_inference(bridge: Bridge) -> Bridge:
    """A copy that training may compute derivatives of."""
    weight = tuple(factor.clone() for factor in bridge.weight)
    return Bridge(weight, bridge.bias.clone(), bridge.first.clone())
