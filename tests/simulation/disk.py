"""The disk of the simulated machine: real files in memory, of which the disk knows what has been flushed.

Writing, flushing, cutting and deleting files are seams. A disk may be full, and takes part of a write then, as disks
do. A power cut leaves of each file what was flushed, or any beginning of what was written after that; what was deleted
may come back. Knows SQLite's files only as bytes (`database` says what of them is flushed).
"""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
from collections import namedtuple
from typing import TYPE_CHECKING, Any, Final

from tests.simulation import seams

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.simulation.world import Process, World


_Usage = namedtuple("_Usage", "total used free")
_ROOMY: Final = _Usage(2**40, 0, 2**40)
_FULL: Final = _Usage(2**40, 2**40, 0)


class Disk:
    """Files under one folder.

    Args:
        world: The machine.
        folder: A real folder, emptied first.
    """

    now_in: Disk | None = None
    """The disk of the world whose schedule runs."""

    def __init__(self, world: World, folder: pathlib.Path) -> None:
        self.world, self.folder = world, folder
        self.full = False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._flushed: dict[str, bytes] = {}
        """The flushed content of each file that ever was."""
        self._names: dict[int, tuple[Process, str]] = {}

    # -- open files -------------------------------------------------------------------------------------------------

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        self.world.step(f"open {_short(path)}")
        if self.full and flags & os.O_CREAT and not os.path.exists(path):  # noqa: PTH110
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        process = self.world.process
        fd = os.open(path, flags | os.O_CLOEXEC, mode)
        process.fds.add(fd)
        self._names[fd] = (process, os.fspath(path))
        return fd

    def write(self, fd: int, content: bytes) -> int:
        """`os.write`; on a full disk only a part is written, and a process may be killed in the middle."""
        _, path = self._names[fd]
        begin = len(content)
        if self.full:
            begin = self.world.random.randrange(len(content) + 1)
            os.write(fd, content[:begin])
            self.world.step(f"write {begin} of {len(content)} bytes to {_short(path)}")
            if begin == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return begin
        if self.world.random.random() < 0.1:  # in two parts, between which the process may be killed
            begin = self.world.random.randrange(len(content) + 1)
        written = os.write(fd, content[:begin])
        self.world.step(f"write {len(content)} bytes to {_short(path)}")
        return written + (os.write(fd, content[begin:]) if begin < len(content) else 0)

    def ftruncate(self, fd: int, length: int) -> None:
        self.world.step(f"cut {_short(self._names[fd][1])} to {length}")
        os.ftruncate(fd, length)

    def fsync(self, fd: int) -> None:
        path = self._names[fd][1]
        self.world.step(f"flush {_short(path)}")
        if pathlib.Path(path).is_file():
            self._flushed[path] = pathlib.Path(path).read_bytes()

    def close(self, fd: int) -> None:
        if fd not in self._names and self.world.process.dead:
            return  # closed by its end
        self.world.step(f"close {_short(self._names[fd][1])}")
        self.close_now(fd)

    def close_now(self, fd: int) -> None:
        """Close, as the end of a process does."""
        process, _ = self._names.pop(fd)
        process.fds.discard(fd)
        os.close(fd)

    def close_those_of(self, process: Process) -> None:
        """Close what the end of a process closes."""
        for fd in sorted(process.fds):
            self.close_now(fd)

    def unlink(self, path: pathlib.Path, missing_ok: bool) -> None:
        self.world.step(f"delete {_short(path)}")
        pathlib.Path(path).unlink(missing_ok)

    # -- the machine ------------------------------------------------------------------------------------------------

    def cut_power(self) -> None:
        """Leave of each file what was flushed, or more of what was written; every process is dead already."""
        for path in sorted([*self._flushed, *map(str, self._spool_files())]):
            file, flushed = pathlib.Path(path), self._flushed.get(path)
            written = file.read_bytes() if file.exists() else None
            left = self._after_power_cut(flushed, written)
            if left is not None and file.parent.is_dir():
                file.write_bytes(left)
            else:
                file.unlink(missing_ok=True)
        self._flushed = {path: pathlib.Path(path).read_bytes() for path in self._flushed if os.path.exists(path)}  # noqa: PTH110

    def _spool_files(self) -> Iterator[pathlib.Path]:
        for folder in self.folder.glob("*.spool"):
            yield from (file for file in folder.iterdir() if str(file) not in self._flushed)

    def _after_power_cut(self, flushed: bytes | None, written: bytes | None) -> bytes | None:
        draw = self.world.random
        if written is None or flushed is None:
            kept = written if draw.random() < 0.5 else flushed
            return kept if kept is None or kept == flushed else kept[: draw.randrange(len(kept) + 1)]
        if written.startswith(flushed):
            return written[: draw.randrange(len(flushed), len(written) + 1)]
        return draw.choice([written, flushed])


def _short(path: str | os.PathLike[str]) -> str:
    return os.path.basename(path)  # noqa: PTH119


def _disk() -> Disk:
    assert Disk.now_in is not None
    return Disk.now_in


class SimPath(type(pathlib.Path())):  # type: ignore[misc]
    """`pathlib.Path` on the simulated disk."""

    def open(self, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not ({"w", "a"} & set(mode)):
            return super().open(mode, *args, **options)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if "a" in mode else os.O_TRUNC)
        return _File(_disk().open(self, flags, 0o666))

    def unlink(self, missing_ok: bool = False) -> None:
        _disk().unlink(self, missing_ok)

    def mkdir(self, *args: Any, **options: Any) -> None:
        _disk().world.step(f"make folder {self.name}")
        super().mkdir(*args, **options)

    def rmdir(self) -> None:
        _disk().world.step(f"remove folder {self.name}")
        super().rmdir()

    def read_bytes(self) -> bytes:
        _disk().world.step(f"read {self.name}")
        content: bytes = super().read_bytes()
        return content


class _File:
    """A file open for writing, with a buffer."""

    def __init__(self, fd: int) -> None:
        self._fd, self._buffer = fd, b""

    def write(self, content: bytes) -> None:
        self._buffer += content

    def writelines(self, lines: Iterable[bytes]) -> None:
        self._buffer += b"".join(lines)

    def flush(self) -> None:
        while self._buffer:
            self._buffer = self._buffer[_disk().write(self._fd, self._buffer) :]

    def fileno(self) -> int:
        return self._fd

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            _disk().close(self._fd)


def _random_bytes(count: int) -> bytes:
    return seams.world().random.randbytes(count)


def replacements() -> list[tuple[object, object]]:
    """Real things, and what stands for them."""
    calls = {
        name: lambda *args, name=name: getattr(_disk(), name)(*args)
        for name in ("open", "write", "ftruncate", "fsync", "close")
    }
    draws = {"getpid": seams.pid, "urandom": _random_bytes}
    return [
        (os, seams.Namespace(os, **calls, **draws)),
        (pathlib.Path, SimPath),
        (shutil, seams.Namespace(shutil, disk_usage=lambda _: _FULL if _disk().full else _ROOMY)),
    ]
