"""Weights of safetensors files as tensors that are read when they are first used, layer by layer.

Every layer has a mapping of its own, because the pages of a mapping count as memory of the process until all tensors in
it are gone: whoever copies the weights of a layer and drops them has dropped its part of the file too. Knows files and
names, no architecture.
"""

from __future__ import annotations

import json
import mmap
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

__all__ = ["map_weights"]

_DTYPES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LAYER: Final = re.compile(r".*?\.\d+\.")
"""What the names of the weights of one layer begin with: `model.layers.7.`."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in a file; the bytes from `start` to `end` are its values."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int


def map_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """All weights of these files by name; nothing but the headers is read yet. They must not be written to.

    Raises:
        UnsupportedArchitectureError: A weight has a dtype that the engine does not run.
        OSError: A file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        groups: dict[str, list[_Entry]] = defaultdict(list)
        for entry in _entries(path):
            layer = _LAYER.match(entry.name)
            groups[layer.group() if layer else entry.name].append(entry)
        for entries in groups.values():
            found |= _map(path, entries)
    return found


def _entries(path: Path) -> Iterator[_Entry]:
    """What the header says: 8 bytes of length, then JSON with offsets that count from its end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, told in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in told["data_offsets"])
            yield _Entry(name, _dtype(name, told["dtype"]), told["shape"], start, end)


def _dtype(name: str, told: str) -> str:
    if told not in _DTYPES:
        raise UnsupportedArchitectureError(
            f"weight {name} is stored as {told}, which is not supported; supported are: {', '.join(_DTYPES)}."
        )
    return _DTYPES[told]


def _map(path: Path, entries: list[_Entry]) -> dict[str, Tensor]:
    """The tensors of one layer, over one mapping, which ends with the last of them."""
    import torch

    start = min(entry.start for entry in entries)
    start -= start % mmap.ALLOCATIONGRANULARITY
    length = max(entry.end for entry in entries) - start
    found: dict[str, Tensor] = {}
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) if length else b""
        for entry in entries:
            dtype = getattr(torch, entry.dtype)
            if entry.start == entry.end:
                found[entry.name] = torch.empty(entry.shape, dtype=dtype)
                continue
            count = (entry.end - entry.start) // dtype.itemsize
            flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=entry.start - start)
            found[entry.name] = flat.view(entry.shape)
    return found
