"""Promises with their audits, how the state of each came about, and what tiers saved by kind and length.

A promise's audits are about the requests of all tenants, so a report on one tenant does not have them. Kinds are the
values of a tag that callers set; lengths are prompt tokens. Knows no output format.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from sqlalchemy import case, func, select

from polar_billing.budgets.counters import tag_of
from polar_billing.errors import QueryError
from polar_billing.ledger.audits import watch
from polar_billing.ledger.rollups import joined_sum, split_sum, usage_of
from polar_billing.ledger.schema import standing_table, usage_table
from polar_billing.prices.entries import tier_order
from polar_billing.reports import Part
from polar_billing.values.money import quotient
from polar_sdk.reading import shown
from polar_sdk.usage import flaw_of_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

    from polar_billing.ledger.audits import Watched
    from polar_billing.ledger.records import Selection

KIND_TAG: Final = "kind"
"""The tag that says of which kind a request is, where nobody names another."""
_LENGTHS: Final = (128, 512, 2_048)
_SHARE_DECIMALS: Final = 6


class Change(Part):
    """A state that a promise came to."""

    state: str
    since: datetime
    """When the audit that changed it was made, UTC."""
    audits: int
    """Audits of the promise, that one included."""
    losses: int
    reason: str


class PromiseDrift(Part):
    """A promise and its audits."""

    promise: str
    """Digest."""
    tier: str
    state: str
    since: datetime
    alpha: float
    """Share of lost answers that is promised at most."""
    delta: float
    audits: int
    losses: int
    low: float
    """Share of lost answers among the audited: from here to `high`, at all times at once with confidence 1 − δ."""
    high: float
    evidence: float
    """Natural logarithm of the evidence against the promise; at ln(1/δ) it is at risk."""
    history: tuple[Change, ...]
    """In order."""


class Saved(Part):
    """Usage of one tier, kind and length beside full depth."""

    tier: str
    kind: str | None
    """Value of the tag; None if a request has none."""
    tokens_max: int | None
    """Longest prompts of it; None for those beyond all limits. Unit: tokens."""
    requests: int
    flops: int
    identity_flops: int
    saved: Decimal
    """Share of full depth's FLOPs."""
    next_tier: str | None = None
    """The certified tier that saves next to it, if the router says so."""
    next_saved: Decimal | None = None
    """Share that it saved on its calibration prompts."""


def promises_of(connection: Connection, known: dict[str, Watched]) -> tuple[PromiseDrift, ...]:
    """Every audited promise by tier, those that were audited last first; `known` remembers what was read."""
    watch(connection, known)
    changes: dict[str, list[Change]] = {}
    for row in connection.execute(select(standing_table).order_by(standing_table.c.seq)):
        change = Change(state=row.state, since=row.since, audits=row.audits, losses=row.losses, reason=row.reason)
        changes.setdefault(row.promise, []).append(change)
    ordered = sorted(known.values(), key=lambda one: (tier_order(one.tier), -one.last))
    return tuple(_drift(one, changes.get(one.promise, [])) for one in ordered)


def _drift(watched: Watched, history: list[Change]) -> PromiseDrift:
    monitor = watched.monitor
    low, high = monitor.interval
    return PromiseDrift(
        promise=watched.promise,
        tier=watched.tier,
        state=str(monitor.state),
        since=watched.since or datetime.min.replace(tzinfo=UTC),
        alpha=monitor.alpha,
        delta=monitor.delta,
        audits=monitor.audits,
        losses=monitor.losses,
        low=low,
        high=high,
        evidence=monitor.evidence,
        history=tuple(history),
    )


def saved_by(
    connection: Connection, selection: Selection, tag: str, certified: Mapping[str, Decimal]
) -> tuple[Saved, ...]:
    """Savings of the tiers of a selection, by the value of a tag and the length of prompts.

    Args:
        connection: A transaction that reads the ledger.
        selection: Which usage; its tags are ignored.
        tag: Name of the tag.
        certified: Tier → share that it saved when it was calibrated; empty if no router says so.

    Raises:
        QueryError: No tag can have that name.
    """
    if flaw_of_name(tag) or not tag or set(tag) & set('"\\'):
        raise QueryError(
            f"{shown(tag)} is not the name of a tag.", hint="Name the tag that holds the kind, such as kind."
        )
    usage, kind = usage_table.c, tag_of(connection, tag)
    length = case(*((usage.tokens_input <= most, most) for most in _LENGTHS))
    sums = (*split_sum(usage.flops_total), *split_sum(usage.identity_flops))
    query = select(usage.tier, kind.label("kind"), length.label("length"), func.count(), *sums)
    query = query.where(*usage_of(selection), usage.tier.is_not(None), usage.identity_flops > 0)
    found = []
    for tier, value, most, requests, *parts in connection.execute(query.group_by("tier", "kind", "length")):
        flops, identity = joined_sum(*parts[:2]), joined_sum(*parts[2:])
        own = certified.get(tier)
        beyond = [] if own is None else [(saved, name) for name, saved in certified.items() if saved > own]
        next_saved, next_tier = min(beyond, default=(None, None))
        found.append(
            Saved(
                tier=tier,
                kind=value,
                tokens_max=most,
                requests=requests,
                flops=flops,
                identity_flops=identity,
                saved=quotient((identity - flops) * 10**_SHARE_DECIMALS, identity, _SHARE_DECIMALS),
                next_tier=next_tier,
                next_saved=next_saved,
            )
        )
    return tuple(sorted(found, key=lambda one: (tier_order(one.tier), one.kind or "", one.tokens_max or 2**63)))
