"""Fit fills: from a model and prompts to a set of fills, with what was measured on held-out prompts.

The closed form takes one pass over the train split for all segments; training comes on top. What is measured are the
maps as they are stored. Knows which steps there are; how a fill is fitted or trained is known to `fill_fit` and
`fill_training`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, get_args

import torch

from polar_sdk.errors import FillError
from polar_sdk.lab.healing.bridge_fit import make_packs, trainable_copy
from polar_sdk.lab.healing.fill_fit import DEFAULT, candidates, fill_errors, fit_fills, parse_fills, segments_of
from polar_sdk.lab.healing.fill_training import FillLoss, FillPlan, FillTrainer
from polar_sdk.lab.healing.run import FIT_TOKENS, TRAIN_TOKENS, HealingRun, drawn, provenance
from polar_sdk.lab.items import ChoiceItem, data_hash
from polar_sdk.lab.rewards.tasks import ANSWER_TOKENS
from polar_sdk.programs.program import TAIL, Program
from polar_sdk.router.fill_set import FillRecord, FillSet, Storage, stored

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.fill import Fill
    from polar_sdk.lab.healing.fill_fit import Group
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.programs.cost import Segment


_MAX_HELD_OUT: Final = 100
"""Maximum prompts that are measured on."""
_CHOICE_PROMPTS: Final = 300
"""Maximum prompts that layers are fitted on where what to fill is chosen by measuring, …"""
_CHOICE_HELD_OUT: Final = 40
"""… and measured on."""


@dataclass(frozen=True)
class FillOptions:
    """How to fit fills.

    Attributes:
        ridge: Penalty as a multiple of the mean variance of an entry of a normalised state.
        rank: Maximum rank of each segment's map; None = full.
        units: Hidden units of each segment's map; 0 = none, so that it is affine.
        prompts: Maximum prompts to fit on, drawn by hash.
        distil: Steps of training on top of the closed form; 0 = none.
        tail: Last tokens of each prompt that run all layers in the training, as `search` lets them; the last one must.
        rate: Learning rate of the training.
        hidden: Weight of the error of the last states in the training.
        seed: Of the training, and of hidden units.
        answer_tokens: Maximum tokens of identity's answers to prompts.
        start: Folder of fills to start from; the segments in it are not fitted again, and keep their rank and units.
        storage: How weights are stored.
        resume: Whether to continue from the checkpoint in the output folder.
    """

    ridge: float = 1e-3
    rank: int | None = None
    units: int = 0
    prompts: int = 2000
    distil: int = 0
    tail: int = TAIL
    rate: float = 3e-4
    hidden: float = 1.0
    seed: int = 0
    answer_tokens: int = ANSWER_TOKENS
    start: str | None = None
    storage: Storage = "int8"
    resume: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise FillError(f"ridge={self.ridge} is out of range; use more than 0, e.g. 0.001.")
        if self.rank is not None and self.rank < 1:
            raise FillError(f"rank={self.rank} is out of range; use 1 or more, or None for full rank.")
        if self.units < 0:
            raise FillError(f"units={self.units} is out of range; use 0 for none, or a number such as 256.")
        if self.distil < 0 or self.answer_tokens < 1 or self.prompts < 1:
            raise FillError(
                f"distil={self.distil}, answer_tokens={self.answer_tokens} and prompts={self.prompts}: use at least 0 "
                "steps, 1 token and 1 prompt."
            )
        if self.tail < 1:
            raise FillError(f"tail={self.tail} prompt tokens run; the last one must: use 1 or more.")
        if not (self.rate > 0 and self.hidden >= 0):
            raise FillError(f"rate={self.rate} and hidden={self.hidden}: use a rate above 0, and 0 or more for hidden.")
        if self.storage not in get_args(Storage):
            raise FillError(f"storage {self.storage!r} does not exist; use {' or '.join(get_args(Storage))}.")


@dataclass
class FillHealer(HealingRun):
    """Fits fills on one model.

    Attributes:
        options: How to fit.
    """

    options: FillOptions = field(default_factory=FillOptions)

    def run(self) -> FillSet:
        """Fit, train if there are steps to train, measure, and save if there is a folder.

        Raises:
            DataError: The data is empty or nothing but copies.
            FillError: A segment does not fit, no prompt is left to fit on, or a checkpoint is from another run.
        """
        asked = None if self.segments.strip() == DEFAULT else parse_fills(self.segments, self.model.depth)
        self._check_precision()
        items = [item for item in self.chosen if not isinstance(item, ChoiceItem)]
        if not items:
            raise FillError("fills are fitted on prompts that are answered in text, and there is none; give some.")
        decoder = trainable_copy(self.model.loaded.decoder)
        start = self._start()
        train, held_out = self.tasks(items, self.options.answer_tokens)
        if not train:
            raise FillError(f"none of the {len(items)} prompts is in the train split; give more prompts.")
        train, held_out = drawn(train, self.options.prompts), drawn(held_out, _MAX_HELD_OUT)
        filled = self._filled(train)
        self._check_filled(train, filled)  # before minutes are spent on the closed form
        groups = asked or self._chosen(decoder, filled, self._filled(held_out) or filled)
        segments = segments_of(groups)
        known = {} if start is None else start.fills
        fitted = {segment: known[segment].to(torch.float32, decoder.device) for segment in segments if segment in known}
        if missing := [segment for segment in segments if segment not in fitted]:
            fitted |= self._fit(decoder, train, missing)
        fitted = {segment: fitted[segment] for segment in segments}
        training: dict[str, Any] = {
            "prompts": len(train),
            "programs": [self._program(group).text for group in groups],
            **self._settings(),
            "start": None if start is None else provenance(start.training),
        }
        if self.options.distil:
            fitted, facts = self._distil(decoder, filled, held_out or train, fitted, groups, data_hash(items))
            training |= facts
        made = FillSet(
            tensors=stored(fitted, self.options.storage),
            storage=self.options.storage,
            records=tuple(_record(segment, fill) for segment, fill in fitted.items()),
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            data=data_hash(items),
            training=training,
        )
        if held_out:
            errors = fill_errors(decoder, make_packs(decoder, held_out, FIT_TOKENS), made.fills)
            made = replace(made, records=tuple(_measured(record, errors) for record in made.records))
        if self.out is not None:
            made.save(self.out)
            self.checkpoint.unlink(missing_ok=True)  # type: ignore[union-attr]
        return made

    def _check_precision(self) -> None:
        if self.options.distil and self.model.dtype.startswith("int"):
            raise FillError(
                f"fills cannot be trained through {self.model.dtype} weights, which have no derivatives; load the "
                "model with precision='bf16' (the fills serve in every precision), or use distil=0."
            )

    def _fit(self, decoder: Decoder, train: Sequence[Task], segments: Sequence[Segment]) -> dict[Segment, Fill]:
        packs = make_packs(decoder, train, FIT_TOKENS)
        self.on_progress("fitting fills", 0, len(packs))
        return fit_fills(
            decoder,
            packs,
            segments,
            strength=self.options.ridge,
            rank=self.options.rank,
            units=self.options.units,
            seed=self.options.seed,
            on_pack=lambda done, total: self.on_progress("fitting fills", done, total),
        )

    def _program(self, group: Group) -> Program:
        return Program.filling(self.model.depth, group, self.options.tail)

    def _start(self) -> FillSet | None:
        """The fills to start from."""
        if self.options.start is None:
            return None
        start = FillSet.load(self.options.start)
        start.check_model(self.model.name, self.model.fingerprint)
        return start

    def _chosen(self, decoder: Decoder, train: Sequence[Task], held_out: Sequence[Task]) -> list[Group]:
        """What to fill, by measuring: each layer alone, then those that change least against a cut of as many."""
        depth = decoder.depth
        if depth < 2 or not train:
            raise FillError(
                "which layers to fill cannot be measured: the model needs two layers, and a prompt "
                f"{self.options.tail + 2} tokens; name the layers, e.g. '24,20'."
            )
        packs = make_packs(decoder, drawn(train, _CHOICE_PROMPTS), FIT_TOKENS)
        judged = make_packs(decoder, drawn(held_out, _CHOICE_HELD_OUT), TRAIN_TOKENS)

        def losses(groups: Sequence[Group], stage: str) -> dict[Group, float]:
            fills = fit_fills(
                decoder,
                packs,
                segments_of(groups),
                strength=self.options.ridge,
                rank=None,
                on_pack=lambda done, total: self.on_progress(stage, done, total + 1),
            )
            return FillLoss(decoder, groups, self._plan).means(judged, fills)

        harms = losses([((layer, layer),) for layer in range(1, depth)], "layers to fill, one by one")
        rivals = candidates({group[0][0]: loss for group, loss in harms.items()}, depth)
        found = losses(list(dict.fromkeys(chain.from_iterable(rivals))), "layers to fill, together")
        return [min(groups, key=lambda group: found[group]) for groups in rivals]

    def _filled(self, tasks: Sequence[Task]) -> list[Task]:
        """Those of which something is filled in training."""
        tail = self.options.tail
        return [task for task in tasks if len(task.question.prompt) > tail + 1]

    def _check_filled(self, train: Sequence[Task], filled: Sequence[Task]) -> None:
        tail = self.options.tail
        if self.options.distil and not filled:
            raise FillError(
                f"none of the {len(train)} prompts to train on has a token to fill between its first and its last "
                f"{tail}; give longer prompts, or a smaller tail."
            )

    def _distil(
        self,
        decoder: Decoder,
        train: Sequence[Task],
        held_out: Sequence[Task],
        fitted: Mapping[Segment, Fill],
        groups: Sequence[Group],
        data: str,
    ) -> tuple[dict[Segment, Fill], dict[str, Any]]:
        """Train; the map of a segment stays as it was where held-out prompts lose in a program that fills it."""
        options = self.options
        packs = make_packs(decoder, train, TRAIN_TOKENS)
        mark = self.mark(self.segments, data, self._settings())
        trainer = FillTrainer(decoder, packs, fitted, groups, self._plan, mark, self.checkpoint)
        if options.resume:
            trainer.resume()
        trainer.run(lambda done, total: self.on_progress("training fills", done, total))
        trained = trainer.fills()
        measured = make_packs(decoder, held_out, TRAIN_TOKENS)
        before, after = trainer.loss.means(measured, fitted), trainer.loss.means(measured, trained)
        lost = set(segments_of(group for group in groups if not after[group] < before[group]))
        kept = {segment: fitted[segment] if segment in lost else trained[segment] for segment in fitted}
        facts = {
            "losses": trainer.losses,
            "held_out": [
                {
                    "program": self._program(group).text,
                    "closed_form": before[group],
                    "trained": after[group],
                }
                for group in groups
            ],
        }
        return kept, facts

    @property
    def _plan(self) -> FillPlan:
        options = self.options
        return FillPlan(
            steps=options.distil, rate=options.rate, seed=options.seed, hidden=options.hidden, tail=options.tail
        )

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.options).items() if name != "resume"}


def _record(segment: Segment, fill: Fill) -> FillRecord:
    kind = "full rank" if fill.rank is None else f"rank {fill.rank}"
    kind += f", {fill.units} units" if fill.units else ""
    return FillRecord(first=segment[0], last=segment[1], kind=kind, flops_per_token=fill.flops, unexplained=None)


def _measured(record: FillRecord, errors: Mapping[Segment, float]) -> FillRecord:
    return record.model_copy(update={"unexplained": errors[record.first, record.last]})
