"""Model folders: those of GGUF files in the cache, and whether these or other folders can be loaded.

Everything in a GGUF file but its weights is converted in a work folder and moved into place as a whole, so what is
stored under `models/` is complete even after an interruption. The weights are read from the file: a user's own file is
not moved. A folder is judged by its `config.json` and the headers of its weight files; no weights are read. Pickled
weights (`.bin`) are not accepted: reading them can run code. Does not know how a GGUF file is fetched.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from polar_sdk.errors import ModelDamagedError, ModelNotFoundError, UnsupportedArchitectureError
from polar_sdk.models.convert import CONVERSION, convert
from polar_sdk.models.fingerprint import file_sha256, fingerprint_of_conversion, hash_file
from polar_sdk.models.paths import models_folder, partial_files, work_folder
from polar_sdk.programs.program import MAX_STEPS
from polar_sdk.reading import Unreadable, not_finite, parse_json, parse_object, read_bytes, shown
from polar_sdk.show.progress import stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_MANIFEST: Final = "polar.json"
_FUNCTION: Final = 1
"""Version of what the weights of a GGUF file mean here; fingerprints change with it."""
_WEIGHTS: Final = "model.gguf"
_INDEX: Final = "model.safetensors.index.json"
_MAX_JSON: Final = 64 * 2**20
"""The index of a large model names every weight. Unit: bytes."""
_SHARD: Final = re.compile(r"[\w+,@=-][\w+,@=.-]{0,200}\.safetensors")
_LAYER: Final = re.compile(r".*?\.(\d+)\.|(\d+)\.")
"""Names of weights of a layer hold its index first: `model.layers.7.`, `h.7.`."""
_CONFIG_DTYPES: Final = (None, "auto", "float16", "bfloat16", "float32", "float64")
_WIDTHS: Final = (
    *("hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_dim", "head_dim", "word_embed_proj_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "num_experts", "num_local_experts"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
_SIZES: Final = {
    **dict.fromkeys(_WIDTHS, 2**20),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), MAX_STEPS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 2**27),
    "vocab_size": 2**24,
}
"""The largest value of each size in a configuration; the largest models there are stay far below."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class Recipe(_Facts):
    """The source of a conversion."""

    key: str
    """Folder name in the cache; holds the first digits of the source's hash."""
    name: str
    """Name of the model: alias, or file name of the GGUF file."""
    origin: str
    """The origin of the GGUF file: a pip requirement or a path."""
    gguf_sha256: str
    licence: str | None = None
    """SPDX expression; None if it is not known."""


class StoredFile(_Facts):
    """One file of a conversion."""

    bytes: int
    """Size. Unit: bytes."""
    sha256: str


