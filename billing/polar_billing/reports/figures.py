"""The figures of a report: what some requests used and owe, and what they would have owed otherwise.

Worked out from exact sums, rounded once per group. Knows no tenant and no output format.

What a report shows beside the charges: the same usage under other price books, and statements already issued.

Other books are applied request by request, as receipts are; what plans add over a period is `statements.repricing`'s.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from polar_billing.prices.rating import COMPUTE
from polar_billing.reports.totals import Rater, UsageTotals, accumulate
from polar_billing.values.money import EXACT_SCALE, divide_half_even, exact_sum, from_scaled, round_half_even

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection
    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.statement import Statement
    from polar_billing.values.periods import Period

_SHARE_DECIMALS: Final = 6


class Figures(BaseModel):
    """What a group of requests used, owes, and would have owed otherwise. Amounts: the report's currency."""

    model_config = ConfigDict(frozen=True)

    requests: int
    outcomes: dict[str, int]
    tokens_input: int
    tokens_cached: int
    """Included in `tokens_input`."""
    tokens_output: int
    compute_units: Decimal
    """Executed, the router included. Unit: CU."""
    compute_units_full_depth: Decimal
    """The same tokens through every layer once, without a router. Unit: CU."""
    compute_units_saved: Decimal
    """Full depth less executed; negative where loops or the router cost more. Unit: CU."""
    saved_share: Decimal | None
    """Saved of full depth, from 1 down; None where nothing would have been executed."""
    router_share: Decimal | None
    """The router's part of the executed compute units."""
    charge: Decimal | None
    """The sum of the statement lines; None where no request has a price."""
    charge_full_depth: Decimal | None
    """The same requests at full depth under the same prices."""
    charge_per_token: Decimal | None
    """The same tokens under the price book's per-token reference; None where it has none for some of them."""
    price_per_1000_requests: Decimal | None
    """Charge per 1,000 rated requests."""
    price_per_million_tokens: Decimal | None
    """Charge per 10^6 input and output tokens of rated requests."""
    latency_ns_p50: int | None
    """Queue, prefill and decode of completed requests, nearest rank. Unit: nanoseconds."""
    latency_ns_p95: int | None
    latency_ns_p99: int | None
    unrated: dict[str, int]
    """Reason → requests without a price; they are in no amount."""


def figures_of(groups: Iterable[UsageTotals], decimals: int, charge: Decimal | None) -> Figures:
    """Work the figures of several groups together out.

    Args:
        groups: The sums.
        decimals: Decimals of amounts.
        charge: The sum of their statement lines; it was rounded line by line, so it cannot be worked out here.
    """
    parts = list(groups)

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    flops, identity, rated = total("flops"), total("identity_flops"), total("rated")
    outcomes: Counter[str] = sum((part.outcomes for part in parts), Counter())
    unrated: Counter[str] = sum((part.unrated for part in parts), Counter())
    latencies = sorted(latency for part in parts for latency in part.latencies_ns)
    comparable = rated and not total("without_reference")
    return Figures(
        requests=total("requests"),
        outcomes=dict(sorted(outcomes.items())),
        tokens_input=total("tokens_input"),
        tokens_cached=total("tokens_cached"),
        tokens_output=total("tokens_output"),
        compute_units=COMPUTE.quantity(flops),
        compute_units_full_depth=COMPUTE.quantity(identity),
        compute_units_saved=COMPUTE.quantity(identity - flops),
        saved_share=_share(identity - flops, identity),
        router_share=_share(total("flops_router"), flops),
        charge=charge if rated else None,
        charge_full_depth=_summed((part.full_depth_exact for part in parts), decimals) if rated else None,
        charge_per_token=_summed((part.per_token_exact for part in parts), decimals) if comparable else None,
        price_per_1000_requests=_money(total("exact") * 1_000, decimals, per=rated),
        price_per_million_tokens=_money(total("exact") * 1_000_000, decimals, per=total("rated_tokens")),
        latency_ns_p50=_percentile(latencies, 50),
        latency_ns_p95=_percentile(latencies, 95),
        latency_ns_p99=_percentile(latencies, 99),
        unrated=dict(sorted(unrated.items())),
    )


