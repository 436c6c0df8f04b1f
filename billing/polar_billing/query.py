"""The usage query: who used what, grouped by tenant, tier, model, day, tag and more.

A query names its tenant, or says `ALL_TENANTS` to be the operator's. Knows no output format.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from polar_billing.errors import QueryError
from polar_billing.money import EXACT_SCALE, STORED_SCALE, from_scaled, round_half_even
from polar_billing.rating import COMPUTE
from polar_billing.totals import Rater, UsageTotals, accumulate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polar_billing.price_book import PriceBook
    from polar_billing.storage import LedgerStorage, Selection, StoredUsage

__all__ = ["DIMENSIONS", "UsageRow", "tier_order", "usage_rows"]

DIMENSIONS: Final = (
    "tenant",
    "tier",
    "model",
    "program",
    "router",
    "outcome",
    "device",
    "day",
    "month",
    "source",
)
_TAG: Final = "tag:"
_TIERS: Final = ("economy", "standard", "premium", "exact")


class UsageRow(BaseModel):
    """The usage of one group."""

    model_config = ConfigDict(frozen=True)

    group: dict[str, str | None]
    """Dimension → value; None for requests without one: a program named by hand has no tier."""
    requests: int
    outcomes: dict[str, int]
    tokens_input: int
    tokens_cached: int
    """Included in `tokens_input`."""
    tokens_output: int
    visits: int
    """Executed layer visits."""
    flops: int
    compute_units: Decimal
    """Executed. Unit: CU."""
    compute_units_saved: Decimal
    """Against full depth; negative where more was executed. Unit: CU."""
    cost: Decimal | None
    """Of the rated requests, 12 decimals; None where none is. Unit: `currency`."""
    currency: str | None
    unrated: dict[str, int]
    """Reason → requests without a price."""


def usage_rows(
    ledger: LedgerStorage,
    selection: Selection,
    *,
    by: Sequence[str] = ("tenant", "tier"),
    prices: PriceBook | None = None,
    currency: str | None = None,
) -> list[UsageRow]:
    """Sum usage up by group.

    Args:
        ledger: Where the usage is.
        selection: Which usage; names its tenant or `ALL_TENANTS`.
        by: Dimensions of the group: tenant, tier, model, program, router, outcome, device, day, month,
            source, tag:KEY.
        prices: Rate by this book instead of the one each receipt was made by.
        currency: Leave out what is rated in another currency.

    Returns:
        One row per group, sorted by it; no row where there was no usage.

    Raises:
        QueryError: An unknown dimension.
        CurrencyMixError: The usage is rated in several currencies and none was chosen.
        StoreError: The ledger cannot be read.
    """
    readers = [_reader(dimension, selection) for dimension in by]
    rater = Rater(ledger.price_books(), instead=prices, currency=currency)
    groups = accumulate(ledger.read(selection), rater, lambda stored: tuple(read(stored) for read in readers))
    ordered = sorted(groups, key=lambda group: [_sort_key(name, value) for name, value in zip(by, group, strict=True)])
    return [_row(dict(zip(by, group, strict=True)), groups[group], rater.currency) for group in ordered]


def _reader(dimension: str, selection: Selection) -> Callable[[StoredUsage], str | None]:
    if dimension.startswith(_TAG) and dimension != _TAG:
        tag = dimension.removeprefix(_TAG)
        return lambda stored: stored.record.tags.get(tag)
    if dimension not in DIMENSIONS:
        raise QueryError(f"usage cannot be grouped by {dimension!r}.", hint=f"Use {', '.join(DIMENSIONS)} or tag:KEY.")
    local_date = selection.period.local_date
    if dimension == "day":
        return lambda stored: local_date(stored.record.started_at).isoformat()
    if dimension == "month":
        return lambda stored: f"{local_date(stored.record.started_at):%Y-%m}"
    if dimension == "source":
        return lambda stored: stored.source
    return lambda stored: None if (value := getattr(stored.record, dimension)) is None else str(value)


def _sort_key(dimension: str, value: str | None) -> tuple[int, str]:
    if dimension == "tier":
        return tier_order(value)
    return (0, value) if value is not None else (1, "")


def tier_order(tier: str | None) -> tuple[int, str]:
    """Sort key of a tier: from the cheapest of the usual ones up, others by name, none last."""
    if tier is None:
        return (len(_TIERS) + 1, "")
    return (_TIERS.index(tier), "") if tier in _TIERS else (len(_TIERS), tier)


def _row(group: dict[str, str | None], totals: UsageTotals, currency: str | None) -> UsageRow:
    cost = from_scaled(round_half_even(totals.exact, EXACT_SCALE, STORED_SCALE), STORED_SCALE)
    return UsageRow(
        group=group,
        requests=totals.requests,
        outcomes=dict(sorted(totals.outcomes.items())),
        tokens_input=totals.tokens_input,
        tokens_cached=totals.tokens_cached,
        tokens_output=totals.tokens_output,
        visits=sum(sum(visits.prefill) + sum(visits.decode) for visits in totals.visits.values()),
        flops=totals.flops,
        compute_units=COMPUTE.quantity(totals.flops),
        compute_units_saved=COMPUTE.quantity(totals.identity_flops - totals.flops),
        cost=cost if totals.rated else None,
        currency=currency,
        unrated=dict(sorted(totals.unrated.items())),
    )
