"""The figures of a report: what some requests used and owe, and what they would have owed otherwise.

Worked out from exact sums, rounded once per group. Knows no tenant and no output format.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeVar

from pydantic import BaseModel, ConfigDict

from polar_billing.prices.rating import COMPUTE
from polar_billing.values.money import EXACT_SCALE, divide_half_even, from_scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_billing.reports.totals import UsageTotals

_SHARE_DECIMALS: Final = 6
_Number = TypeVar("_Number", int, float)


class Figures(BaseModel):
    """What a group of requests used, owes, and would have owed otherwise. Amounts: the report's currency."""

    model_config = ConfigDict(frozen=True)

    requests: int
    outcomes: dict[str, int]
    tokens_input: int
    tokens_cached: int
    """Included in `tokens_input`."""
    tokens_output: int
    tokens_drafted: int
    tokens_accepted: int
    """Included in `tokens_drafted`."""
    compute_units: Decimal
    """What the answers needed, the router included. Unit: CU."""
    compute_units_prompt: Decimal
    """Of them, the layers over the prompts."""
    compute_units_answer: Decimal
    """Of them, the decode steps and the head; with prompt and router, the whole."""
    compute_units_router: Decimal
    compute_units_drafts: Decimal
    """Executed for drafted tokens that the answers did not keep; not included in `compute_units`. Unit: CU."""
    compute_units_full_depth: Decimal
    """The same tokens through every layer once, without a router. Unit: CU."""
    compute_units_saved: Decimal
    """Full depth less `compute_units`; negative where loops or the router cost more. Unit: CU."""
    saved_share: Decimal | None
    """Saved compute as a share of full depth, at most 1; None where nothing would have been executed."""
    router_share: Decimal | None
    """The router's part of the executed compute units."""
    charge: Decimal | None
    """The sum of the lines; None where no request has a price."""
    charge_full_depth: Decimal | None
    """The same requests at full depth under the same prices."""
    charge_per_token: Decimal | None
    """The same tokens under the price book's per-token reference; None where some of them have no reference."""
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
    """Work out the figures of several groups together.

    Args:
        groups: The sums.
        decimals: Decimals of amounts.
        charge: The sum of their lines; those are rounded one by one, so it cannot be worked out here.
    """
    parts = list(groups)

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    flops, identity, rated = total("flops"), total("identity_flops"), total("rated")
    outcomes: Counter[str] = sum((part.outcomes for part in parts), Counter())
    unrated: Counter[str] = sum((part.unrated for part in parts), Counter())
    latencies = sorted(chain.from_iterable(part.latencies_ns for part in parts))
    comparable = rated and not total("without_reference")
    return Figures(
        requests=total("requests"),
        outcomes=dict(sorted(outcomes.items())),
        tokens_input=total("tokens_input"),
        tokens_cached=total("tokens_cached"),
        tokens_output=total("tokens_output"),
        tokens_drafted=total("tokens_drafted"),
        tokens_accepted=total("tokens_accepted"),
        compute_units=COMPUTE.quantity(flops),
        compute_units_prompt=COMPUTE.quantity(flops - total("flops_answer") - total("flops_router")),
        compute_units_answer=COMPUTE.quantity(total("flops_answer")),
        compute_units_router=COMPUTE.quantity(total("flops_router")),
        compute_units_drafts=COMPUTE.quantity(total("flops_drafts")),
        compute_units_full_depth=COMPUTE.quantity(identity),
        compute_units_saved=COMPUTE.quantity(identity - flops),
        saved_share=_share(identity - flops, identity),
        router_share=_share(total("flops_router"), flops),
        charge=charge if rated else None,
        charge_full_depth=_summed((part.full_depth_exact for part in parts), decimals) if rated else None,
        charge_per_token=_summed((part.per_token_exact for part in parts), decimals) if comparable else None,
        price_per_1000_requests=_money(total("exact") * 1_000, decimals, per=rated),
        price_per_million_tokens=_money(total("exact") * 1_000_000, decimals, per=total("rated_tokens")),
        latency_ns_p50=percentile(latencies, 50),
        latency_ns_p95=percentile(latencies, 95),
        latency_ns_p99=percentile(latencies, 99),
        unrated=dict(sorted(unrated.items())),
    )


def _money(exact: int, decimals: int, *, per: int = 1) -> Decimal | None:
    if per == 0:
        return None
    return from_scaled(divide_half_even(exact, per * int(10 ** (EXACT_SCALE - decimals))), decimals)


def _summed(exact: Iterable[int], decimals: int) -> Decimal:
    """Each group rounded once, then added, as charges are, so that equal costs are shown as equal."""
    step = int(10 ** (EXACT_SCALE - decimals))
    return from_scaled(sum(divide_half_even(amount, step) for amount in exact), decimals)


def _share(part: int, whole: int) -> Decimal | None:
    if whole == 0:
        return None
    return from_scaled(divide_half_even(part * int(10**_SHARE_DECIMALS), whole), _SHARE_DECIMALS)


def percentile(ordered: Sequence[_Number], percent: int) -> _Number | None:
    """The nearest-rank percentile, which is always one of the values."""
    if not ordered:
        return None
    return ordered[-(-len(ordered) * percent // 100) - 1]
