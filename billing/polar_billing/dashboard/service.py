"""Whether all is well with a ledger and its spool at this moment. Knows no HTML."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import func, select

from polar_billing.ledger.schema import NO_TENANT, SCHEMA_VERSION, head_table, usage_table
from polar_billing.metering.spool import Spool, spool_folder

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.metering.spool import SpoolStatus

_MAX_READ: Final = 8 * 2**20
"""A spool beyond this is not counted record by record. Unit: bytes."""
_MOMENT_S: Final = 10.0
"""Records are stored within milliseconds, and are tried again every second where the ledger does not answer."""


@dataclass(frozen=True)
class SpoolHealth:
    """Records that wait in the spool of a ledger on this machine."""

    folder: Path | None
    """None if the ledger has none, or nothing was ever in it."""
    waiting: int | None = 0
    """Records that are not in the ledger yet; None if there are too many to count."""
    lag_s: float = 0.0
    """Longest wait of a record, from when its file was last written. Unit: seconds."""
    rejected: int = 0
    """Records that the ledger refused as conflicts."""
    damaged: int = 0
    """Lines that cannot be read."""

    @property
    def well(self) -> bool:
        """Whether nothing waits for more than a moment, and nothing is wrong."""
        return self.lag_s < _MOMENT_S and not (self.rejected or self.damaged)


@dataclass(frozen=True)
class LedgerHealth:
    """Size and state of the ledger."""

    version: int
    """Version of its tables."""
    last_stored: datetime | None
    """When it took in its latest record."""
    chains: int
    """Tenants with a hash chain."""
    links: int
    """Links of their chains."""


def ledger_health(connection: Connection) -> LedgerHealth:
    """Look at the ends of the chains, and at the latest record."""
    usage = usage_table.c
    latest = select(usage.stored_at).order_by(usage.seq.desc()).limit(1)
    ends = select(func.count(), func.sum(head_table.c.number)).where(head_table.c.tenant != NO_TENANT)
    chains, links = connection.execute(ends).one()
    return LedgerHealth(SCHEMA_VERSION, connection.execute(latest).scalar(), int(chains), int(links or 0))


def spool_health(ledger: Ledger) -> SpoolHealth:
    """Look at the files of the spool; those of a process that lives are emptied a moment after each record."""
    folder = spool_folder(ledger.url)
    if folder is None or not folder.is_dir():
        return SpoolHealth(None)
    files = []
    for path in folder.glob("*-*-*.jsonl"):
        with suppress(OSError):  # it may be gone meanwhile
            files.append(path.stat())
    waiting = [file for file in files if file.st_size]
    size, oldest = sum(file.st_size for file in waiting), min((file.st_mtime for file in waiting), default=time.time())
    known: SpoolStatus | None = Spool(folder).status() if size <= _MAX_READ else None
    return SpoolHealth(
        folder,
        waiting=None if known is None else known.waiting,
        lag_s=max(time.time() - oldest, 0.0),
        rejected=0 if known is None else known.rejected,
        damaged=0 if known is None else known.damaged,
    )
