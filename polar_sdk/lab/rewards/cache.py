"""Measurements on disk, so that nothing is measured twice and an interrupted search resumes where it stopped.

One SQLite file per model, dtype and engine version, with a row per prompt and program; a program's name includes the
hash of the bridges that it uses. Values are stored as JSON. Knows no model, and not what the values mean.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.engine import engine_version
from polar_sdk.errors import DataError
from polar_sdk.models.paths import cache_folder
from polar_sdk.reading import Unreadable, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType


BATCH: Final = 128
"""Number of prompts passed to the engine at once: it decodes as many together as it can."""
_LAYOUT = 2
"""Version of the values' layout, part of the file's name: files of other versions are not read."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (
    prompt TEXT NOT NULL, program TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (prompt, program)
) WITHOUT ROWID
"""


def cache_path(fingerprint: str, dtype: str) -> Path:
    """The file of a model's rewards, in the cache folder; see `POLAR_CACHE`."""
    return cache_folder() / "rewards" / f"{fingerprint[:24]}-{dtype}-{engine_version(dtype)}.{_LAYOUT}.sqlite3"


class RewardCache:
    """Values by (prompt, program). One object serves one thread; several processes may share a file.

    Args:
        path: The file; its folder is made if need be. None = in memory, for this object alone.

    Raises:
        DataError: The file cannot be opened or is not such a cache.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._name = ":memory:" if path is None else str(path)
        with self._errors():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._store = sqlite3.connect(self._name, timeout=60)
            if path is not None:
                self._store.execute("PRAGMA journal_mode=WAL")
                self._store.execute("PRAGMA synchronous=NORMAL")
            self._store.execute(_SCHEMA)
            self._store.commit()

    def get(self, prompts: Iterable[str], program: str) -> dict[str, Any]:
        """The values of these prompts under this program, as far as they are stored."""
        with self._errors():
            rows = (
                (
                    prompt,
                    self._store.execute("SELECT value FROM facts WHERE prompt = ? AND program = ?", (prompt, program)),
                )
                for prompt in set(prompts)
            )
            values = ((prompt, cursor.fetchone()) for prompt, cursor in rows)
            return {prompt: parse_json(row[0]) for prompt, row in values if row is not None}

    def complete(
        self,
        prompts: Sequence[str],
        program: str,
        measure: Callable[[Sequence[str]], Sequence[Any]],
        on_progress: Callable[[int, int], None],
    ) -> dict[str, Any]:
        """The values of all these prompts: what is not stored is measured in batches, and stored after each.

        Args:
            prompts: At most `BATCH` are measured at once, in this order.
            program: Under which.
            measure: Values of some prompts.
            on_progress: Called with the number measured, and of all that were not stored.
        """
        known = self.get(prompts, program)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            fresh = dict(zip(batch, measure(batch), strict=True))
            self.put(program, fresh)
            known |= fresh
            on_progress(start + len(batch), len(missing))
        return known

    def put(self, program: str, values: Mapping[str, Any]) -> None:
        """Store values by prompt under this program; they are on disk when this returns."""
        rows = [(prompt, program, json.dumps(value)) for prompt, value in values.items()]
        with self._errors(), self._store:
            self._store.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def __enter__(self) -> RewardCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, Unreadable, TypeError) as error:
            raise DataError(
                f"the cache of rewards {self._name!r} cannot be used ({error}).",
                hint="Remove the file, or set POLAR_CACHE to a writable folder.",
            ) from error
