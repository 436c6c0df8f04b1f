"""Files that are written completely or not at all, even with a full disk, Ctrl-C or a kill.

Knows no file of the project, and only the standard library.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written because the disk, or the share of it that one may use, is full."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside a file, which takes its place when the block succeeds and is removed otherwise.

    The folder is created if needed. Of writers at the same time, the last one wins, and nobody reads a mixture. A
    process that is killed leaves its draft behind: `.STEM.THREAD.PROCESS.SUFFIX`.

    Args:
        path: The file; the draft has its suffix.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{threading.get_ident()}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with suppress(OSError):  # it must not hide what went wrong
            draft.unlink(missing_ok=True)
        raise
