"""Find the sink that usage records go to, without knowing what stores them.

A package that can store records registers a factory under the entry-point group `polar_sdk.sinks`; `polar_billing`
registers `default`. A factory takes a ledger URL, or None for the place it chooses itself.
"""

from __future__ import annotations

import os
import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Final

from polar_sdk.errors import SinkError, SinkNotFoundError
from polar_sdk.locks import renewed_in_child
from polar_sdk.usage import NullSink, UsageRecord, UsageSink

if TYPE_CHECKING:
    from collections.abc import Callable


GROUP: Final = "polar_sdk.sinks"
LEDGER_VARIABLE: Final = "POLAR_LEDGER"
AUTO_LEDGER: Final = "auto"
"""The ledger named by `POLAR_LEDGER`, or else a file in the user's data folder."""


def find_sink(ledger: str | None = AUTO_LEDGER, sink: UsageSink | None = None) -> UsageSink:
    """Choose where usage records go.

    Args:
        ledger: `"auto"`, a URL for the registered meter, or None to turn metering off.
        sink: If given, it is used as it is, and `ledger` is ignored.

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
    factory = _registered_factory()
    if factory is not None:
        return factory(url)
    if url is None:
        return NullSink()
    raise SinkNotFoundError(
        f"ledger {url!r} cannot be written: no meter is installed.",
        hint="Install the extra billing of polar-llm, in a clone: `pip install '.[billing]'`, or pass ledger=None.",
    )


def _registered_factory() -> Callable[[str | None], UsageSink] | None:
    for entry in entry_points(group=GROUP, name="default"):
        try:
            factory: Callable[[str | None], UsageSink] = entry.load()
        except ModuleNotFoundError:  # registered by this distribution, but the extra is not installed
            return None
        return factory
    return None


class JsonlSink(UsageSink):
    """Appends one JSON object per request to a text file.

    For logs and for hosts without a database. It does not deduplicate: a record emitted twice is written twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = renewed_in_child(threading.Lock())

    def check(self) -> None:
        """Raise SinkError if the file cannot be opened for appending."""
        self._append("")

    def emit(self, record: UsageRecord) -> None:
        """Append the record as one line."""
        self._append(record.model_dump_json() + "\n")

    def _append(self, text: str) -> None:
        try:
            with self._lock, self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise SinkError(
                f"usage log {str(self.path)!r} cannot be written ({error.strerror}).",
                hint="Check that the folder exists and is writable.",
            ) from error
