"""A tenant's usage of a period, summed straight from the usage rows, for rating over that period; and its audits.

Sums do not depend on the order in which usage was stored. FLOPs are summed as millions and rest, since a plain sum
would exceed 64 bits. Usage and audits are also selected by their sequence numbers, so that reading them twice gives the
same result. An audit belongs to the time at which it was made. Knows no prices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, func, or_, select

from polar_billing.ledger.rollups import joined_sum, split_sum
from polar_billing.ledger.schema import audit_table, usage_table
from polar_billing.prices.rating import FAR, Counts, always_within_receipt, beyond_receipt, rate_in
from polar_billing.statements.lines import Agreement, PeriodUsage, Use
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from sqlalchemy import Connection

    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.plans import Promise
    from polar_billing.statements.lines import Phase, Stretch
    from polar_billing.statements.statement import Statement


@dataclass(frozen=True)
class SeqRange:
    """Usage or audits by their sequence numbers, `after < seq <= until`."""

    until: int
    after: int = 0


def read_usage(
    connection: Connection,
    tenant: str,
    phases: Sequence[Phase],
    seqs: SeqRange,
    audits: SeqRange,
    book: PriceBook,
) -> PeriodUsage:
    """Read what rating needs of a tenant, and of no other; see `charges.charges_of`."""
    stretches = [stretch for phase in phases for stretch in phase.stretches]
    uses = tuple(use for stretch in stretches for use in _uses(connection, tenant, stretch, seqs, book))
    latencies: dict[tuple[datetime, str], int] = {}
    agreement: dict[tuple[datetime, str], Agreement] = {}
    for phase in phases:
        promises = {} if phase.terms is None else phase.terms.promises
        for tier, promise in promises.items():
            if promise.latency_ms_p95_max is not None:
                conditions = within(tenant, phase.since, phase.until, seqs)
                if (latency := _p95(connection, [*conditions, usage_table.c.tier == tier])) is not None:
                    latencies[phase.since, tier] = latency
            if promise.agreement_min is not None:
                agreement[phase.since, tier] = _agreement(connection, tenant, phase, tier, promise, audits)
    return PeriodUsage(uses, latencies, agreement)


def within(tenant: str, since: datetime, until: datetime, seqs: SeqRange) -> list[ColumnElement[bool]]:
    """The conditions that select one tenant's usage in a half-open span of service time."""
    usage = usage_table.c
    conditions = [usage.tenant == tenant, usage.started_at >= since, usage.started_at < until]
    return [*conditions, usage.seq > seqs.after, usage.seq <= seqs.until]


def charged_flops(book: PriceBook) -> ColumnElement[int]:
    """The FLOPs that a book charges of a request."""
    usage = usage_table.c
    return usage.flops_total + func.coalesce(usage.flops_drafts, 0) if book.charge_drafts else usage.flops_total


def count_requests(connection: Connection, statement: Statement, seqs: SeqRange) -> int:
    """The number of its tenant's requests served in the period of a statement."""
    served = within(statement.tenant, statement.since, statement.until, seqs)
    return connection.execute(select(func.count()).select_from(usage_table).where(*served)).scalar_one()


def _agreement(
    connection: Connection, tenant: str, phase: Phase, tier: str, promise: Promise, seqs: SeqRange
) -> Agreement:
    audit = audit_table.c
    kept = 1 - audit.lost
    sums = (func.sum(kept), func.count(), *split_sum(kept * audit.weight), *split_sum(audit.weight))
    query = select(*sums).where(
        *_audits_within(tenant, phase.since, phase.until, seqs),
        audit.tier == tier,
        audit.loss == promise.agreement_loss,
    )
    agreed, compared, *weights = connection.execute(query).one()
    return Agreement(int(agreed or 0), compared, joined_sum(*weights[:2]), joined_sum(*weights[2:]))


def _audits_within(tenant: str, since: datetime, until: datetime, seqs: SeqRange) -> list[ColumnElement[bool]]:
    audit = audit_table.c
    conditions = [audit.tenant == tenant, audit.at >= since, audit.at < until]
    return [*conditions, audit.seq > seqs.after, audit.seq <= seqs.until]


