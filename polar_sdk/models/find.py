"""From what a name means to a local folder that can be loaded, with its fingerprint.

A hub model comes from the local hub cache, and from the network only if that lacks it. A cached model is used without
asking whether the hub has a newer one: a host without a network works, and a service does not change under its users.
`polar models fetch org/name` asks the hub. Only safetensors weights are fetched, and none are read into memory here.
Does not know how a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from polar_sdk.errors import (
    InvalidRequestError,
    ModelError,
    ModelFetchError,
    ModelNotFoundError,
)
from polar_sdk.models.aliases import Alias, Folder, Gguf, Hub, Source, resolve
from polar_sdk.models.fetch import get_gguf
from polar_sdk.models.fingerprint import file_sha256, fingerprint_of_folder
from polar_sdk.models.paths import models_folder
from polar_sdk.models.store import (
    Recipe,
    check_config,
    check_folder,
    converted,
    gguf_of,
    list_stored,
    read_manifest,
    repair_hint,
)
from polar_sdk.show.progress import say

_PATTERNS: Final = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_TIMEOUT_SECONDS: Final = 5.0


def get_snapshot(name: str, revision: str | None = None, *, refresh: bool = False) -> Path:
    """The local folder of a hub model.

    Args:
        name: `org/name`.
        revision: Branch, tag or commit; None is the main branch.
        refresh: Ask the hub for a newer one even if there is a local copy.

    Raises:
        ModelNotFoundError: The hub has no such model or revision, or does not show it to this user.
        ModelFetchError: The hub cannot be reached.
    """
    if not refresh and (folder := _local(name, revision)) is not None:
        return folder
    _ask_once(name, revision)
    return _download(name, revision)


def _local(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    # An interrupted download may have left a folder without weights.
    return folder if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file() else None


def _ask_once(name: str, revision: str | None) -> None:
    """One short request: a host without a network fails now, not after the hub client's retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"hub model {name!r} is gated.", hint="Accept its terms on the hub, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"hub model {name!r} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"model {name!r} is not a local folder, and the hub has no such model.",
            hint="Check the spelling; for a private model run `hf auth login` first.",
        ) from error
    except Exception as error:  # of whichever HTTP client the installed hub client is built on
        raise _unreachable(name, error) from error


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    say(f"fetching {name} from the hub")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except OSError as error:
        if error.errno is not None:
            raise ModelError(
                f"hub model {name!r} cannot be stored ({error.strerror}).",
                hint="Free some space, or set HF_HOME to another folder.",
            ) from error
        raise _unreachable(name, error) from error
    except Exception as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> ModelFetchError:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return ModelFetchError(
        f"model {name!r} is neither a local folder nor in the hub cache, and the hub cannot be reached ({reason}).",
        hint=f"Run `polar models fetch {name}` with a network connection, or pass a local folder or `.gguf` file.",
    )


@dataclass(frozen=True)
class LocalModel:
    """A checked model folder on this host."""

    folder: Path
    weights: tuple[Path, ...]
    """Its weight files, or the one GGUF file that it was made from, which may be elsewhere."""
    fingerprint: str


def obtain(source: Source, revision: str | None = None, *, refresh: bool = False) -> LocalModel:
    """Bring a model to the local disk and check it.

    Args:
        source: What `resolve` made of the name.
        revision: Branch, tag or commit of a hub model.
        refresh: Ask the hub for a newer one.

    Raises:
        ModelError: See the tree in `polar_sdk.errors`.
        InvalidRequestError: A revision of something that has no revisions.
    """
    if revision is not None and not isinstance(source, Hub):
        raise InvalidRequestError(
            f"revision {revision!r} does not apply to {source.name!r}; only hub models (`org/name`) have one."
        )
    match source:
        case Alias():
            return _of_gguf(converted(_alias_recipe(source), partial(get_gguf, source)))
        case Gguf():
            return _of_gguf(_convert_own(source.path), source.path)
        case Folder():
            return _described(source.path) if read_manifest(source.path) is None else _of_gguf(source.path)
        case Hub():
            return _described(get_snapshot(source.name, revision, refresh=refresh))


def find_local(name: str, fingerprint: str) -> LocalModel | None:
    """The model of that fingerprint, if this host has it; fetches and converts nothing.

    Args:
        name: A folder or hub id to look at, if no conversion in the cache has the fingerprint.
        fingerprint: SHA-256 of configuration and weights, hexadecimal.

    Raises:
        ModelDamagedError: A file of it is missing or was changed.
    """
    for manifest in list_stored():
        if manifest.fingerprint == fingerprint:
            made = models_folder() / manifest.made_from.key
            gguf = gguf_of(made, manifest)
            if gguf.is_file() and file_sha256(gguf) == manifest.made_from.gguf_sha256:
                return _of_gguf(made)
    try:
        source = resolve(name)
    except ModelNotFoundError:
        return None
    folder = source.path if isinstance(source, Folder) else None
    if isinstance(source, Hub):
        folder = _local(source.name, None)
    found = None if folder is None else _described(folder)
    return found if found is not None and found.fingerprint == fingerprint else None


def _alias_recipe(alias: Alias) -> Recipe:
    return Recipe(
        key=alias.key,
        name=alias.name,
        origin=alias.origin,
        gguf_sha256=alias.gguf_sha256,
        licence=alias.licence,
    )


def _convert_own(gguf: Path) -> Path:
    digest = file_sha256(gguf)
    key = f"{gguf.stem[:60]}-{digest[:12]}"
    recipe = Recipe(key=key, name=gguf.name, origin=str(gguf), gguf_sha256=digest)

    return converted(recipe, lambda _: gguf)


def _of_gguf(folder: Path, gguf: Path | None = None) -> LocalModel:
    """The model of a folder in the cache; a user's own file may be elsewhere than when it was seen first."""
    manifest = read_manifest(folder)
    assert manifest is not None, "`converted` wrote it"
    check_config(folder, repair_hint(folder))
    return LocalModel(folder, (gguf or gguf_of(folder, manifest),), manifest.fingerprint)


def _described(folder: Path) -> LocalModel:
    weights = check_folder(folder)
    return LocalModel(folder, weights, fingerprint_of_folder(folder, weights))
