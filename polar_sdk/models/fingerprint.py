"""The identity of a model: SHA-256 over what determines its function, the configuration and the weights.

It does not depend on the dtype or device that a model runs in, on its name, or on its folder. It is the hash of files:
the same tensors in other shards have another fingerprint. The tokenizer is not part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.locks import renewed_in_child
from polar_sdk.models.paths import cache_folder
from polar_sdk.reading import Unreadable, parse_object, read_bytes
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel


_NO_FUNCTION: Final = frozenset({"transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range"})
"""Configuration fields that do not change what the model computes; nor do those that begin with `_`."""
_SOURCE: Final = "_polar_source"
"""Field of `config.json` in a folder that was exported."""
_hashes: Final[dict[str, list[Any]]] = {}
"""Hashes that this process knows, by the paths of files."""
_MAX_REMEMBERED: Final = 200
"""Files that the cache remembers, the last ones: it is read whole on every load."""
_HASHES_LOCK: Final = renewed_in_child(threading.Lock())


def fingerprint_of_folder(folder: Path, weights: Iterable[Path]) -> str:
    """Fingerprint of a model folder: `config.json` and its weight files."""
    config = parse_object(read_bytes(folder / "config.json"))
    return _digest(_functional(config), *(file_sha256(path) for path in sorted(weights)))


def mark_source(folder: Path, fingerprint: str) -> None:
    """Note in a model folder which model its weights were exported from, for as long as nobody changes them."""
    path = folder / "config.json"
    source = {"model": fingerprint, "folder": fingerprint_of_folder(folder, folder.glob("*.safetensors"))}
    config = {**parse_object(read_bytes(path)), _SOURCE: source}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def source_fingerprint(folder: Path) -> str:
    """Fingerprint of the model in a folder: its own, or that of the model that it was exported from, at full depth.

    Raises:
        OSError: It has no configuration or weights that can be read.
    """
    own = fingerprint_of_folder(folder, folder.glob("*.safetensors"))
    source = parse_object(read_bytes(folder / "config.json")).get(_SOURCE)
    return str(source["model"]) if isinstance(source, dict) and source.get("folder") == own else own


def fingerprint_of_conversion(gguf_sha256: str, version: int) -> str:
    """Fingerprint of the model of a GGUF file, which holds both configuration and weights.

    It is over the source, not the result: it is the same on every host, whichever releases wrote the result.
    """
    return _digest("gguf", version, gguf_sha256)


def fingerprint_of(model: PreTrainedModel) -> str:
    """Fingerprint of a model in memory; it differs from that of the files that it may come from.

    Weights are hashed as float32, which represents every float16 and bfloat16 value. Tied weights count once.
    """
    seen: set[int] = set()
    sums: list[str] = []
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            sums.append(f"{name} {tuple(tensor.shape)} {_tensor_sha256(tensor)}")
    return _digest(_functional(model.config.to_dict()), *sums)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache by path, size and time of last change."""
    path = path.resolve()
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    with _HASHES_LOCK:
        known = _hashes.get(str(path)) or _read_hashes().get(str(path))
    if known is None or known[:2] != stamp:
        known = [*stamp, hash_file(path)]
        with _HASHES_LOCK:
            _remember(path, known)
    with _HASHES_LOCK:
        _hashes[str(path)] = known
    return str(known[2])


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _functional(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(name): _functional(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NO_FUNCTION and not str(name).startswith("_")
    }


def _tensor_sha256(tensor: Tensor) -> str:
    import torch

    value = tensor.detach().to("cpu")
    exact = value.to(torch.float32) if value.is_floating_point() else value
    return hashlib.sha256(exact.contiguous().numpy().data).hexdigest()


def _read_hashes() -> dict[str, list[Any]]:
    try:
        known = parse_object(read_bytes(cache_folder() / "file-hashes.json"))
    except (OSError, Unreadable):
        return {}
    return {name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) == 3}


def _remember(path: Path, entry: list[Any]) -> None:
    """Best effort: two processes may lose each other's entry, and a read-only cache keeps none."""
    known = {name: value for name, value in _read_hashes().items() if Path(name).exists() and name != str(path)}
    known[str(path)] = entry
    known = dict(list(known.items())[-_MAX_REMEMBERED:])
    target = cache_folder() / "file-hashes.json"
    with contextlib.suppress(OSError), replacing(target) as draft:
        draft.write_text(json.dumps(known), encoding="utf-8")
