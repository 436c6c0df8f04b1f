"""The usage query: who used what, grouped by tenant, tier, model, day, tag and more.

A query names its tenant, or `ALL_TENANTS` for the operator's view. Knows no output format.
"""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from polar_billing.errors import QueryError
from polar_billing.ledger.rollups import SUM_DIMENSIONS, sum_of
from polar_billing.metering.spool import recover_abandoned
from polar_billing.prices.entries import tier_order
from polar_billing.prices.rating import COMPUTE
from polar_billing.reports import Part
from polar_billing.reports.totals import Rater, UsageSums, accumulate, only_currency
from polar_billing.values.canonical import EPOCH
from polar_billing.values.money import EXACT_SCALE, STORED_SCALE, from_scaled, round_half_even

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection, StoredUsage
    from polar_billing.ledger.rollups import Sum
    from polar_billing.prices.book import PriceBook


DIMENSIONS: Final = ("tenant", "tier", "model", "program", "router", "outcome", "device", "day", "month", "source")
_COUNTED: Final = ("requests", "tokens_input", "tokens_cached", "tokens_output", "visits", "flops")
"""Fields of a row that are fields of `UsageSums`."""
_TAG: Final = "tag:"
_QUARTER: Final = timedelta(minutes=15)
_QUARTER_US: Final = 900_000_000

Group = tuple[str | None, ...]
"""The values of the dimensions that usage is grouped by."""


class UsageRow(Part):
    """The usage of one group."""

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
    """Compared with full depth; negative where more was executed. Unit: CU."""
    cost: Decimal | None
    """Cost of the rated requests, 12 decimals: the sum of their receipts or, under another price book, their exact
    cost, rounded once. None if none is rated. Unit: `currency`."""
    currency: str | None
    unrated: dict[str, int]
    """Reason → requests without a price."""


def usage_rows(
    ledger: Ledger,
    selection: Selection,
    *,
    by: Sequence[str] = ("tenant", "tier"),
    prices: PriceBook | None = None,
    currency: str | None = None,
    rollups: bool = True,
) -> list[UsageRow]:
    """Sum usage by group, what ended processes left in the spool included.

    Args:
        ledger: Where the usage is.
        selection: Which usage; names its tenant or `ALL_TENANTS`.
        by: Dimensions to group by: tenant, tier, model, program, router, outcome, device, day, month,
            source, tag:KEY.
        prices: Rate by this book instead of the one each receipt was made by.
        currency: Leave out what is rated in another currency.
        rollups: False to add up usage itself even where sums by hour would do; the rows are the same.

    Returns:
        One row per group, sorted by it; no row where there was no usage.

    Raises:
        QueryError: An unknown dimension.
        CurrencyMixError: The usage is rated in several currencies and none was chosen.
        StoreError: The ledger cannot be read.
    """
    readers = [_reader(dimension, selection) for dimension in by]
    recover_abandoned(ledger)
    if prices is None:
        return _rows_of_receipts(ledger, selection, by, currency, rollups)
    rater = Rater(ledger.price_books, instead=prices, currency=currency)
    groups = accumulate(ledger.read(selection), rater, lambda stored: tuple(read(stored) for read in readers))
    costs = {group: round_half_even(sums.exact, EXACT_SCALE, STORED_SCALE) for group, sums in groups.items()}
    return _rows(by, groups, costs, rater.currency)


def _rows_of_receipts(
    ledger: Ledger, selection: Selection, by: Sequence[str], currency: str | None, rollups: bool
) -> list[UsageRow]:
    """Rows whose cost is what the receipts say."""
    sums = list(_sums(ledger, selection, by, rollups))  # first: a record stored meanwhile may bring in its book
    currencies = {digest: book.currency for digest, book in ledger.price_books().items()}
    charged_in: set[str] = set()
    groups: dict[Group, UsageSums] = {}
    for group, usage in sums:
        book_currency = currencies[usage.price_book_hash]
        if currency is None or book_currency == currency:
            charged_in.add(book_currency)
            groups.setdefault(group, UsageSums()).add_sum(usage, usage.unrated)
    return _rows(by, groups, {group: sums.receipts for group, sums in groups.items()}, only_currency(charged_in))


def _sums(ledger: Ledger, selection: Selection, by: Sequence[str], rollups: bool) -> Iterator[tuple[Group, Sum]]:
    if not SUM_DIMENSIONS.issuperset(by) or selection.tags:
        readers = [_reader(dimension, selection) for dimension in by]
        for stored in ledger.read(selection):
            yield tuple(read(stored) for read in readers), sum_of(stored)
        return
    hourly = "day" in by or "month" in by

    @lru_cache(maxsize=100_000)
    def date_of(quarter: int) -> str:
        """The day in the period's zone: the same throughout a quarter of an hour."""
        return selection.period.local_date(EPOCH + quarter * _QUARTER).isoformat()

    for usage in ledger.usage_sums(selection, hourly=hourly, rollups=rollups):
        date = date_of(usage.at // _QUARTER_US) if hourly else ""
        special = {"day": date, "month": date[:-3]}
        yield tuple(special[name] if name in special else getattr(usage, name) for name in by), usage


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


def _rows(
    by: Sequence[str], groups: Mapping[Group, UsageSums], costs: Mapping[Group, int], currency: str | None
) -> list[UsageRow]:
    """The rows of groups, in order; costs are in units of 10^-12."""

    def rank(group: Group) -> list[tuple[int, str]]:
        pairs = zip(by, group, strict=True)
        return [tier_order(value) if name == "tier" else (value is None, value or "") for name, value in pairs]

    return [
        UsageRow(
            group=dict(zip(by, group, strict=True)),
            **{name: getattr(sums, name) for name in _COUNTED},
            outcomes=dict(sorted(sums.outcomes.items())),
            compute_units=COMPUTE.quantity(sums.flops),
            compute_units_saved=COMPUTE.quantity(sums.identity_flops - sums.flops),
            cost=from_scaled(costs[group], STORED_SCALE) if sums.rated else None,
            currency=currency,
            unrated=dict(sorted(sums.unrated.items())),
        )
        for group in sorted(groups, key=rank)
        for sums in [groups[group]]
    ]
