"""Prompts of audited requests, kept for some time for a new calibration; off unless a provider names tenants.

One JSON line per prompt, in an unencrypted file that only its owner may read. Prompts older than the given time are
removed whenever the file is opened or added to, and a tenant's prompts when it forbids keeping them. Knows no model.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock
from platformdirs import user_data_path

from polar_sdk.errors import AuditError
from polar_sdk.reading import Unreadable, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

FORBID_TAG: Final = "keep_prompts"
"""A tenant's request with this tag and the value `no` is not kept, and what was kept of that tenant is removed."""
MAX_KEPT: Final = 20_000
"""Maximum number of prompts in a file; the oldest go first."""
_DAY: Final = 86_400.0


def kept_path(fingerprint: str) -> Path:
    """The file of prompts that were asked of a model."""
    return user_data_path("polar", appauthor=False) / "audited" / f"{fingerprint}.jsonl"


@dataclass(frozen=True)
class KeptPrompts:
    """The prompts kept of one model.

    Attributes:
        path: The file.
        text: Of token ids, to find copies by.
        tenants: Those whose prompts may be kept; `*` = all.
        days: How long those are kept that are added. Unit: days.
    """

    path: Path
    text: Callable[[Sequence[int]], str]
    tenants: frozenset[str] = frozenset()
    days: float = 0.0

    def may_keep(self, tenant: str, tags: Mapping[str, str]) -> bool:
        """Whether a request's prompt may be kept; one that forbids it has what was kept of its tenant removed."""
        if tags.get(FORBID_TAG) == "no":
            if self.path.exists():
                self.forget(tenant)
            return False
        return tenant in self.tenants or "*" in self.tenants

    def keep(self, tokens: Sequence[int], tenant: str, tier: str) -> None:
        """Add a prompt.

        Raises:
            AuditError: The file cannot be written.
        """
        until = time.time() + self.days * _DAY
        row = {"prompt": self.text(tokens), "tokens": list(tokens), "tenant": tenant, "tier": tier, "until": until}
        with self._rows() as rows:
            rows.append(row)

    def forget(self, tenant: str) -> int:
        """Remove the prompts of a tenant; returns how many there were."""
        with self._rows() as rows:
            before = len(rows)
            rows[:] = [row for row in rows if row.get("tenant") != tenant]
            return before - len(rows)

    def __len__(self) -> int:
        """Number of prompts, after those that are too old were removed."""
        if not self.path.exists():
            return 0
        with self._rows() as rows:
            return len(rows)

    @contextmanager
    def _rows(self) -> Iterator[list[dict[str, Any]]]:
        """The rows that are not too old, to be changed; the file is written anew where they were."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", mode=0o600):
                stored = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
                rows = [parse_json(line) for line in stored]
                rows = [row for row in rows if row["until"] > time.time()][-MAX_KEPT:]
                yield rows
                lines = [json.dumps(row) for row in rows]
                if lines != stored:
                    self._write("".join(f"{line}\n" for line in lines))
        except (OSError, Unreadable, KeyError, TypeError) as error:
            raise AuditError(
                f"the file of kept prompts {str(self.path)!r} cannot be used ({error}); make it writable, or remove it."
            ) from error

    def _write(self, text: str) -> None:
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
            opened.write(text)
        draft.replace(self.path)
