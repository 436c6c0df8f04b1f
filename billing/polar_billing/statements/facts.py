"""Summed usage of a tenant, straight from the usage rows, for rating over a period.

Sums do not depend on the order usage was stored in. FLOPs are summed as millions and rest, since a sum over
FLOPs would leave 64 bits. Usage is taken up to a number (`seq`), so that what is read twice is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ColumnElement, func, select

from polar_billing.ledger.schema import usage_table
from polar_billing.prices.rating import Counts
from polar_billing.statements.lines import Facts, Use
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Connection

    from polar_billing.statements.lines import Agreement, Stretch, Window


_MILLION: Final = 10**6


@dataclass(frozen=True)
class Numbers:
    """Which usage by its number, `after < seq <= until`."""

    until: int
    after: int = 0


def facts_of(
    connection: Connection,
    tenant: str,
    windows: Sequence[Window],
    numbers: Numbers,
    agreement: Mapping[str, Agreement],
) -> Facts:
    """Read what rating needs; see `charges.charges_of`.

    Args:
        connection: Any transaction of the ledger.
        tenant: Whose usage; no other's is read.
        windows: How the book cuts the period.
        numbers: Which usage.
        agreement: What was measured of answers elsewhere, by tier.
    """
    stretches = [stretch for window in windows for stretch in window.stretches]
    return Facts(
        uses=tuple(use for stretch in stretches for use in _uses(connection, tenant, stretch, numbers)),
        latency_ns_p95=dict(_latencies(connection, tenant, windows, numbers)),
        agreement=dict(agreement),
    )


def within(tenant: str, since: datetime, until: datetime, numbers: Numbers) -> list[ColumnElement[bool]]:
    """The conditions of one tenant's usage in a half-open time."""
    usage = usage_table.c
    conditions = [usage.tenant == tenant, usage.started_at >= since, usage.started_at < until]
    return [*conditions, usage.seq > numbers.after, usage.seq <= numbers.until]


def count_requests(connection: Connection, tenant: str, since: datetime, until: datetime, numbers: Numbers) -> int:
    """How many requests of a tenant were served in a half-open time."""
    query = select(func.count()).select_from(usage_table).where(*within(tenant, since, until, numbers))
    return connection.execute(query).scalar_one()


def last_number(connection: Connection, tenant: str) -> int:
    """The number of the tenant's latest usage; 0 where there is none."""
    number: int | None = connection.execute(
        select(func.max(usage_table.c.seq)).where(usage_table.c.tenant == tenant)
    ).scalar()
    return number or 0


def _uses(connection: Connection, tenant: str, stretch: Stretch, numbers: Numbers) -> Iterator[Use]:
    usage = usage_table.c
    query = (
        select(
            usage.tier,
            usage.outcome,
            func.count(),
            func.sum(usage.flops_total // _MILLION),
            func.sum(usage.flops_total % _MILLION),
            func.sum(usage.tokens_input),
            func.sum(usage.tokens_output),
        )
        .where(*within(tenant, stretch.since, stretch.until, numbers))
        .group_by(usage.tier, usage.outcome)
    )
    for tier, outcome, requests, millions, rest, tokens_input, tokens_output in connection.execute(query):
        flops = int(millions) * _MILLION + int(rest)
        yield Use(stretch, tier, outcome, Counts(requests, flops, int(tokens_input), int(tokens_output)))


def _latencies(
    connection: Connection, tenant: str, windows: Sequence[Window], numbers: Numbers
) -> Iterator[tuple[tuple[datetime, str], int]]:
    for window in windows:
        promises = {} if window.terms is None else window.terms.promises
        for tier, promise in promises.items():
            if promise.latency_ms_p95_max is not None:
                conditions = within(tenant, window.since, window.until, numbers)
                latency = _p95(connection, [*conditions, usage_table.c.tier == tier])
                if latency is not None:
                    yield (window.since, tier), latency


def _p95(connection: Connection, conditions: list[ColumnElement[bool]]) -> int | None:
    """The 95th percentile, nearest rank, of completed requests. Unit: nanoseconds."""
    usage = usage_table.c
    completed = [*conditions, usage.outcome == str(Outcome.COMPLETED)]
    count = connection.execute(select(func.count()).select_from(usage_table).where(*completed)).scalar_one()
    if not count:
        return None
    latency: Any = usage.queue_ns + usage.prefill_ns + usage.decode_ns
    place = -(-95 * count // 100) - 1
    query = select(latency).where(*completed).order_by(latency).offset(place).limit(1)
    found: int = connection.execute(query).scalar_one()
    return found
