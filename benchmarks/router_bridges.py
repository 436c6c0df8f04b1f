"""The bridges of the shipped router, tuned to right choices. Used by `train_router.py`.

They are trained in float32, which processors without bfloat16 tiles multiply twice as fast, and stored in the precision
that the router serves in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polar_sdk import PolarModel, lab
from polar_sdk.lab.rewards.cache import RewardCache, cache_path
from polar_sdk.router.map_set import MapSet, stored

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
        items: Questions with choices.
        folder: Of the work. A finished part is not recomputed.
        on_progress: Called with (stage, steps done, steps in all).
    """

    options: argparse.Namespace
    items: Sequence[Item]
    folder: Path
    on_progress: Progress

    def run(self, model: PolarModel) -> Path:
        """Heal what is not healed yet; returns the folder of the bridges, in that model's dtype."""
        out, chosen = self.folder / "bridges", self.options
        if (out / "maps.json").is_file():
            return out
        tuned = {"distil": chosen.tune, "labels": chosen.labels, "choices": chosen.choices, "rate": chosen.rate}
        exact = self._heal(
            self.folder / "bridges-float32", self.items, chosen.segments, **tuned, seed=chosen.bridge_seed
        )
        decoder = model.decoder
        bridges = {segment: bridge.to(decoder.dtype, decoder.device) for segment, bridge in exact.bridges.items()}
        MapSet(exact.facts.model_copy(update={"dtype": model.dtype}), stored(bridges, "exact")).save(out)
        return out

    def _heal(self, out: Path, items: Sequence[Item], segments: str, **options: Any) -> MapSet:
        if not (out / "maps.json").is_file():
            model = PolarModel.from_pretrained(self.options.model, precision="fp32", ledger=None)
            with RewardCache(cache_path(model.fingerprint, model.dtype)) as cache:
                lab.heal(
                    model,
                    items,
                    segments,
                    out=out,
                    cache=cache,
                    on_progress=self.on_progress,
                    **options,
                )
        return MapSet.load(out)
