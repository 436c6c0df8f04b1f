"""Heal skips: from a model and prompts to a set of bridges, with what was measured on held-out prompts.

Segments are given as text: `12-15,17-20;12-20` is two groups, and the bridges of a group are
fitted one after another. Knows which steps there are; how a bridge is fitted or trained is known to `fit` and `distil`.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import BridgeError
from polar_sdk.lab.healing.bridge_fit import fit_group, held_out_errors, make_packs, trainable_copy
from polar_sdk.lab.healing.bridge_training import BridgePlan, BridgeTrainer
from polar_sdk.lab.healing.run import FIT_TOKENS, TRAIN_TOKENS, HealingRun, drawn, provenance
from polar_sdk.lab.items import data_hash
from polar_sdk.router.bridge_set import BridgeSet, SegmentRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.engine.bridge import Bridge
    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.lab.healing.bridge_fit import Pack
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.programs.cost import Segment


_SEGMENT: Final = re.compile(r"\[?\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?\]?")
_MAX_FIT_TASKS: Final = 1000
"""Maximum tasks for the closed form: some 50,000 tokens, where each output has 577 unknowns."""


@dataclass(frozen=True)
class HealOptions:
    """How to fit.

    Attributes:
        ridge: Penalty as a multiple of the mean variance of a state's entries.
        rank: Maximum rank of the maps; None = full.
        distil: Steps of training on top of the closed form; 0 = none.
        rate: Learning rate of the training.
        choices: Weight of the difference between the choices' scores in the training.
        labels: Weight of the right choices in the training; more than 0 fits the maps to labels, which is fine-tuning.
        drop: Probability that a bridge is left out in every other training step.
        seed: Of the training.
        answer_tokens: Maximum tokens of identity's answers to prompts.
        start: Folder of bridges to start from; the segments in it are not fitted again.
        resume: Whether to continue from the checkpoint in the output folder.
    """

    ridge: float = 1e-3
    rank: int | None = None
    distil: int = 0
    rate: float = 2e-4
    choices: float = 1.0
    labels: float = 0.0
    drop: float = 0.25
    seed: int = 0
    answer_tokens: int = 24
    start: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise BridgeError(f"ridge={self.ridge} is out of range; use more than 0, e.g. 0.001.")
        if self.rank is not None and self.rank < 1:
            raise BridgeError(f"rank={self.rank} is out of range; use 1 or more, or None for full rank.")
        if self.distil < 0 or self.answer_tokens < 1:
            raise BridgeError(
                f"distil={self.distil} and answer_tokens={self.answer_tokens}: use at least 0 steps and 1 token."
            )
        if not (0 <= self.drop < 1 and self.rate > 0):
            raise BridgeError(
                f"drop={self.drop} and rate={self.rate}: use a drop from 0 to below 1, and a rate above 0."
            )
        if not (self.choices >= 0 and self.labels >= 0):
            raise BridgeError(f"choices={self.choices} and labels={self.labels} are weights; use 0 or more.")


@dataclass
class Healer(HealingRun):
    """Fits bridges on one model.

    Attributes:
        options: How to fit.
    """

    options: HealOptions = field(default_factory=HealOptions)

    def run(self) -> BridgeSet:
        """Fit, train if there are steps to train, measure, and save if there is a folder.

        Raises:
            DataError: The data is empty or nothing but copies.
            BridgeError: A segment does not fit, no prompt is left to fit on, or a checkpoint is from another run.
        """
        groups = parse_segments(self.segments, self.model.depth)
        self._check_precision()
        items = self.chosen
        decoder = trainable_copy(self.model.loaded.decoder)
        decoder.set_bridges({})
        start = self._start()
        asked = {segment for group in groups for segment in group}
        known = {
            segment: bridge.to(decoder.dtype, decoder.device)
            for segment, bridge in ({} if start is None else start.bridges).items()
            if segment in asked
        }
        train, held_out = self.tasks(items, self.options.answer_tokens)
        fitted = self._fit(decoder, make_packs(decoder, drawn(train, _MAX_FIT_TASKS), FIT_TOKENS), groups, known)
        training: dict[str, Any] = {
            "segments": segments_text(groups),
            "prompts": len(train),
            **self._settings(),
            "start": None if start is None else provenance(start.training),
        }
        if self.options.distil:
            fitted, losses = self._distil(decoder, train, held_out, groups, fitted, data_hash(items))
            training |= losses
        errors = self._errors(decoder, held_out, groups, fitted)
        bridge_set = BridgeSet(
            bridges=fitted,
            records=tuple(_record(segment, bridge, errors.get(segment)) for segment, bridge in fitted.items()),
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            data=data_hash(items),
            training=training,
        )
        if self.out is not None:
            bridge_set.save(self.out)
            self.checkpoint.unlink(missing_ok=True)  # type: ignore[union-attr]
        return bridge_set

    def _check_precision(self) -> None:
        if self.options.distil and self.model.dtype.startswith("int"):
            raise BridgeError(
                f"bridges cannot be trained through {self.model.dtype} weights, which have no derivatives; load the "
                "model with precision='bf16' (the bridges serve in every precision), or use distil=0."
            )

    def _fit(
        self, decoder: Decoder, packs: Sequence[Pack], groups: list[list[Segment]], known: dict[Segment, Bridge]
    ) -> dict[Segment, Bridge]:
        fitted = known
        total = sum(map(len, groups))
        done = 0

        def step(_: Segment) -> None:
            nonlocal done
            done += 1
            self.on_progress("fitting bridges", done, total)

        self.on_progress("fitting bridges", 0, total)
        for group in groups:
            fitted |= fit_group(
                decoder,
                packs,
                group,
                known=fitted,
                strength=self.options.ridge,
                rank=self.options.rank,
                on_segment=step,
            )
        return fitted

    def _start(self) -> BridgeSet | None:
        """The bridges to start from."""
        if self.options.start is None:
            return None
        start = BridgeSet.load(self.options.start)
        start.check_model(self.model.name, self.model.fingerprint)
        return start

    def _distil(
        self,
        decoder: Decoder,
        train: Sequence[Task],
        held_out: Sequence[Task],
        groups: list[list[Segment]],
        fitted: dict[Segment, Bridge],
        data: str,
    ) -> tuple[dict[Segment, Bridge], dict[str, Any]]:
        """Train; where held-out prompts do not gain from it, the closed form stays."""
        options = self.options
        plan = BridgePlan(
            steps=options.distil,
            rate=options.rate,
            choices=options.choices,
            labels=options.labels,
            drop=options.drop,
            seed=options.seed,
        )
        packs = make_packs(decoder, train, TRAIN_TOKENS)
        mark = self.mark(segments_text(groups), data, self._settings())
        trainer = BridgeTrainer(decoder, packs, groups, fitted, plan, mark, self.checkpoint)
        if options.resume:
            trainer.resume()
        trainer.run(lambda done, total: self.on_progress("training bridges", done, total))
        trained = trainer.bridges()
        measured = make_packs(decoder, held_out or train, TRAIN_TOKENS)
        before, after = trainer.loss(measured, fitted), trainer.loss(measured, trained)
        facts = {
            "loss_closed_form": before,
            "loss_trained": after,
            "losses": trainer.losses,
            "kept_training": after < before,
        }
        return (trained if after < before else fitted), facts

    def _errors(
        self,
        decoder: Decoder,
        held_out: Sequence[Task],
        groups: list[list[Segment]],
        fitted: dict[Segment, Bridge],
    ) -> dict[Segment, float]:
        if not held_out:
            return {}
        decoder.set_bridges(fitted)
        packs = make_packs(decoder, held_out, FIT_TOKENS)
        by_group = [held_out_errors(decoder, packs, group) for group in reversed(groups)]
        return {segment: error for errors in by_group for segment, error in errors.items()}

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.options).items() if name != "resume"}


def _record(segment: Segment, bridge: Bridge, error: float | None) -> SegmentRecord:
    kind = "full rank" if bridge.rank is None else f"rank {bridge.rank}"
    first, last = segment
    return SegmentRecord(first=first, last=last, kind=kind, flops_per_token=bridge.flops, error_of_skip=error)


def parse_segments(text: str, depth: int) -> list[list[Segment]]:
    """Groups of segments, each in order.

    Args:
        text: Segments with commas between them, groups with semicolons.
        depth: Layers of the model.

    Raises:
        BridgeError: It does not parse, a segment does not fit the model, or two of one group overlap.
    """
    groups = [[_segment(part, depth) for part in group.split(",")] for group in text.split(";") if group.strip()]
    if not groups:
        raise BridgeError("no segment is given; write first and last layers, e.g. '12-15,17-20'.")
    for group in groups:
        group.sort()
        for before, after in pairwise(group):
            if after[0] <= before[1]:
                spans = f"{before[0]}-{before[1]} and {after[0]}-{after[1]}"
                raise BridgeError(f"segments {spans} overlap; separate them by ';' to fit both.")
        if sum(last - first + 1 for first, last in group) == depth:
            raise BridgeError(f"the segments cross all {depth} layers; keep at least one layer.")
    return groups


def segments_text(groups: list[list[Segment]]) -> str:
    """The text form of groups."""
    return ";".join(",".join(f"{first}-{last}" for first, last in group) for group in groups)


def _segment(text: str, depth: int) -> Segment:
    match = _SEGMENT.fullmatch(text.strip())
    if match is None:
        raise BridgeError(f"segment {text.strip()!r} does not parse; write first and last layer, e.g. '12-15'.")
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if not first <= last < depth:
        raise BridgeError(
            f"segment {text.strip()!r} does not fit: first ≤ last is needed, both between 0 and {depth - 1}."
        )
    return first, last
