"""Fit the bridges of one group, one after another along the program that uses them all.

Each bridge is fitted on the states that the program really has before it, those behind earlier bridges included, and
aims at the states that full depth has behind the segment; so later bridges make good what earlier ones got wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polar_sdk.bridges.ridge import Ridge, unexplained
from polar_sdk.bridges.states import layers
from polar_sdk.engine.bridge import Bridge
from polar_sdk.program import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.bridges.states import Pack
    from polar_sdk.cost import Segment
    from polar_sdk.engine.decoder import Decoder

__all__ = ["fit_group", "held_out_errors"]


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
    """Fit the bridges of a group that are not known yet.

    Args:
        decoder: A copy that may be given bridges; see `states.workshop`.
        packs: What to fit on.
        group: Segments in order.
        known: Bridges that stay as they are.
        strength: See `Ridge.solve`.
        rank: See `Ridge.solve`.
        on_segment: Called after each segment.
    """
    fitted: dict[Segment, Bridge] = {}
    with torch.inference_mode():
        walk = _Walk(decoder, packs)
        for segment in group:
            walk.to(segment)
            if segment not in known:
                ridge = Ridge(walk.ours[0].shape[-1], decoder.device)
                for pack, ours, theirs in zip(packs, walk.ours, walk.theirs, strict=True):
                    ridge.add(ours, theirs, pack.walk.positions)
                fitted[segment] = ridge.solve(strength, rank).to(decoder.dtype, decoder.device)
            decoder.set_bridges({**decoder.bridges, segment: known.get(segment) or fitted[segment]})
            walk.cross(segment)
            on_segment(segment)
    return {segment: _outside_inference(bridge) for segment, bridge in fitted.items()}


def held_out_errors(decoder: Decoder, packs: Sequence[Pack], group: Sequence[Segment]) -> dict[Segment, float]:
    """Per segment, the squared error of its bridge over that of a plain skip, along the program that uses them all."""
    errors = {}
    with torch.inference_mode():
        walk = _Walk(decoder, packs)
        for segment in group:
            before, theirs = walk.to(segment)
            walk.cross(segment)
            pairs = [
                unexplained(old, wanted, carried, pack.walk.positions)
                for pack, old, wanted, carried in zip(packs, before, theirs, walk.ours, strict=True)
            ]
            skip = sum(one for _, one in pairs)
            errors[segment] = sum(one for one, _ in pairs) / skip if skip else float("nan")
    return errors


class _Walk:
    """States of all packs along the program (`ours`) and at full depth (`theirs`), held at one place each."""

    def __init__(self, decoder: Decoder, packs: Sequence[Pack]) -> None:
        self._decoder, self._packs = decoder, packs
        self.ours = [pack.walk.embedded for pack in packs]
        self.theirs = self.ours
        self._ours_at = self._theirs_at = 0

    def to(self, segment: Segment) -> tuple[list[Tensor], list[Tensor]]:
        """Move on until `ours` is before the segment and `theirs` behind it."""
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
    """Copies that training may put derivatives on."""
    weight = tuple(factor.clone() for factor in bridge.weight)
    return Bridge(weight, bridge.bias.clone(), bridge.first.clone())
