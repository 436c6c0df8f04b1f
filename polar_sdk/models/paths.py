"""Places on disk, and how this package writes there: locked, in a work folder, space checked first.

    <cache>/models/<key>/         the model of one GGUF file with its `polar.json`; moved here whole, never edited
    <cache>/locks/<key>.lock      held while that model is being prepared
    <cache>/work/<key>/           only while it is being prepared
    <cache>/parts/<key>.gguf      the parts of its file that an interrupted fetch has left
    <cache>/file-hashes.json      hashes of weight files, so that they are read once and not on every load

Does not know what a model is.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from polar_sdk.errors import ModelError, PolarError
from polar_sdk.show.progress import say
from polar_sdk.writing import is_disk_full

if TYPE_CHECKING:
    from collections.abc import Iterator


CACHE_VARIABLE: Final = "POLAR_CACHE"


def cache_folder() -> Path:
    """The cache: `POLAR_CACHE`, or else `polar` in the user's cache folder. Not created here."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser().absolute() if named else Path(user_cache_dir("polar", appauthor=False))


def models_folder() -> Path:
    """The folder of the models of GGUF files."""
    return cache_folder() / "models"


def partial_path(key: str) -> Path:
    """The file that the parts of a model are added to while it is fetched."""
    return cache_folder() / "parts" / f"{key}.gguf"


def partial_files() -> list[Path]:
    """The files of which some parts were fetched."""
    return sorted((cache_folder() / "parts").glob("*.gguf"))


@contextmanager
def work_folder(key: str) -> Iterator[Path]:
    """Lock `key` against threads and processes, and yield an empty folder that is removed when the block ends.

    It is in the cache, so that moving a result from it into place is one atomic rename. What a killed process left
    there is removed by the next one to hold the lock.
    """
    work = cache_folder() / "work" / key
    with disk_errors(), _locked(key):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(key: str) -> Iterator[None]:
    path = cache_folder() / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that is preparing {key}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn an operating system error of the block into one line about the cache folder."""
    try:
        yield
    except PolarError:  # some of them are OSErrors too
        raise
    except OSError as error:
        if is_disk_full(error):
            raise disk_full() from error
        raise ModelError(
            f"cache folder {str(cache_folder())!r} cannot be used ({error.strerror or error}).",
            hint=f"Make it writable, or set {CACHE_VARIABLE} to another folder.",
        ) from error


def disk_full(needed: int | None = None, free: int | None = None) -> ModelError:
    """The error for a disk without space; sizes in bytes where they are known."""
    detail = ""
    if needed is not None and free is not None:
        sizes = f"{needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        detail = f": {sizes}, {(needed - free) / 1e6:,.0f} MB missing"
    return ModelError(
        f"the disk of cache folder {str(cache_folder())!r} is full{detail}.",
        hint=f"Free some space, or set {CACHE_VARIABLE} to a folder on another disk.",
    )


def require_space(needed: int) -> None:
    """Raise before any work if the disk of the cache has no room for `needed` bytes."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise disk_full(needed, free)
