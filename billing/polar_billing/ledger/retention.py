"""Retention: delete the facts of old requests, keep their proof.

A pruned request keeps its identity, content hash and receipt (`polar_pruned`), its link in the chain, and its share of
the sums by hour; its program, tags, tokens and timings are deleted. So a replay is still recognised, the chain still
closes, and totals do not change. Knows no prices.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, insert, literal, select

from polar_billing.ledger import chain
from polar_billing.ledger.connection import lock_counts
from polar_billing.ledger.records import AllTenants
from polar_billing.ledger.rollups import sum_up, usage_shares
from polar_billing.ledger.schema import prune_table, pruned_table, receipt_table, usage_table
from polar_billing.values.canonical import EPOCH

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import ColumnElement, Connection

    from polar_billing.ledger.records import Selection
    from polar_billing.ledger.rollups import Sums


_KEPT: Final = ("seq", "tenant", "source", "request_id", "content_hash", "stored_at")
_KEPT_OF_RECEIPT: Final = ("price_book_hash", "cost", "unrated")
_HOUR: Final = timedelta(hours=1)


def prune(connection: Connection, tenant: str, before: datetime, statements: str) -> int:
    """Delete the facts of a tenant's requests served before a moment, and return the number of requests.

    `statements` is what issued statements need of them later, as JSON (`polar_billing.statements.retention`).
    """
    chain.lock_heads(connection, [tenant])
    lock_counts(connection, [tenant])  # who counts now must not find some of it gone halfway through
    old = (usage_table.c.tenant == tenant, usage_table.c.started_at < before)
    sums = sum_up(usage_shares(connection, *old))
    requests = sum(quantities[0] for quantities in sums.values())
    if requests:
        _keep_proofs(connection, tenant, before, requests, sums, statements)
        pruned = select(pruned_table.c.seq).where(pruned_table.c.tenant == tenant)
        connection.execute(delete(receipt_table).where(receipt_table.c.usage_seq.in_(pruned)))
        connection.execute(delete(usage_table).where(usage_table.c.tenant == tenant, usage_table.c.seq.in_(pruned)))
    return requests


def tenants_before(connection: Connection, before: datetime) -> list[str]:
    """Every tenant with facts of requests served before a moment."""
    query = select(usage_table.c.tenant).where(usage_table.c.started_at < before).distinct()
    return list(connection.execute(query.order_by(usage_table.c.tenant)).scalars())


def _keep_proofs(
    connection: Connection, tenant: str, before: datetime, requests: int, sums: Sums, statements: str
) -> None:
    # Not canonical JSON, which ends at 64 bits; the text is hashed as it is stored.
    totals = json.dumps([[*key, *quantities] for key, quantities in sorted(sums.items())], ensure_ascii=False)
    values = {"tenant": tenant, "before": before, "pruned_at": datetime.now(UTC), "requests": requests}
    added = insert(prune_table).values(**values, totals=totals, statements=statements).returning(prune_table.c.id)
    prune_id: int = connection.execute(added).scalar_one()
    kept = [usage_table.c[name] for name in _KEPT] + [receipt_table.c[name] for name in _KEPT_OF_RECEIPT]
    query = (
        select(literal(prune_id), *kept)
        .join(receipt_table, receipt_table.c.usage_seq == usage_table.c.seq)
        .where(usage_table.c.tenant == tenant, usage_table.c.started_at < before)
    )
    names = ["prune_id", *_KEPT, *_KEPT_OF_RECEIPT]
    connection.execute(insert(pruned_table).from_select(names, query))
    chain.link(connection, prune_table, prune_id)


def pruned_totals(connection: Connection, tenant: str) -> Iterable[Sums]:
    """The sums by hour of what was pruned of a tenant, one per pruning."""
    return _totals(connection, prune_table.c.tenant == tenant)


def pruned_requests(connection: Connection, selection: Selection) -> dict[str, int]:
    """Tenants of which requests were pruned that a selection may cover → how many, by name.

    By whole hours, as sums are kept: a request within an hour of the period may be counted too, and tags are ignored.
    """
    period, pruned = selection.period, prune_table.c
    owner = () if isinstance(selection.tenant, AllTenants) else (pruned.tenant == selection.tenant,)
    begun = () if period.since is None else (pruned.before > period.since,)
    first = -math.inf if period.since is None else (period.since - EPOCH) // _HOUR
    end = math.inf if period.until is None else -((EPOCH - period.until) // _HOUR)
    found: Counter[str] = Counter()
    for sums in _totals(connection, *owner, *begun):
        for (tenant, hour, tier, model, *_), (requests, *_) in sums.items():
            if first <= hour < end and selection.tier in {None, tier} and selection.model in {None, model}:
                found[tenant] += requests
    return dict(sorted(found.items()))


def _totals(connection: Connection, *conditions: ColumnElement[bool]) -> Iterable[Sums]:
    for text in connection.execute(select(prune_table.c.totals).where(*conditions)).scalars():
        rows: list[list[Any]] = json.loads(text)
        yield {tuple(row[:8]): row[8:] for row in rows}
