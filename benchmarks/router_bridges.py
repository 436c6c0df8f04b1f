"""The bridges of the shipped router: some tuned to right choices, some distilled on texts, put together in one folder.

Used by `train_router.py`. They are trained in float32, which processors without bfloat16 tiles multiply twice as fast,
and stored in the precision that the router serves in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polar_sdk import PolarModel
from polar_sdk.lab.bridges.heal import Healer, HealOptions
from polar_sdk.lab.items import ChoiceItem, data_hash
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.router.bridge_set import BridgeSet

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from polar_sdk.lab.items import Item

__all__ = ["Bridging"]


@dataclass(frozen=True)
class Bridging:
    """What to heal, and how.

    Attributes:
        options: Of the command line.
        items: All prompts; choices and texts are healed apart.
        seed: Of the bridges for choices; those for texts, which learn from no label, have one.
        folder: Of this seed's work; those for texts lie beside it. A finished part is not made again.
        show: Progress.
    """

    options: argparse.Namespace
    items: Sequence[Item]
    seed: int
    folder: Path
    show: Callable[[str, int, int], None]

    def run(self, model: PolarModel) -> Path:
        """Heal what is not healed yet; returns the folder of all bridges, for that model's dtype."""
        out = self.folder / "bridges"
        if (out / "bridges.json").is_file():
            return out
        choices = [item for item in self.items if isinstance(item, ChoiceItem)]
        texts = [item for item in self.items if not isinstance(item, ChoiceItem)]
        given = self.options
        tuned = HealOptions(
            distil=given.tune, labels=given.labels, choices=given.choices, rate=given.rate, seed=self.seed
        )
        plain = HealOptions(distil=given.distil)
        made = [
            self._heal(part, some, segments, options)
            for part, some, segments, options in (
                (self.folder / "bridges-choices", choices, given.segments, tuned),
                (given.work / "bridges-texts", texts, given.text_segments, plain),
            )
            if some and segments
        ]
        _together(made, data_hash(self.items), model).save(out)
        return out

    def _heal(self, out: Path, items: Sequence[Item], segments: str, options: HealOptions) -> BridgeSet:
        if not (out / "bridges.json").is_file():
            model = PolarModel.from_pretrained(self.options.model, precision="fp32", ledger=None)
            options = replace(options, resume=out.is_dir())
            with RewardCache(cache_path(model.fingerprint, model.dtype)) as cache:
                Healer(model, items, segments, options, out=out, cache=cache, on_progress=self.show).run()
        return BridgeSet.load(out)


def _together(sets: Sequence[BridgeSet], data: str, model: PolarModel) -> BridgeSet:
    """All bridges as one set, in the model's dtype; of two for one segment the first stays."""
    decoder = model.decoder
    records = {(one.first, one.last): one for some in reversed(sets) for one in some.records}
    bridges = {segment: bridge for some in reversed(sets) for segment, bridge in some.bridges.items()}
    return BridgeSet(
        bridges={segment: bridge.to(decoder.dtype, decoder.device) for segment, bridge in sorted(bridges.items())},
        records=tuple(record for _, record in sorted(records.items())),
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        data=data,
        training={"parts": [some.training for some in sets]},
    )
