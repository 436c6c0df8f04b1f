"""Training that survives an interruption: checkpoints in a folder, and gradient descent that resumes from one.

A checkpoint is a safetensors file, no pickle. A run is named by a hash of its settings and data; files that another run
left in the folder are ignored.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from polar_sdk.engine.hashes import hash_texts
from polar_sdk.reading import parse_object
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer

_MAX_FACTS = 2**30
"""Unit: bytes."""


def run_key(*parts: object) -> str:
    """The name of a run with these settings and data."""
    return hash_texts(map(repr, parts))


@dataclass(frozen=True)
class Checkpoint:
    """Saves and finds the steps of one run.

    Attributes:
        folder: Of the files; None keeps none.
        key: The run's name, see `run_key`.
    """

    folder: Path | None
    key: str

    def save(self, step: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a step, replacing an earlier state of it."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with replacing(self._path(step)) as draft:
            save_file(flat, draft, {"key": self.key, "facts": json.dumps(facts)})

    def load(self, step: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A step of this run, or None; a file that cannot be read counts as none."""
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return None
        try:
            with safe_open(str(self._path(step)), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                facts = parse_object(metadata["facts"], max_bytes=_MAX_FACTS)
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def clear(self, steps: Iterable[str]) -> None:
        """Remove steps that are no longer needed, and the folder if nothing else is in it."""
        if self.folder is None or not self.folder.is_dir():
            return
        for step in steps:
            self._path(step).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.safetensors"


def moments_of(optimizer: Optimizer, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that an optimizer of the Adam family has of these tensors: `NAME.exp_avg` and so on."""
    states = {name: optimizer.state.get(value, {}) for name, value in values.items()}
    return {f"{name}.{key}": moment for name, state in states.items() for key, moment in state.items()}


def restore(optimizer: Optimizer, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Set trained tensors, and the optimizer's state of them, to what a checkpoint holds."""
    for name, value in values.items():
        with torch.no_grad():
            value.copy_(tensors[name])
        moments = {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}
        if moments:  # Adam counts its steps on the CPU
            optimizer.state[value] = {
                key: each if key == "step" else each.to(value.device) for key, each in moments.items()
            }


@dataclass
class Descent:
    """Gradient descent whose learning rate rises, and then falls by half a cosine.

    Attributes:
        values: What is trained, by name.
        optimizer: Of the Adam family, over these tensors.
        checkpoint: Where the state is kept, under `name`.
        steps: Number of steps.
        rate: Highest learning rate.
        warm_up: Steps over which it rises.
        floor: Share of it that is left at the end.
        every: Steps between checkpoints.
    """

    values: Mapping[str, Tensor]
    optimizer: Optimizer
    checkpoint: Checkpoint
    name: str
    steps: int
    rate: float
    warm_up: int
    floor: float
    every: int
    losses: list[float] = field(default_factory=list, init=False)
    """One per step that is done."""

    def run(self, gradients: Callable[[int], float], on_step: Callable[[int, int], None]) -> None:
        """Train to the end, from the checkpoint on; whatever stops it leaves a checkpoint.

        Args:
            gradients: Adds the gradients of a step, and returns its loss.
            on_step: Called with the number of steps done, and of all.
        """
        if (found := self.checkpoint.load(self.name)) is not None:
            self.losses = list(found[1]["losses"])
            restore(self.optimizer, self.values, found[0])
        consistent = True
        try:
            while (step := len(self.losses)) < self.steps:
                cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
                for group in self.optimizer.param_groups:
                    rise = min(1.0, (step + 1) / self.warm_up)
                    group["lr"] = self.rate * rise * (self.floor + (1 - self.floor) * cosine)
                self.optimizer.zero_grad()
                loss = gradients(step)
                torch.nn.utils.clip_grad_norm_(self.values.values(), 1.0)
                consistent = False  # interrupted from here on, the values would be half old and half new
                self.optimizer.step()
                self.losses.append(loss)
                consistent = True
                if len(self.losses) % self.every == 0:
                    self._keep()
                on_step(len(self.losses), self.steps)
        except BaseException:
            if consistent:
                self._keep()
            raise

    def _keep(self) -> None:
        tensors = {**self.values, **moments_of(self.optimizer, self.values)}
        self.checkpoint.save(self.name, tensors, {"losses": self.losses})
