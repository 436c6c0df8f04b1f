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
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.lab.checkpoint import Checkpoint
    from polar_sdk.lab.healing.method import BridgeOptions
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
        checkpoint: Checkpoint,
        on_progress: Progress,
    ) -> dict[Segment, Map]:
        """See `Method.fit`."""
        packs = make_packs(decoder, tasks, FIT_TOKENS)
        fitted = dict(known)
        done, total = 0, sum(map(len, groups))
        on_progress("fitting bridges", done, total)
        for group in groups:
            with torch.inference_mode():
                for segment, before, after in _crossings(decoder, packs, group):
                    if segment not in fitted:
                        pairs = zip(before, after, (pack.later for pack in packs), strict=True)
                        bridge = bridge_between(pairs, self.options.ridge, self.options.rank)
                        fitted[segment] = bridge.to(decoder.dtype, decoder.device)
                    put(decoder, {segment: fitted[segment]})
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
        put(decoder, made.maps)
        with torch.inference_mode():
            for group in groups:
                for segment, before, after in _crossings(decoder, packs, group):
                    crossed = _run(decoder, packs, before, [Step(*segment, bridge=True)])
                    skip = _distance(packs, before, after)
                    errors.setdefault(segment, _distance(packs, crossed, after) / skip if skip else float("nan"))
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
        sums.add_inputs(inputs[later])
        sums.add_outputs(0, inputs[later], moves[later])
        first = first + moves[~later].sum(0)
        firsts += int((~later).sum())
    assert sums is not None
    found = sums.solve(strength, rank)
    return Bridge(found.weight, found.bias, first / max(firsts, 1))


def _crossings(
    decoder: Decoder, packs: Sequence[Pack], group: Group
) -> Iterator[tuple[Segment, list[Tensor], list[Tensor]]]:
    """For each segment, the states of all packs before it along the program, and after it at full depth.

    When the next segment is asked for, the program crosses this one by the bridge that the decoder has by then.
    """
    ours = theirs = [pack.packed.embedded for pack in packs]
    at = 0
    for first, last in group:
        between = layers(at, first)
        before = _run(decoder, packs, ours, between)
        theirs = before if ours is theirs else _run(decoder, packs, theirs, between)
        theirs = _run(decoder, packs, theirs, layers(first, last + 1))
        yield (first, last), before, theirs
        ours, at = _run(decoder, packs, before, [Step(first, last, bridge=True)]), last + 1


def _run(decoder: Decoder, packs: Sequence[Pack], states: list[Tensor], steps: Sequence[Step]) -> list[Tensor]:
    return [pack.run(decoder, x, steps) for pack, x in zip(packs, states, strict=True)]


def _distance(packs: Sequence[Pack], states: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Squared error of states, without position 0."""
    return sum(
        float((x[pack.later].float() - target[pack.later].float()).square().sum())
        for pack, x, target in zip(packs, states, targets, strict=True)
    )
