"""From what a name means to a local folder that can be loaded, with its fingerprint.

It reads no weights into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import InvalidRequestError
from polar_sdk.loading.aliases import Alias, Folder, Gguf, Hub, Source
from polar_sdk.loading.fetch import get_gguf
from polar_sdk.loading.fingerprint import file_sha256, fingerprint_of_folder
from polar_sdk.loading.folder import check_folder
from polar_sdk.loading.hub import get_snapshot
from polar_sdk.loading.paths import require_space
from polar_sdk.loading.store import Recipe, converted, read_manifest, repair_hint

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LocalModel", "obtain"]

_GROWTH: Final = 5
"""Room to ask for before converting, in sizes of the GGUF file: 4.5 bits a weight become 16."""


@dataclass(frozen=True)
class LocalModel:
    """A checked model folder on this host."""

    folder: Path
    weights: tuple[Path, ...]
    fingerprint: str


def obtain(source: Source, revision: str | None = None, *, refresh: bool = False) -> LocalModel:
    """Bring a model to the local disk and check it.

    Args:
        source: What `resolve` made of the name.
        revision: Branch, tag or commit of a hub model.
        refresh: Ask the hub for a newer one.

    Raises:
        ModelError: See the tree in `polar_sdk.errors`.
        InvalidRequestError: A revision of something that has none.
    """
    if revision is not None and not isinstance(source, Hub):
        raise InvalidRequestError(
            f"revision {revision!r} does not apply to {source.name!r}; only hub models (`org/name`) have one."
        )
    match source:
        case Alias():
            return _stored(converted(_alias_recipe(source), partial(get_gguf, source)))
        case Gguf():
            return _stored(_convert_own(source.path))
        case Folder():
            return _described(source.path)
        case Hub():
            return _described(get_snapshot(source.name, revision, refresh=refresh))


def _alias_recipe(alias: Alias) -> Recipe:
    return Recipe(
        key=alias.key,
        name=alias.name,
        origin=alias.requirement,
        gguf_sha256=alias.gguf_sha256,
        licence=alias.licence,
    )


def _convert_own(gguf: Path) -> Path:
    digest = file_sha256(gguf)
    key = f"{gguf.stem[:60]}-{digest[:12]}"
    recipe = Recipe(key=key, name=gguf.name, origin=str(gguf), gguf_sha256=digest)

    def already_here(_: Path) -> Path:
        require_space(_GROWTH * gguf.stat().st_size)
        return gguf

    return converted(recipe, already_here)


def _stored(folder: Path) -> LocalModel:
    weights = check_folder(folder, repair_hint(folder))
    manifest = read_manifest(folder)
    fingerprint = fingerprint_of_folder(folder, weights) if manifest is None else manifest.fingerprint
    return LocalModel(folder, weights, fingerprint)


def _described(folder: Path) -> LocalModel:
    weights = check_folder(folder)
    return LocalModel(folder, weights, fingerprint_of_folder(folder, weights))
