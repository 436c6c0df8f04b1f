"""Output files: each is written completely or not at all. Knows no format."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polar_billing.errors import OutputError
from polar_sdk.writing import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file; it takes its place when the block succeeds, and what was there stays until then.

    A device or a pipe is written as it is. The folder must exist.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with replacing(path.resolve()) as draft:
            yield draft
    except OSError as error:
        raise OutputError.of(path, error) from error
