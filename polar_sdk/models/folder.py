"""Is this folder a model that can be loaded? Looks at `config.json` and at the headers of the weight files.

It reads no weights and does not know where the folder came from. Pickled weights (`.bin`) are not accepted:
reading them can run code.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from polar_sdk.errors import ModelDamagedError, ModelNotFoundError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


_INDEX = "model.safetensors.index.json"


def check_folder(folder: Path, hint: str = "Copy or fetch the model again.") -> tuple[Path, ...]:
    """Check a model folder without reading its weights.

    Args:
        folder: As `save_pretrained` writes it.
        hint: How to repair it, for the error.

    Returns:
        Its weight files.

    Raises:
        ModelNotFoundError: No configuration or no safetensors weights.
        ModelDamagedError: A file is cut short or not readable.
        UnsupportedArchitectureError: The engine has no family for it.
    """
    _check_architecture(_read_json(folder / "config.json", hint))
    weights = _weight_files(folder, hint)
    _check_headers(weights, hint)
    return tuple(weights)


def _check_architecture(config: dict[str, Any]) -> None:
    from polar_sdk.engine.families import SUPPORTED

    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise UnsupportedArchitectureError(
            f"architecture {kind!r} is not supported; supported are: {', '.join(SUPPORTED)}."
        )


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"folder {str(path.parent)!r} holds no model: {path.name} is missing.",
            hint="Name the folder that `save_pretrained` wrote, or a `.gguf` file.",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelDamagedError(f"{str(path)!r} cannot be read ({error}).", hint=hint) from error
    if not isinstance(value, dict):
        raise ModelDamagedError(f"{str(path)!r} holds no JSON object.", hint=hint)
    return value


def _weight_files(folder: Path, hint: str) -> Sequence[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not (folder / _INDEX).is_file():
        raise ModelNotFoundError(
            f"folder {str(folder)!r} holds no safetensors weights.",
            hint="Save it again with `save_pretrained`; pickled weights can run code and are not loaded.",
        )
    shards = sorted(set(_read_json(folder / _INDEX, hint).get("weight_map", {}).values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise ModelDamagedError(f"folder {str(folder)!r} lacks {', '.join(missing) or 'every shard'}.", hint=hint)
    return [folder / name for name in shards]


def _check_headers(weights: Sequence[Path], hint: str) -> None:
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="np"):  # compares the header's offsets with the size of the file
                pass
        except (SafetensorError, OSError) as error:
            raise ModelDamagedError(f"weight file {str(path)!r} is damaged ({error}).", hint=hint) from error