class Manifest(_Facts):
    """`polar.json` of a model in the cache."""

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
    """The folder of a GGUF file's model, made now if the cache does not hold it.

    Args:
        recipe: What to convert.
        get_gguf: Given the work folder, returns the path of the GGUF file, whose hash it has checked; called only if
            needed.

    Raises:
        ModelDamagedError: The cache holds it, but a file is missing or was changed.
    """
    folder = models_folder() / recipe.key
    if read_manifest(folder) is None:
        with work_folder(recipe.key) as work:
            if (
                read_manifest(folder) is None
            ):  # otherwise another process converted it while this one waited for the lock
                _convert(recipe, get_gguf(work), work)
                shutil.rmtree(folder, ignore_errors=True)  # written by an older conversion
                folder.parent.mkdir(parents=True, exist_ok=True)
                (work / "model").replace(folder)
    check_stored(folder)
    return folder


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a converted model; None if there is none, or one of another version."""
    try:
        manifest = Manifest.model_validate(parse_json(read_bytes(folder / _MANIFEST)))
    except (OSError, Unreadable, ValidationError):
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
    """All models of GGUF files in the cache, by name."""
    folders = models_folder().glob("*/")
    manifests = [manifest for folder in folders if (manifest := read_manifest(folder)) is not None]
    return sorted(manifests, key=lambda manifest: (manifest.made_from.name, manifest.made_from.key))


def remove_stored(name: str) -> int:
    """Remove the conversions of that name or key from the cache, and what an interrupted fetch left of it.

    Returns:
        Bytes freed.

    Raises:
        ModelNotFoundError: The cache holds none.
    """
    manifests = [manifest for manifest in list_stored() if name in (manifest.made_from.name, manifest.made_from.key)]
    begun = [path for path in partial_files() if name in (path.stem, path.stem[:-13])]  # less `-` and 12 digits
    if not manifests and not begun:
        held = sorted({manifest.made_from.name for manifest in list_stored()})
        raise ModelNotFoundError(
            f"model {name!r} is not in {str(models_folder())!r}, which contains: {', '.join(held) or 'nothing'}."
        )
    for manifest in manifests:
        key = manifest.made_from.key
        # Moved away first: no half-removed model is ever stored under its name.
        with work_folder(key) as work, suppress(FileNotFoundError):
            (models_folder() / key).replace(work / "model")
    freed = sum(manifest.bytes for manifest in manifests)
    for path in begun:
        with work_folder(path.stem), suppress(FileNotFoundError):
            freed += path.stat().st_size
            path.unlink()
    return freed


def _convert(recipe: Recipe, gguf: Path, work: Path) -> None:
    folder = work / "model"
    with stage(f"reading the header of {gguf.name}, once"):
        convert(gguf, folder)
        check_config(folder)  # what the engine cannot run does not enter the cache
        if gguf.is_relative_to(work):
            gguf.replace(folder / _WEIGHTS)
        elif str(gguf) != recipe.origin:
            shutil.copyfile(gguf, folder / _WEIGHTS)
        files = {path.name: _describe(path, recipe) for path in sorted(folder.iterdir())}
    manifest = Manifest(
        conversion=CONVERSION,
        made_from=recipe,
        made_at=datetime.now(UTC),
        fingerprint=fingerprint_of_conversion(recipe.gguf_sha256, _FUNCTION),
        files=files,
    )
    (folder / _MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def gguf_of(folder: Path, manifest: Manifest) -> Path:
    """The file that holds the weights of a folder in the cache."""
    kept = folder / _WEIGHTS
    return kept if _WEIGHTS in manifest.files else Path(manifest.made_from.origin)


def _describe(path: Path, recipe: Recipe) -> StoredFile:
    # The weights were checked when they were fetched; what comes from there to here is a rename, or a copy.
    sha256 = recipe.gguf_sha256 if path.name == _WEIGHTS else hash_file(path)
    return StoredFile(bytes=path.stat().st_size, sha256=sha256)


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
    layers = check_config(folder, hint)
    weights = _weight_files(folder, hint)
    stored = _check_headers(weights, hint)
    if layers > stored:
        raise ModelDamagedError(
            f"{str(folder / 'config.json')!r} is wrong: it has {layers} layers, but the weights are those of {stored}.",
            hint=hint,
        )
    return tuple(weights)


def check_config(folder: Path, hint: str = "Copy or fetch the model again.") -> int:
    """Check the configuration of a model folder; returns its number of layers, and raises as `check_folder` does."""
    path = folder / "config.json"
    config = _read_json(path, hint)
    _check_architecture(config)
    text = config.get("text_config")
    return max(_check_sizes(path, part, hint) for part in (config, text) if isinstance(part, dict))


def _check_architecture(config: dict[str, Any]) -> None:
    from polar_sdk.engine.families import SUPPORTED

    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise UnsupportedArchitectureError(
            f"architecture {kind!r} is not supported; choose from: {', '.join(SUPPORTED)}."
        )


def _check_sizes(path: Path, config: dict[str, Any], hint: str) -> int:
    """Refuse sizes by which transformers would fail, or ask for all memory there is; returns the number of layers.

    Raises:
        ModelDamagedError: A value is not a size, not a number or not a dtype.
    """

    def wrong(name: str, value: object, wanted: str) -> ModelDamagedError:
        return ModelDamagedError(f"{str(path)!r} is wrong: {name} = {shown(value)}; it must be {wanted}.", hint=hint)

    for name, value in config.items():
        if (flaw := not_finite(value)) is not None:
            raise wrong(name, flaw, "finite")
        if name in ("dtype", "torch_dtype") and value not in _CONFIG_DTYPES:
            raise wrong(name, value, f"one of {', '.join(filter(None, _CONFIG_DTYPES))}")
        limit = _SIZES.get(name)
        lowest = 0 if "expert" in name or "moe" in name else 1
        whole = isinstance(value, int) and not isinstance(value, bool)
        if limit is not None and value is not None and not (whole and lowest <= value <= limit):
            raise wrong(name, value, f"a whole number from {lowest} to {limit:,}")
    return int(config.get("num_hidden_layers") or config.get("n_layer") or 0)


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        return parse_object(read_bytes(path, _MAX_JSON))
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"folder {str(path.parent)!r} contains no model: {path.name} is missing.",
            hint="Pass the folder that `save_pretrained` wrote, or a `.gguf` file.",
        ) from error
    except (OSError, Unreadable) as error:
        raise ModelDamagedError(f"{str(path)!r} cannot be read ({error}).", hint=hint) from error


def _weight_files(folder: Path, hint: str) -> Sequence[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not (folder / _INDEX).is_file():
        raise ModelNotFoundError(
            f"folder {str(folder)!r} contains no safetensors weights.",
            hint="Save it again with `save_pretrained`; pickled weights can run code and are not loaded.",
        )
    places = _read_json(folder / _INDEX, hint).get("weight_map", {})
    names = set(map(_shard_name, places.values())) if isinstance(places, dict) else {None}
    if None in names:
        raise ModelDamagedError(
            f"{str(folder / _INDEX)!r} is wrong: a weight is not in a `.safetensors` file of the folder itself.",
            hint=hint,
        )
    shards = sorted(name for name in names if name is not None)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise ModelDamagedError(f"folder {str(folder)!r} lacks {', '.join(missing) or 'every shard'}.", hint=hint)
    return [folder / name for name in shards]


def _shard_name(name: object) -> str | None:
    """A file name without a folder; None for anything else, so that no index reaches outside its own folder."""
    return name if isinstance(name, str) and _SHARD.fullmatch(name) else None


def _check_headers(weights: Sequence[Path], hint: str) -> int:
    """Check that the files are whole; returns the number of layers that they have weights of."""
    from safetensors import SafetensorError, safe_open

    layers: set[str] = set()
    for path in weights:
        try:
            with safe_open(path, framework="np") as file:  # compares the header's offsets with the size of the file
                layers |= {match[1] for name in file.keys() if (match := _LAYER.match(name))}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelDamagedError(f"weight file {str(path)!r} is damaged ({error}).", hint=hint) from error
    return len(layers)
