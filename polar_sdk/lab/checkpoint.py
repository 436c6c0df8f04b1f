"""Checkpoints of a training run: safetensors files in a folder, so that Ctrl-C loses at most one step.

A run is named by a hash of its settings and data; files that another run left in the folder are ignored. No pickle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polar_sdk.engine.hashes import hash_texts
from polar_sdk.reading import parse_object
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

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

    def save(self, step: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
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
