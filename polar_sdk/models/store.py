"""Model folders: the converted models in the cache, and whether a folder, theirs or any, can be loaded.

A model is converted in a work folder and moved into place whole: what is stored under `models/` is complete, whatever
was interrupted. A folder is judged by its `config.json` and the headers of its weight files; no weights are read.
Pickled weights (`.bin`) are not accepted: reading them can run code. Does not know how a GGUF file is fetched.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from polar_sdk.errors import ModelDamagedError, ModelNotFoundError, UnsupportedArchitectureError
from polar_sdk.models.convert import CONVERSION, convert, stored_dtype
from polar_sdk.models.fingerprint import file_sha256, fingerprint_of_conversion, hash_file
from polar_sdk.models.paths import models_folder, work_folder
from polar_sdk.show.progress import stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


_MANIFEST: Final = "polar.json"
_INDEX: Final = "model.safetensors.index.json"


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class Recipe(_Facts):
    """The source of a conversion."""

    key: str
    """Folder name in the cache; holds the first digits of the source's hash."""
    name: str
    """Name of the model: alias, or file name of the GGUF file."""
    origin: str
    """Where the GGUF file came from: a pip requirement or a path."""
    gguf_sha256: str
    licence: str | None = None
    """SPDX expression; None where it is not known."""


class StoredFile(_Facts):
    """One file of a conversion."""

    bytes: int
    """Size. Unit: bytes."""
    sha256: str


class Manifest(_Facts):
    """`polar.json` of a converted model."""

    conversion: int
    """Version of the conversion that wrote it."""
    made_from: Recipe
    made_at: AwareDatetime
    fingerprint: str
    files: dict[str, StoredFile]

    @property
    def bytes(self) -> int:
        """Size of all files. Unit: bytes."""
        return sum(file.bytes for file in self.files.values())


def converted(recipe: Recipe, get_gguf: Callable[[Path], Path]) -> Path:
    """The folder of a converted model, converted now if the cache does not hold it.

    Args:
        recipe: What to convert.
        get_gguf: Given the work folder, returns the path of the checked GGUF file; called only if needed.

    Raises:
        ModelDamagedError: The cache holds it, but a file is missing or was changed.
    """
    folder = models_folder() / recipe.key
    if read_manifest(folder) is None:
        with work_folder(recipe.key) as work:
            if (
                read_manifest(folder) is None
            ):  # otherwise another process converted it while this one waited for the lock
                _convert(recipe, get_gguf(work), work / "model")
                shutil.rmtree(folder, ignore_errors=True)  # written by an older conversion
                folder.parent.mkdir(parents=True, exist_ok=True)
                (work / "model").replace(folder)
    check_stored(folder)
    return folder


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a converted model; None where there is none, or one of another version."""
    try:
        manifest = Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None
    return manifest if manifest.conversion == CONVERSION else None


def check_stored(folder: Path) -> None:
    """Compare the files of a conversion with its manifest; a file unchanged since the last check is not read.

    Raises:
        ModelDamagedError: A file is missing, cut short or changed.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest.files.items() if manifest else ():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts.bytes or file_sha256(path) != facts.sha256:
            raise ModelDamagedError(
                f"cached model file {str(path)!r} is damaged: it differs from what the conversion wrote.",
                hint=repair_hint(folder),
            )


def repair_hint(folder: Path) -> str:
    """How to replace a damaged conversion."""
    manifest = read_manifest(folder)
    name = folder.name if manifest is None else manifest.made_from.name
    return f"Run `polar models remove {name}`, then load or fetch it again."


def list_stored() -> list[Manifest]:
    """All converted models in the cache, by name."""
    folders = models_folder().glob("*/")
    manifests = [manifest for folder in folders if (manifest := read_manifest(folder)) is not None]
    return sorted(manifests, key=lambda manifest: (manifest.made_from.name, manifest.made_from.key))


def remove_stored(name: str) -> int:
    """Remove the conversions of that name or key from the cache.

    Returns:
        Bytes freed.

    Raises:
        ModelNotFoundError: The cache holds none.
    """
    manifests = [manifest for manifest in list_stored() if name in (manifest.made_from.name, manifest.made_from.key)]
    if not manifests:
        held = sorted({manifest.made_from.name for manifest in list_stored()})
        raise ModelNotFoundError(
            f"model {name!r} is not in {str(models_folder())!r}, which contains: {', '.join(held) or 'nothing'}."
        )
    for manifest in manifests:
        key = manifest.made_from.key
        # Moved away first: no half-removed model is ever stored under its name.
        with work_folder(key) as work, suppress(FileNotFoundError):
            (models_folder() / key).replace(work / "model")
    return sum(manifest.bytes for manifest in manifests)


def _convert(recipe: Recipe, gguf: Path, folder: Path) -> None:
    with stage(f"converting {gguf.name} to safetensors, once"):
        convert(gguf, folder, stored_dtype(gguf))
        check_folder(folder)  # what the engine cannot run does not enter the cache
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    manifest = Manifest(
        conversion=CONVERSION,
        made_from=recipe,
        made_at=datetime.now(UTC),
        fingerprint=fingerprint_of_conversion(recipe.gguf_sha256, CONVERSION),
        files=files,
    )
    (folder / _MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _describe(path: Path) -> StoredFile:
    return StoredFile(bytes=path.stat().st_size, sha256=hash_file(path))


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
            f"architecture {kind!r} is not supported; choose from: {', '.join(SUPPORTED)}."
        )


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"folder {str(path.parent)!r} contains no model: {path.name} is missing.",
            hint="Pass the folder that `save_pretrained` wrote, or a `.gguf` file.",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelDamagedError(f"{str(path)!r} cannot be read ({error}).", hint=hint) from error
    if not isinstance(value, dict):
        raise ModelDamagedError(f"{str(path)!r} does not contain a JSON object.", hint=hint)
    return value


def _weight_files(folder: Path, hint: str) -> Sequence[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not (folder / _INDEX).is_file():
        raise ModelNotFoundError(
            f"folder {str(folder)!r} contains no safetensors weights.",
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
