"""A run that heals: what fitting bridges and fitting fills have in common.

The train split is fitted on and the dev split measured on; the calibration and test splits are left alone, and the base
weights stay as they are. Knows a model, items and where checkpoints are kept; what is fitted, the healers know.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.lab.items import builtin_items, distinct_items, item_id, split_of
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.show.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.lab.rewards.tasks import Task
    from polar_sdk.model import PolarModel


CHECKPOINT: Final = "checkpoint.safetensors"
"""Name of the file that training continues from, in the folder of the result."""
FIT_TOKENS: Final = 4096
"""Maximum tokens of a pack that the closed form reads."""
_MEASURED: Final = {"losses", "held_out", "loss_closed_form", "loss_trained", "kept_training"}
"""Facts of a training that say how it went, not how it was set."""
TRAIN_TOKENS: Final = 2048
"""Maximum tokens of a training batch: the head's weights are read once for it, and its logits are held twice."""


@dataclass
class HealingRun:
    """What fits maps on one model.

    Attributes:
        model: The model; it is not changed.
        items: Prompts; None = the prompts that come with the package.
        segments: Text form of what to fit.
        out: Folder of the result and of the checkpoint; None keeps the result in memory and no checkpoint.
        cache: Where identity's answers are kept; None = in memory.
        on_progress: Called with (stage, steps done, steps in all).
    """

    model: PolarModel
    items: Sequence[Item] | None
    segments: str
    out: str | Path | None = None
    cache: RewardCache | None = None
    on_progress: Progress = silent

    @property
    def chosen(self) -> list[Item]:
        """The items without duplicates."""
        return distinct_items(builtin_items() if self.items is None else self.items)

    @property
    def checkpoint(self) -> Path | None:
        """File of the checkpoint."""
        return None if self.out is None else Path(self.out) / CHECKPOINT

    def tasks(self, items: Sequence[Item], answer_tokens: int) -> tuple[list[Task], list[Task]]:
        """Tasks of the train split and of the dev split."""
        cache = self.cache or RewardCache()
        train, dev = (
            make_tasks(
                self.model,
                [item for item in items if split_of(item_id(item)) == split],
                cache,
                answer_tokens=answer_tokens,
                on_progress=self.on_progress,
            )
            for split in ("train", "dev")
        )
        return train, dev

    def mark(self, segments: str, data: str, settings: dict[str, Any]) -> str:
        """Names the run, so that no other one continues from its checkpoint."""
        facts = [self.model.fingerprint, self.model.dtype, segments, data, settings]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def drawn(tasks: Sequence[Task], limit: int) -> list[Task]:
    """At most N tasks, drawn by their hashes: a file may be sorted by kind."""
    return sorted(tasks, key=lambda task: task.id)[:limit]


def provenance(training: Mapping[str, Any]) -> dict[str, Any]:
    """How maps were made that another run starts from: their facts, without what was measured."""
    return {name: fact for name, fact in training.items() if name not in _MEASURED}
