"""Promises of tiers: the service credits for those that were missed, and the evaluation that agreement is taken from.

A promise is about latency, which the ledger knows, or about agreement with full depth, which it does not: that comes
from the file that `polar evaluate --json` writes, which serves every prompt of its set at full depth and by the router.
Knows no database.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, TypeVar

from polar_billing.errors import QueryError
from polar_billing.prices.rating import ITEMS
from polar_billing.statements.bands import pool_weights
from polar_billing.statements.lines import Agreement, ExactLine
from polar_billing.values.money import divide_half_even, from_scaled, plain, to_scaled
from polar_sdk.reading import parse_object, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from polar_billing.prices.plans import Promise, Terms
    from polar_billing.statements.bands import Rated
    from polar_billing.statements.lines import PeriodUsage, Phase

_PERCENT: Final = 100 * 10**6
"""The whole, in the units of a percentage with 6 decimals."""
_TIER: Final = re.compile(r"router \((.+)\)")
Figure = TypeVar("Figure")


def service_credits(
    phase: Phase, terms: Terms, used: Sequence[ExactLine], rated: Sequence[Rated], usage: PeriodUsage
) -> Iterator[ExactLine]:
    """One line for each tier that missed its promise in a phase, off its usage lines before the discount."""
    for tier, promise in sorted(terms.promises.items()):
        reasons = missed(promise, usage.latency_ns_p95.get((phase.since, tier)), usage.agreement.get(tier))
        base = _share_of(tier, terms, used, rated)
        if not reasons or not base:
            continue
        kept = _PERCENT - to_scaled(terms.discount_percent or 0, 6)
        part = divide_half_even(base * kept * to_scaled(promise.credit_percent, 6), _PERCENT**2)
        yield ExactLine(
            kind="service credit",
            item=f"service credit {plain(promise.credit_percent)} %",
            exact=-part,
            since=phase.since,
            until=phase.until,
            tier=tier,
            note="; ".join(reasons),
        )


def missed(promise: Promise, latency_ns: int | None, agreement: Agreement | None) -> list[str]:
    """Reasons that a promise was missed, empty where it was kept; what was not measured was not missed."""
    reasons = []
    # The reasons become notes of statement lines: their wording is part of issued statements.
    latency_max = promise.latency_ms_p95_max
    if latency_max is not None and latency_ns is not None and latency_ns > latency_max * 10**6:
        reasons.append(f"p95 latency {latency_ns / 10**6:.1f} ms, promised {latency_max} ms")
    if promise.agreement_min is not None and agreement is not None:
        agreement_min = to_scaled(promise.agreement_min, 6)
        if agreement.agreed * 10**6 < agreement_min * agreement.compared:  # not where nothing was compared
            counts = f"{agreement.agreed} of {agreement.compared} answers agreed"
            reasons.append(f"{counts}, promised {plain(from_scaled(agreement_min, 4))} %")
    return reasons


def _share_of(tier: str, terms: Terms, used: Sequence[ExactLine], rated: Sequence[Rated]) -> int:
    """A tier's part of the usage lines; of pooled lines, in proportion to its weighted quantity."""
    own = sum(line.exact for line in used if line.kind == "usage" and line.tier == tier)
    for item in terms.items:
        if item.pool:
            name = ITEMS[item.per].name
            pooled = sum(line.exact for line in used if line.kind == "pool" and line.item.startswith(f"{name} ("))
            weights = pool_weights(item, rated)
            if weights.total():
                own += divide_half_even(pooled * weights[tier], weights.total())
    return own


def evaluated_agreement(file: Path) -> dict[str, Agreement]:
    """Read an evaluation: tier → agreement over all of its prompts."""

    def agreement(_: str, prompts: int, system: dict[str, Any]) -> Agreement:
        return Agreement(round(system["agreement"][0] * prompts), prompts)

    return evaluated_tiers(file, agreement)


def evaluated_tiers(file: Path, read: Callable[[str, int, dict[str, Any]], Figure]) -> dict[str, Figure]:
    """Read one figure of each tier from the output of `polar evaluate --json`.

    `read` takes the tier, the number of prompts and what was measured.

    Raises:
        QueryError: The file cannot be read, or is not an evaluation.
    """
    try:
        whole = parse_object(read_bytes(file))["sets"][0]
        prompts = int(whole["prompts"])
        routed = (
            (_TIER.fullmatch(system["name"]), system) for system in whole["systems"] if system["role"] == "router"
        )
        return {match[1]: read(match[1], prompts, system) for match, system in routed if match}
    except OSError as error:
        raise QueryError(f"{str(file)!r} cannot be read ({error.strerror}).", hint="Check its path.") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise QueryError(
            f"{str(file)!r} is not an evaluation ({type(error).__name__}: {error}).",
            hint="Write one with `polar evaluate --data FILE --json > evaluation.json`.",
        ) from error
