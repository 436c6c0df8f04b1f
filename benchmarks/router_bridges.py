"""The bridges of the shipped router: some tuned to right choices, some distilled on texts, in one folder.

Used by `train_router.py`. They are trained in float32, which processors without bfloat16 tiles multiply twice as fast,
and stored in the precision that the router serves in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polar_sdk import PolarModel, lab
from polar_sdk.lab.items import ChoiceItem, data_hash
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.router.bridge_set import BridgeSet

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from polar_sdk.lab.items import Item
    from polar_sdk.show.progress import Progress

__all__ = ["Bridging"]


@dataclass(frozen=True)
class Bridging:
    """What to heal, and how.

    Attributes:
        options: Of the command line.
        items: All prompts; choices and texts are healed separately.
        seed: Of the bridges for choices; those for texts, which use no label, are the same for all seeds.
        folder: Of this seed's work; the bridges for texts are stored beside it. A finished part is not recomputed.
        on_progress: Called with (stage, steps done, steps in all).
    """

    options: argparse.Namespace
    items: Sequence[Item]
    seed: int
    folder: Path
    on_progress: Progress

    def run(self, model: PolarModel) -> Path:
        """Heal what is not healed yet; returns the folder of all bridges, in that model's dtype."""
        out = self.folder / "bridges"
        if (out / "bridges.json").is_file():
            return out
        choices = [item for item in self.items if isinstance(item, ChoiceItem)]
        texts = [item for item in self.items if not isinstance(item, ChoiceItem)]
        chosen = self.options
        tuned = {"distil": chosen.tune, "labels": chosen.labels, "choices": chosen.choices, "rate": chosen.rate}
        parts = [
            self._heal(part, items, segments, **options)
            for part, items, segments, options in (
                (self.folder / "bridges-choices", choices, chosen.segments, {**tuned, "seed": self.seed}),
                (chosen.work / "bridges-texts", texts, chosen.text_segments, {"distil": chosen.distil}),
            )
            if items and segments
        ]
        _together(parts, data_hash(self.items), model).save(out)
        return out

    def _heal(self, out: Path, items: Sequence[Item], segments: str, **options: Any) -> BridgeSet:
        if not (out / "bridges.json").is_file():
            model = PolarModel.from_pretrained(self.options.model, precision="fp32", ledger=None)
            with RewardCache(cache_path(model.fingerprint, model.dtype)) as cache:
                lab.heal(
                    model,
                    items,
                    segments,
                    out=out,
                    cache=cache,
                    on_progress=self.on_progress,
                    resume=out.is_dir(),
                    **options,
                )
        return BridgeSet.load(out)


def _together(sets: Sequence[BridgeSet], data: str, model: PolarModel) -> BridgeSet:
    """All bridges as one set, in the model's dtype; of two over the same segment the first is kept."""
    decoder = model.decoder
    records = {(record.first, record.last): record for part in reversed(sets) for record in part.records}
    bridges = {segment: bridge for part in reversed(sets) for segment, bridge in part.bridges.items()}
    return BridgeSet(
        bridges={segment: bridge.to(decoder.dtype, decoder.device) for segment, bridge in sorted(bridges.items())},
        records=tuple(record for _, record in sorted(records.items())),
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        data=data,
        training={"parts": [part.training for part in sets]},
    )
