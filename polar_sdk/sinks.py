"""Find the sink that usage records go to, without knowing what stores them.

A package that can store records registers a factory under the entry-point group `polar_sdk.sinks`; `polar_billing`
registers `default`. A factory takes a ledger URL, or None for its default place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import OrderedDict
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import SinkError, SinkNotFoundError
from polar_sdk.locks import renewed_in_child
from polar_sdk.usage import NullSink, UsageRecord, UsageSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.metadata import EntryPoints


GROUP: Final = "polar_sdk.sinks"
LEDGER_VARIABLE: Final = "POLAR_LEDGER"
_REMEMBERED: Final = 1_000
"""Lines of a log that are known again."""
AUTO_LEDGER: Final = "auto"
"""The ledger named by `POLAR_LEDGER`, otherwise a file in the user's data folder."""


def find_sink(ledger: str | None = AUTO_LEDGER, sink: UsageSink | None = None) -> UsageSink:
    """Choose where usage records go.

    Args:
        ledger: `"auto"`, a URL for the registered meter, or None to turn metering off.
        sink: If given, it is used, and `ledger` is ignored.

    Returns:
        The sink; the caller owns it only if it was passed in.

    Raises:
        SinkNotFoundError: A ledger URL was named, by argument or `POLAR_LEDGER`, but no meter is installed.
    """
    if sink is not None:
        return sink
    if ledger is None:
        return NullSink()
    url = os.environ.get(LEDGER_VARIABLE) or None if ledger == AUTO_LEDGER else ledger
    factory = _registered_factory(entry_points)
    if factory is not None:
        return factory(url)
    if url is None:
        return NullSink()
    raise SinkNotFoundError(
        f"ledger {url!r} cannot be written: no meter is installed.",
        hint="Install the extra billing of polar-llm, in a clone: `pip install '.[billing]'`, or pass ledger=None.",
    )


@cache
def _registered_factory(find: Callable[..., EntryPoints]) -> Callable[[str | None], UsageSink] | None:
    """The factory; looked for once, as it takes longer than to make an object of a model that is loaded."""
    for entry in find(group=GROUP, name="default"):
        try:
            factory: Callable[[str | None], UsageSink] = entry.load()
        except ModuleNotFoundError:  # registered by this distribution, but the extra is not installed
            return None
        return factory
    return None


class JsonlSink(UsageSink):
    """Appends one JSON object per request to a text file.

    For logs and for hosts without a database. A record emitted again, such as after Ctrl-C in `emit`, is not written
    again; a request id that is used again is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = renewed_in_child(threading.Lock())
        self._begun: OrderedDict[bytes, int] = OrderedDict()
        """Hash of a line → where the file ended before it was written, or only begun. Unit: bytes."""

    def check(self) -> None:
        """Raise SinkError if the file cannot be opened for appending."""
        with self._open():
            pass

    def emit(self, record: UsageRecord) -> None:
        """Append the record as one line."""
        line = record.model_dump_json().encode() + b"\n"
        digest = hashlib.sha256(line).digest()
        with self._open() as file:
            end = file.seek(0, os.SEEK_END)
            if (begun := self._begun.get(digest)) is not None:
                file.seek(begun)  # it may be there, alone on its line; other processes may have written since
                if line in file.readall().splitlines(keepends=True):
                    return
            self._begun[digest] = end
            if len(self._begun) > _REMEMBERED:
                self._begun.popitem(last=False)
            self._write(file, line, end)

    def _write(self, file: FileIO, line: bytes, end: int) -> None:
        """Write a line whole or not at all."""
        if file.write(line) != len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _open(self) -> Iterator[FileIO]:
        try:
            with self._lock, FileIO(self.path, "a+") as file:
                yield file
        except OSError as error:
            raise SinkError(
                f"usage log {str(self.path)!r} cannot be written ({error.strerror}).",
                hint="Check that the folder exists and is writable.",
            ) from error
