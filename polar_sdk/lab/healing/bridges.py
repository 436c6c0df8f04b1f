"""Bridges: fitted one after another along the program that uses them all, and trained group by group.

Each bridge is fitted on the states that this program really has before the segment, those after earlier bridges
included, and aims at the states that full depth has after it; so later bridges correct what earlier ones got wrong.
The fit is ridge least squares on the change that the segment makes. Position 0 is left out of the fit; it gets the mean
of its own changes. Knows packs of questions, programs and tensors; no items and no files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from polar_sdk.engine.maps import Bridge
from polar_sdk.lab.healing.method import FIT_TOKENS, Group, Lots, Method, drawn
from polar_sdk.lab.healing.packs import layers, make_packs, put
from polar_sdk.lab.healing.ridge import RidgeSums
from polar_sdk.programs.program import Program, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.lab.healing.options import BridgeOptions
    from polar_sdk.lab.healing.packs import Pack
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.programs.cost import Segment
    from polar_sdk.router.map_set import MapSet
    from polar_sdk.show.progress import Progress


_MAX_FITTED: Final = 1000
"""Maximum tasks for the closed form: some 50,000 tokens, where each output has 577 unknowns."""


@dataclass(frozen=True)
class BridgeMethod(Method):
    """How bridges are made."""

    kind = "bridge"
    separators = (";", ",")
    lowest = 0
    gap = 0
    to_the_end = False
    texts_only = False
    together = True

    options: BridgeOptions

    def lots(self, train: list[Task], held_out: list[Task]) -> Lots:
        """See `Method.lots`: training takes all of the train split."""
        return Lots(drawn(train, _MAX_FITTED), train, held_out)

    def fit(
        self,
        decoder: Decoder,
        tasks: Sequence[Task],
        groups: Sequence[Group],
        known: Mapping[Segment, Map],
        on_progress: Progress,
    ) -> dict[Segment, Map]:
        """See `Method.fit`."""
        packs = make_packs(decoder, tasks, FIT_TOKENS)
        fitted = dict(known)
        done, total = 0, sum(map(len, groups))
        on_progress("fitting bridges", done, total)
        for group in groups:
            with torch.inference_mode():
                states = _States(decoder, packs)
                for segment in group:
                    before, after = states.to(segment)
                    if segment not in fitted:
                        pairs = zip(before, after, (pack.later for pack in packs), strict=True)
                        bridge = bridge_between(pairs, self.options.ridge, self.options.rank)
                        fitted[segment] = bridge.to(decoder.dtype, decoder.device)
                    states.cross(segment, fitted[segment])
                    done += 1
                    on_progress("fitting bridges", done, total)
        # Clones, since training cannot compute derivatives of tensors made in inference mode.
        return {segment: each.like(part.clone() for part in each.parts.values()) for segment, each in fitted.items()}

    def errors(
        self, decoder: Decoder, tasks: Sequence[Task], groups: Sequence[Group], made: MapSet
    ) -> dict[Segment, float]:
        """See `Method.errors`."""
        errors: dict[Segment, float] = {}
        packs = make_packs(decoder, tasks, FIT_TOKENS)
        with torch.inference_mode():
            for group in groups:
                states = _States(decoder, packs)
                for segment in group:
                    before, after = states.to(segment)
                    crossed = states.cross(segment, made.maps[segment])
                    skip, ours = (
                        sum(
                            float((state[pack.later].float() - target[pack.later].float()).square().sum())
                            for state, target, pack in zip(states_, after, packs, strict=True)
                        )
                        for states_ in (before, crossed)
                    )
                    errors.setdefault(segment, ours / skip if skip else float("nan"))
        return errors

    def program(self, group: Group) -> Program:
        """See `Method.program`."""
        return Program.bridging(self.depth, group)

    def lessons(self, groups: Sequence[Group], step: int) -> list[Program]:
        """The program of one group, in turns; in every other step with some bridges dropped, but never all."""
        group = groups[step % len(groups)]
        dice = random.Random(f"{self.options.seed} {step} drop")
        stays = dice.choice(group)
        dropping = step // len(groups) % 2 == 1
        kept = [segment for segment in group if segment == stays or not dropping or dice.random() >= self.options.drop]
        return [Program.bridging(self.depth, kept)]


def bridge_between(pairs: Iterable[tuple[Tensor, Tensor, Tensor]], strength: float, rank: int | None = None) -> Bridge:
    """The bridge, in float32, that comes nearest from states before a segment to those after it.

    Args:
        pairs: States (N, E) before and after it, and which of them are not at position 0, (N,); one or more packs.
        strength: See `RidgeSums.solve`.
        rank: See `RidgeSums.solve`.
    """
    sums: RidgeSums | None = None
    first, firsts = torch.zeros(()), 0
    for before, after, later in pairs:
        if sums is None:
            sums = RidgeSums(before.shape[-1], [before.shape[-1]], before.device)
        inputs, moves = before.float(), after.float() - before.float()
        sums.add(inputs[later], [moves[later]])
        first = first + moves[~later].sum(0)
        firsts += int((~later).sum())
    assert sums is not None
    found = sums.solve(strength, rank)
    return Bridge(found.weight, found.bias, first / max(firsts, 1))


class _States:
    """States of all packs, along the program (`ours`) and at full depth (`theirs`), each after one layer."""

    def __init__(self, decoder: Decoder, packs: Sequence[Pack]) -> None:
        self._decoder, self._packs = decoder, packs
        self._ours = self._theirs = [pack.packed.embedded for pack in packs]
        self._ours_at = self._theirs_at = 0

    def to(self, segment: Segment) -> tuple[list[Tensor], list[Tensor]]:
        """Advance `ours` to the start of the segment and `theirs` to its end."""
        first, last = segment
        shared = self._ours is self._theirs
        self._ours = self._run(self._ours, layers(self._ours_at, first))
        if shared:
            self._theirs, self._theirs_at = self._ours, first
        self._theirs = self._run(self._theirs, layers(self._theirs_at, last + 1))
        self._ours_at, self._theirs_at = first, last + 1
        return self._ours, self._theirs

    def cross(self, segment: Segment, bridge: Map) -> list[Tensor]:
        """Carry `ours` over the segment by a bridge."""
        put(self._decoder, {segment: bridge})
        self._ours = self._run(self._ours, [Step(*segment, bridge=True)])
        self._ours_at = segment[1] + 1
        return self._ours

    def _run(self, states: list[Tensor], steps: list[Step]) -> list[Tensor]:
        return [pack.run(self._decoder, x, steps) for pack, x in zip(self._packs, states, strict=True)]
