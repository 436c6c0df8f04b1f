"""Retention where statements need it: what was pruned still counts when a statement's period is rated again.

Late usage costs its period's total with it, less the total without it: bands, packages and minimums depend on all of
the period's usage. So pruning keeps, for each issued statement, the sums of the usage that it deletes, divided as the
statement's price book divides the period. Latencies have no sums: a promise about them stays as it was settled before
its phase was pruned. A period without a statement cannot be rated any more.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter
from sqlalchemy import and_, false, func, or_, select

from polar_billing.errors import PeriodError
from polar_billing.ledger import chain
from polar_billing.ledger import retention as facts
from polar_billing.ledger.records import Selection
from polar_billing.ledger.schema import prune_table, usage_table
from polar_billing.prices.rating import Counts
from polar_billing.statements.books import charging_book
from polar_billing.statements.issued import read_statements
from polar_billing.statements.lines import PeriodUsage, Use, bounds, phases_of
from polar_billing.statements.period_usage import SeqRange, last_seq, read_usage, within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from polar_billing.ledger.records import AllTenants
    from polar_billing.statements.lines import Phase
    from polar_billing.statements.statement import Statement
    from polar_billing.values.periods import Period


class _KeptUse(NamedTuple):
    """The sum of the pruned usage of one tier and outcome; see `lines.Use`."""

    since: datetime
    """Beginning of the stretch."""
    tier: str | None
    outcome: str
    beyond: str | None
    requests: int
    flops: int
    tokens_input: int
    tokens_output: int


class KeptUsage(BaseModel):
    """What is left of a statement's usage that was pruned."""

    model_config = ConfigDict(frozen=True)

    uses: tuple[_KeptUse, ...] = ()
    latency_ns_p95: tuple[tuple[datetime, str, int], ...] = ()
    """Beginning of the phase, tier, and the percentile that its promise was settled by."""

    def together_with(self, usage: PeriodUsage, phases: Sequence[Phase]) -> PeriodUsage:
        """The period's usage with what was pruned of it; `usage` is what remains."""
        if not self.uses:
            return usage
        stretches = {stretch.since: stretch for phase in phases for stretch in phase.stretches}
        sums: dict[tuple[datetime, str | None, str, str | None], Counts] = {}
        for use in usage.uses:
            key = (use.stretch.since, use.tier, use.outcome, use.beyond)
            sums[key] = sums.get(key, Counts()) + use.counts
        for since, tier, outcome, beyond, *counts in self.uses:
            key = (since, tier, outcome, beyond)
            sums[key] = sums.get(key, Counts()) + Counts(*counts)
        uses = (Use(stretches[since], tier, outcome, count, why) for (since, tier, outcome, why), count in sums.items())
        settled = {(since, tier): latency for since, tier, latency in self.latency_ns_p95}
        return replace(usage, uses=tuple(uses), latency_ns_p95={**usage.latency_ns_p95, **settled})


_BY_STATEMENT: Final = TypeAdapter(dict[str, KeptUsage])


def prune(connection: Connection, tenant: str, before: datetime) -> int:
    """Delete the facts of a tenant's requests served before a moment, and return the number of requests.

    The caller has made sure that none of them is late usage of a statement that is still to be charged; see
    `count_uncharged`.
    """
    chain.lock_heads(connection, [tenant])  # no usage of this tenant is being stored now
    kept = {
        issued.statement.id: pruned
        for issued in read_statements(connection, tenant)
        if issued.statement.since < before
        if (pruned := _summed(connection, issued.statement, before)).uses
    }
    return facts.prune(connection, tenant, before, _BY_STATEMENT.dump_json(kept).decode())


def _summed(connection: Connection, statement: Statement, before: datetime) -> KeptUsage:
    """Add up a statement's usage before a moment."""
    book, former = charging_book(connection, statement), pruned_of(connection, statement)
    phases = [
        replace(
            phase,
            stretches=tuple(
                replace(stretch, until=min(stretch.until, before))
                for stretch in phase.stretches
                if stretch.since < before
            ),
        )
        for phase in phases_of(book, statement.tenant, statement.period)
        if phase.since < before
    ]
    seqs = SeqRange(last_seq(connection, statement.tenant))
    usage = read_usage(connection, statement.tenant, phases, seqs, SeqRange(0), book)
    settled = former.together_with(usage, phases).latency_ns_p95
    return KeptUsage(
        uses=tuple(
            _KeptUse(use.stretch.since, use.tier, use.outcome, use.beyond, *vars(use.counts).values())
            for use in usage.uses
        ),
        latency_ns_p95=tuple((since, tier, latency) for (since, tier), latency in settled.items()),
    )


def pruned_of(connection: Connection, statement: Statement) -> KeptUsage:
    """What is left of a statement's pruned usage; nothing if none was pruned."""
    pruned = prune_table.c
    query = select(pruned.statements).where(pruned.tenant == statement.tenant, pruned.before > statement.since)
    found = [
        kept
        for text in connection.execute(query.order_by(pruned.id)).scalars()
        if (kept := _BY_STATEMENT.validate_json(text).get(statement.id)) is not None
    ]
    return KeptUsage(
        uses=tuple(use for kept in found for use in kept.uses),
        latency_ns_p95=tuple(latency for kept in found for latency in kept.latency_ns_p95),
    )


def check_kept(connection: Connection, tenant: str | AllTenants, period: Period) -> None:
    """Refuse a period of which retention has deleted usage: a statement over it would be too low."""
    bounds(period)  # a statement needs both ends
    for name, requests in facts.pruned_requests(connection, Selection(tenant, period)).items():
        raise PeriodError(
            f"{requests:,} requests of tenant {name!r} were pruned, and period {period.label} needs them.",
            hint="Issue statements before you prune.",
        )


def count_uncharged(connection: Connection, tenant: str, before: datetime) -> int:
    """Number of requests served before a moment that are late for their statement, and on no later one yet."""
    issued = read_statements(connection, tenant)
    late = SeqRange(last_seq(connection, tenant), after=max((one.seq_until for one in issued), default=0))
    spans = ((one.statement.since, min(one.statement.until, before)) for one in issued)
    conditions = or_(false(), *(and_(*within(tenant, since, until, late)) for since, until in spans))
    return connection.execute(select(func.count()).select_from(usage_table).where(conditions)).scalar_one()