def count_audits(connection: Connection, statement: Statement, seqs: SeqRange) -> int:
    """The number of audits of its tenant's requests that were made in the period of a statement."""
    made = _audits_within(statement.tenant, statement.since, statement.until, seqs)
    return connection.execute(select(func.count()).select_from(audit_table).where(*made)).scalar_one()


def last_audit(connection: Connection, tenant: str) -> int:
    """The sequence number of the latest audit of the tenant's requests; 0 if there is none."""
    query = select(func.coalesce(func.max(audit_table.c.seq), 0)).where(audit_table.c.tenant == tenant)
    return int(connection.execute(query).scalar_one())


def last_seq(connection: Connection, tenant: str) -> int:
    """The sequence number of the tenant's latest usage; 0 if there is none."""
    query = select(func.coalesce(func.max(usage_table.c.seq), 0)).where(usage_table.c.tenant == tenant)
    return int(connection.execute(query).scalar_one())


def _uses(connection: Connection, tenant: str, stretch: Stretch, seqs: SeqRange, book: PriceBook) -> Iterator[Use]:
    usage = usage_table.c
    tokens = (func.sum(usage.tokens_input), func.sum(usage.tokens_output))
    query = (
        select(usage.tier, usage.outcome, func.count(), *split_sum(charged_flops(book)), *tokens)
        .where(*within(tenant, stretch.since, stretch.until, seqs))
        .group_by(usage.tier, usage.outcome)
    )
    beyond = list(uses_beyond_receipt(connection, tenant, stretch, seqs, book).values())
    for tier, outcome, requests, millions, rest, tokens_input, tokens_output in connection.execute(query):
        counts = Counts(requests, joined_sum(millions, rest), int(tokens_input), int(tokens_output))
        apart = [use.counts for use in beyond if (use.tier, use.outcome) == (tier, outcome)]
        if counts != (unrated := sum(apart, Counts())):
            yield Use(stretch, tier, outcome, counts - unrated)
    yield from beyond


def uses_beyond_receipt(
    connection: Connection, tenant: str, stretch: Stretch, seqs: SeqRange, book: PriceBook
) -> dict[int, Use]:
    """The requests of a stretch that cost more than a receipt holds, by sequence number: they are unrated.

    Only the largest are looked at, which at most prices are none.
    """
    if stretch.entry is None:
        return {}
    usage = usage_table.c
    columns = (charged_flops(book), usage.tokens_input, usage.tokens_output)
    limits = zip(columns, always_within_receipt(stretch.entry), strict=True)
    large = [column > limit for column, limit in limits if limit < FAR]
    if not large:
        return {}
    query = select(usage.seq, usage.tier, usage.outcome, *columns)
    query = query.where(*within(tenant, stretch.since, stretch.until, seqs), or_(*large))
    found = {}
    for seq, tier, outcome, *counted in connection.execute(query.order_by(usage.seq)):
        rate, counts = rate_in(stretch.entry, tier, book), Counts(1, *counted)
        if isinstance(rate, str) or outcome in book.free_outcomes:
            continue
        if (reason := beyond_receipt(counts, rate, book)) is not None:
            found[seq] = Use(stretch, tier, outcome, counts, reason)
    return found


def _p95(connection: Connection, conditions: list[ColumnElement[bool]]) -> int | None:
    """The 95th percentile, nearest rank, of completed requests. Unit: nanoseconds."""
    usage = usage_table.c
    completed = [*conditions, usage.outcome == str(Outcome.COMPLETED)]
    count = connection.execute(select(func.count()).select_from(usage_table).where(*completed)).scalar_one()
    if not count:
        return None
    latency: Any = usage.queue_ns + usage.prefill_ns + usage.decode_ns
    rank = -(-95 * count // 100) - 1
    query = select(latency).where(*completed).order_by(latency).offset(rank).limit(1)
    percentile: int = connection.execute(query).scalar_one()
    return percentile
