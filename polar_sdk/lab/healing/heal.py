"""Heal: from a model and prompts to a set of maps, with errors on held-out prompts.

Maps are fitted on the train split and measured on the dev split; the calibration and test splits are not used, and the
base weights are not changed. The stored maps are what is measured. Knows the steps; the method of each kind of map
knows how it is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from polar_sdk.engine.allocator import keeping_freed_memory
from polar_sdk.errors import MapError
from polar_sdk.lab.checkpoint import Checkpoint, run_key
from polar_sdk.lab.healing.bridges import BridgeMethod
from polar_sdk.lab.healing.distillation import CHECKPOINT, MapTrainer
from polar_sdk.lab.healing.fills import SUMS, FillMethod
from polar_sdk.lab.healing.method import TRAIN_TOKENS, BridgeOptions, FillOptions, segments_of
from polar_sdk.lab.healing.packs import make_packs, own_copy
from polar_sdk.lab.items import (
    DEFAULT_SHARES,
    Shares,
    builtin_items,
    data_hash,
    distinct_items,
    item_id,
    split_of,
)
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.router.map_set import MapFacts, MapKind, MapRecord, MapSet, stored
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.maps import Map
    from polar_sdk.lab.healing.method import Group, Lots, Method
    from polar_sdk.lab.items import Item
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.model import PolarModel
    from polar_sdk.programs.cost import Segment


_CHECKPOINTS: Final = "checkpoints"
"""Name of the folder of checkpoints, in the folder of the result."""
_MEASURED: Final = {"losses", "held_out"}
"""Facts of a training that say how it went, not how it was set."""


def heal(
    model: PolarModel,
    items: Sequence[Item] | None = None,
    segments: str = "",
    *,
    kind: MapKind = "bridge",
    out: str | Path | None = None,
    cache: RewardCache | None = None,
    shares: Shares = DEFAULT_SHARES,
    on_progress: Progress = silent,
    **options: Any,
) -> MapSet:
    """Fit maps that stand for layers; the model uses them from now on. What was interrupted resumes where it stopped.

    Args:
        model: The model.
        items: Prompts to fit on; None = the prompts that come with the package. Fills are trained on texts alone.
        segments: For bridges, first and last layers, e.g. `12-15,17-20`; groups that are not used together are
            separated by `;`. For fills, cuts, from which all layers up to the last are filled, or first and last
            layers, e.g. `27,24,20-23`, or several of these that one program fills, e.g. `18-21+23`; `default`
            among them = what changes least, of 10 % to 50 % of the layers, found by measuring.
        kind: Which maps to fit: bridges cross layers, fills write their keys and values for prompt tokens.
        out: Folder to write the maps to; checkpoints are kept there until training is done.
        cache: Where identity's answers to prompts are kept; None = in memory.
        shares: Of the splits: the maps are fitted on `train` and measured on `dev`.
        on_progress: Called with (stage, steps done, steps in all).
        **options: Fields of `BridgeOptions` or `FillOptions`.

    Raises:
        DataError: The data is empty or nothing but copies.
        MapError: An option is out of range, a segment does not fit the model, or no prompt is left to fit on.
    """
    chosen = BridgeOptions.of(**options) if kind == "bridge" else FillOptions.of(**options)
    return model.use_maps(
        Healer(model, chosen, items, segments, out, cache or RewardCache(), on_progress, shares).run()
    )


@dataclass(frozen=True)
class Healer:
    """Fits maps of one kind on one model, which is not changed; see `heal`."""

    model: PolarModel
    options: BridgeOptions | FillOptions
    items: Sequence[Item] | None
    segments: str
    out: str | Path | None
    cache: RewardCache
    on_progress: Progress = silent
    shares: Shares = DEFAULT_SHARES

    def run(self) -> MapSet:
        """Fit, train if there are steps to train, measure, and save if there is a folder."""
        method, options = self._method, self.options
        asked = method.groups(self.segments)
        items = distinct_items(builtin_items() if self.items is None else self.items)
        decoder = own_copy(self.model.loaded.decoder)
        start = self._start()
        lots = method.lots(self._tasks(items, "train"), self._tasks(items, "dev"))
        if not lots.fitted:
            raise MapError(f"none of the {len(items)} prompts is in the train split; give more prompts.")
        found = method.found(decoder, lots, self.on_progress) if method.seeks(self.segments) else []
        groups = list(dict.fromkeys([*asked, *found]))
        # Bridges are rounded before they are used, since the next one corrects what that does.
        dtype = decoder.dtype if options.storage == "exact" else torch.float32
        known = {} if start is None else {key: each.to(dtype, decoder.device) for key, each in start.maps.items()}
        known = {key: each for key, each in known.items() if key in segments_of(groups)}
        programs = [method.program(group).text for group in groups]
        data = data_hash(items)
        checkpoint = Checkpoint(
            None if self.out is None else Path(self.out) / _CHECKPOINTS,
            run_key(self.model.fingerprint, self.model.dtype, programs, data, options, self.shares),
        )
        fitted = method.fit(decoder, lots.fitted, groups, known, checkpoint, self.on_progress)
        fitted = {segment: fitted[segment] for segment in segments_of(groups)}
        training: dict[str, Any] = {
            **options.model_dump(),
            "rate": options.learning_rate(decoder.family.hidden),
            "prompts": max(len(lots.fitted), len(lots.trained)),
            "programs": programs,
            "start": None if start is None else _provenance(start),
        }
        if options.distil:
            with keeping_freed_memory():
                fitted, measured = self._distil(decoder, lots, groups, fitted, dtype, checkpoint)
            training |= measured
        facts = MapFacts(
            kind=method.kind,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            storage=options.storage,
            segments=tuple(MapRecord.of(segment, each, None) for segment, each in fitted.items()),
            data=data,
            training=training,
        )
        made = MapSet(facts, stored(fitted, options.storage))
        if lots.held_out:
            errors = method.errors(decoder, lots.held_out, groups, made)
            records = tuple(MapRecord.of(segment, each, errors[segment]) for segment, each in fitted.items())
            made = MapSet(facts.model_copy(update={"segments": records}), made.tensors)
        if self.out is not None:
            made.save(self.out)
            checkpoint.clear([CHECKPOINT, SUMS])
        return made

    @property
    def _method(self) -> Method:
        depth, options = self.model.depth, self.options
        return FillMethod(options, depth) if isinstance(options, FillOptions) else BridgeMethod(options, depth)

    def _tasks(self, items: Sequence[Item], split: str) -> list[Task]:
        chosen = [item for item in items if split_of(item_id(item), self.shares) == split]
        tokens = self.options.answer_tokens
        return make_tasks(self.model, chosen, self.cache, answer_tokens=tokens, on_progress=self.on_progress)

    def _start(self) -> MapSet | None:
        """The maps to start from."""
        if self.options.start is None:
            return None
        start = MapSet.load(self.options.start)
        start.check_model(self.model.name, self.model.fingerprint)
        return start

    def _distil(
        self,
        decoder: Decoder,
        lots: Lots,
        groups: Sequence[Group],
        fitted: Mapping[Segment, Map],
        dtype: torch.dtype,
        checkpoint: Checkpoint,
    ) -> tuple[dict[Segment, Map], dict[str, Any]]:
        """Train; the map of a segment stays as it was where held-out prompts lose in a program that uses it."""
        method = self._method
        packs = make_packs(decoder, lots.trained, TRAIN_TOKENS)
        trainer = MapTrainer(decoder, packs, method, groups, fitted, checkpoint)
        stage = f"training {method.kind}s"
        trainer.descent.run(trainer.gradients, lambda done, total: self.on_progress(stage, done, total))
        trained = {segment: each.to(dtype, decoder.device) for segment, each in trainer.maps.items()}
        measured = make_packs(decoder, lots.held_out or lots.fitted, TRAIN_TOKENS)
        stage = f"measuring {method.kind}s"
        before, after = trainer.loss.means(
            measured, fitted, trained, on_pack=lambda done, total: self.on_progress(stage, done, total)
        )
        kept = {group: after[group] < before[group] for group in groups}
        if method.together:
            kept = dict.fromkeys(groups, sum(after.values()) < sum(before.values()))
        lost = set(segments_of(group for group in groups if not kept[group]))
        rows = [
            {
                "program": method.program(group).text,
                "closed_form": before[group],
                "trained": after[group],
                "kept": kept[group],
            }
            for group in groups
        ]
        chosen = {segment: each if segment in lost else trained[segment] for segment, each in fitted.items()}
        return chosen, {"losses": trainer.descent.losses, "held_out": rows}


def _provenance(start: MapSet) -> dict[str, Any]:
    """How maps were made that another run starts from: their facts, without what was measured."""
    return {name: fact for name, fact in start.facts.training.items() if name not in _MEASURED}
