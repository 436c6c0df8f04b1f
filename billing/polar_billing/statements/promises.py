"""Service credits: what is given back where a tier's promised latency or agreement was missed. Pure.

How many answers of each tier agreed with full depth, from the file that `polar evaluate --json` wrote.

The evaluation serves every prompt of its set at full depth and by the router; that is what a promise of agreement is
settled by. Knows no usage.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import QueryError
from polar_billing.prices.rating import ITEMS
from polar_billing.statements.bands import pool_weights
from polar_billing.statements.lines import Agreement, ExactLine
from polar_billing.values.money import divide_half_even, from_scaled, plain, to_scaled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from polar_billing.prices.plans import Promise, Terms
    from polar_billing.statements.bands import Rated
    from polar_billing.statements.lines import Facts, Window

_PERCENT: Final = 100 * 10**6
"""The whole, in the units of a percentage with 6 decimals."""


def service_credits(
    window: Window, terms: Terms, usage: Sequence[ExactLine], rated: Sequence[Rated], facts: Facts
) -> Iterator[ExactLine]:
    """One line for each tier of a window that missed its promise.

    Args:
        window: Where.
        terms: Its terms.
        usage: Its usage lines, before the discount.
        rated: Its charged usage.
        facts: What was measured.
    """
    for tier, promise in sorted(terms.promises.items()):
        reasons = missed(promise, facts.latency_ns_p95.get((window.since, tier)), facts.agreement.get(tier))
        base = _share_of(tier, terms, usage, rated)
        if not reasons or not base:
            continue
        kept = _PERCENT - to_scaled(terms.discount_percent or 0, 6)
        part = divide_half_even(base * kept * to_scaled(promise.credit_percent, 6), _PERCENT**2)
        yield ExactLine(
            kind="service credit",
            item=f"service credit {plain(promise.credit_percent)} %",
            exact=-part,
            since=window.since,
            until=window.until,
            tier=tier,
            note="; ".join(reasons),
        )


def missed(promise: Promise, latency_ns: int | None, agreement: Agreement | None) -> list[str]:
    """Say what of a promise was missed; what was not measured was not missed."""
    reasons = []
    most = promise.latency_ms_p95_max
    if most is not None and latency_ns is not None and latency_ns > most * 10**6:
        reasons.append(f"p95 latency {latency_ns / 10**6:.1f} ms, promised {most} ms")
    least = promise.agreement_min
    if least is not None and agreement is not None:  # where nothing was compared, nothing was missed
        if agreement.agreed * 10**6 >= to_scaled(least, 6) * agreement.compared:
            return reasons
        told = f"{agreement.agreed} of {agreement.compared} answers agreed"
        reasons.append(f"{told}, promised {plain(from_scaled(to_scaled(least, 6), 4))} %")
    return reasons


def _share_of(tier: str, terms: Terms, usage: Sequence[ExactLine], rated: Sequence[Rated]) -> int:
    """A tier's part of the usage lines; of pooled ones by its part of the weighted quantity."""
    own = sum(line.exact for line in usage if line.kind == "usage" and line.tier == tier)
    for item in terms.items:
        if item.pool:
            name = ITEMS[item.per].name
            pooled = sum(line.exact for line in usage if line.kind == "pool" and line.item.startswith(f"{name} ("))
            weights = pool_weights(item, rated)
            if weights.total():
                own += divide_half_even(pooled * weights[tier], weights.total())
    return own


_TIER: Final = re.compile(r"router \((.+)\)")


def evaluated_agreement(file: Path) -> dict[str, Agreement]:
    """Tier → what was measured over all prompts of the evaluation.

    Raises:
        QueryError: The file cannot be read, or is none of `polar evaluate --json`.
    """
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))["sets"][0]
        found = dict(_tiers(whole))
    except OSError as error:
        raise QueryError(f"{str(file)!r} cannot be read ({error.strerror}).", hint="Check its path.") from error
    except (ValueError, TypeError, LookupError) as error:
        raise QueryError(
            f"{str(file)!r} holds no evaluation ({type(error).__name__}: {error}).",
            hint="Write one with `polar evaluate --data FILE --json > evaluation.json`.",
        ) from error
    return found


def _tiers(whole: dict[str, Any]) -> list[tuple[str, Agreement]]:
    compared = int(whole["prompts"])
    shares = {system["name"]: system["agreement"][0] for system in whole["systems"] if system["role"] == "router"}
    tiers = ((_TIER.fullmatch(name), share) for name, share in shares.items())
    return [(named[1], Agreement(round(share * compared), compared)) for named, share in tiers if named]