def _money(exact: int, decimals: int, *, per: int = 1) -> Decimal | None:
    if per == 0:
        return None
    return from_scaled(divide_half_even(exact, per * int(10 ** (EXACT_SCALE - decimals))), decimals)


def _summed(exact: Iterable[int], decimals: int) -> Decimal:
    """Each group rounded once, then added: as charges are, so that what cost the same is shown as the same."""
    step = int(10 ** (EXACT_SCALE - decimals))
    return from_scaled(sum(divide_half_even(one, step) for one in exact), decimals)


def _share(part: int, whole: int) -> Decimal | None:
    if whole == 0:
        return None
    return from_scaled(divide_half_even(part * int(10**_SHARE_DECIMALS), whole), _SHARE_DECIMALS)


def _percentile(ordered: list[int], percent: int) -> int | None:
    """Nearest rank: the smallest value that so many percent do not exceed; always one that occurred."""
    if not ordered:
        return None
    return ordered[-(-len(ordered) * percent // 100) - 1]


class OtherCharge(BaseModel):
    """The same usage under one other price book."""

    model_config = ConfigDict(frozen=True)

    price_book: str
    content_hash: str
    currency: str
    charge: Decimal | None
    """None where the book has a price for none of it. Unit: `currency`."""
    unrated: int
    """Requests that the book has no price for; they are not in the charge."""


def charges_under(
    ledger: Ledger, selection: Selection, books: Sequence[PriceBook]
) -> dict[str, tuple[OtherCharge, ...]]:
    """What each tenant's usage comes to under each book, in the order of the books."""
    found: dict[str, list[OtherCharge]] = {}
    for book in books:
        rater = Rater({}, instead=book)
        groups = accumulate(ledger.read(selection), rater, lambda stored: stored.record.tenant)
        for tenant, totals in groups.items():
            found.setdefault(tenant, []).append(_charge(book, totals))
    return {tenant: tuple(charges) for tenant, charges in found.items()}


def _charge(book: PriceBook, totals: UsageTotals) -> OtherCharge:
    decimals = book.statement_decimals
    charge = from_scaled(round_half_even(totals.exact, EXACT_SCALE, decimals), decimals)
    return OtherCharge(
        price_book=book.id,
        content_hash=book.content_hash,
        currency=book.currency,
        charge=charge if totals.rated else None,
        unrated=totals.unrated.total(),
    )


def summed(charges: Iterable[tuple[OtherCharge, ...]]) -> tuple[OtherCharge, ...]:
    """Every tenant together, by book."""
    return tuple(_sum(members) for members in zip(*charges, strict=True))


def _sum(members: tuple[OtherCharge, ...]) -> OtherCharge:
    amounts = [one.charge for one in members if one.charge is not None]
    decimals = max((-int(amount.as_tuple().exponent) for amount in amounts), default=0)
    charge = exact_sum(amounts, decimals) if amounts else None
    return members[0].model_copy(update={"charge": charge, "unrated": sum(one.unrated for one in members)})


def issued_within(ledger: Ledger, tenants: Iterable[str], period: Period) -> dict[str, tuple[Statement, ...]]:
    """The statements of tenants whose periods lie within a period, in the order they were issued."""
    from polar_billing.statements.issue import issued_statements

    return {
        tenant: tuple(one.statement for one in issued_statements(ledger, tenant) if _lies_in(one.statement, period))
        for tenant in tenants
    }


def _lies_in(statement: Statement, period: Period) -> bool:
    begins = period.since is None or statement.since >= period.since
    return begins and (period.until is None or statement.until <= period.until)
