"""The clock by which holds and claims expire, between processes: the database's, which nobody sets by accident.

PostgreSQL has one. SQLite has none, but its processes share a machine, whose time since boot nobody can set. So the
ledger stores, once per boot, how far that clock is behind the time of day; a jump of the time of day changes nothing
until the next boot. At a boot, every older hold, claim and answer has lost its process, so the clock starts after all
of them. If the machine does not identify its boots (Linux does), the time of day is used. Knows holds, claims and
answers only by their tables.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import BigInteger, delete, func, insert, select, type_coerce

from polar_billing.ledger.schema import clock_table, hold_table, reply_table, running_table
from polar_billing.values.canonical import EPOCH, to_microseconds

if TYPE_CHECKING:
    from sqlalchemy import Connection


_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_LAST_EXPIRIES: Final = [
    *(
        select(func.max(type_coerce(table.c.expires_at, BigInteger))).where(table.c.state == state)
        for table, state in ((hold_table, "held"), (reply_table, "running"))
    ),
    select(func.max(type_coerce(running_table.c.expires_at, BigInteger))),
]


def database_time(connection: Connection, *, writes: bool) -> datetime:
    """The time by the database's clock, UTC; on SQLite the first transaction after a boot writes, if it may."""
    if connection.dialect.name == "postgresql":
        moment: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return moment.astimezone(UTC)
    boot = boot_id()
    if boot is None:
        return datetime.now(UTC)
    since_boot = microseconds_since_boot()
    row = connection.execute(select(clock_table)).first()
    if row is not None and row.boot == boot:
        return EPOCH + timedelta(microseconds=row.ahead + since_boot)
    leases = [connection.execute(query).scalar() or 0 for query in _LAST_EXPIRIES]
    now = max(to_microseconds(datetime.now(UTC)), *leases)
    if writes:
        connection.execute(delete(clock_table))
        connection.execute(insert(clock_table).values(id=1, boot=boot, ahead=now - since_boot))
    return EPOCH + timedelta(microseconds=now)


@cache
def boot_id() -> str | None:
    """The identity of this machine's boot; None if it is unknown."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip() if hasattr(time, "CLOCK_BOOTTIME") else None
    except OSError:
        return None


def microseconds_since_boot() -> int:
    """The machine's clock since boot, which runs on while it sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000
