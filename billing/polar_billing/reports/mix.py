"""A mix of tiers, in percent of the requests, and what recorded usage would have cost under it.

A mix is distributed over each tenant's requests: tokens and requests stay as recorded, the compute of a tier is full
depth's minus the tier's measured savings, and each part is charged by the tier's multiplier. The savings are from an
evaluation of other prompts than those that were charged; the caller states which. Rounds each amount once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from polar_billing.errors import QueryError
from polar_billing.prices.entries import tier_order
from polar_billing.prices.rating import COMPUTE, Counts, charge_lines
from polar_billing.reports import Part
from polar_billing.values.money import EXACT_SCALE, divide_half_even, plain, quotient, to_scaled
from polar_sdk.reading import Unreadable, parse_decimal, parse_object, read_bytes, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from polar_billing.ledger.records import StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.entries import PriceEntry

EXACT: Final = "exact"
"""The tier that always runs full depth, so that nothing has to be measured of it."""
_WHOLE: Final = 100
_MAX_DECIMALS: Final = 2
_SHARE_DECIMALS: Final = 6
_PERCENT: Final = 100 * 10**_MAX_DECIMALS
"""A whole in hundredths of a percent."""
_TIER: Final = re.compile(r"router \((.+)\)")


class TierSaving(Part):
    """The measured saving of a tier."""

    tier: str
    saved: Decimal
    """Share of full depth's FLOPs, 6 decimals; negative where the tier costs more."""
    source: str
    """The place of the measurement, in words."""


class Mix(Part):
    """The share of the requests that takes each tier."""

    shares: dict[str, Decimal]
    """Tier → percent; they add up to 100. From the cheapest tier up."""

    @property
    def text(self) -> str:
        """The mix in words."""
        return ", ".join(f"{plain(share)} % {tier}" for tier, share in self.shares.items())


Savings = dict[str, TierSaving]
"""By tier."""


def read_mix(text: str) -> Mix:
    """Read a mix such as `standard=70,economy=30`.

    Raises:
        QueryError: It is not that; the percentages must add up to 100.
    """
    shares: dict[str, Decimal] = {}
    for part in text.split(","):
        tier, equals, percent = (word.strip() for word in part.partition("="))
        if not (tier and equals and percent):
            raise QueryError(f"mix {shown(text)} is not TIER=PERCENT,…", hint="Write it like standard=70,economy=30.")
        if tier in shares:
            raise QueryError(f"mix {shown(text)} has tier {shown(tier)} twice.", hint="Add the two.")
        shares[tier] = _percent(text, tier, percent)
    if (total := sum(shares.values(), Decimal(0))) != _WHOLE:
        raise QueryError(f"mix {shown(text)} adds up to {plain(total)} %, not to 100 %.", hint="Correct one of them.")
    return Mix(shares=dict(sorted(shares.items(), key=lambda item: tier_order(item[0]))))


def _percent(text: str, tier: str, percent: str) -> Decimal:
    try:
        share = parse_decimal(percent)
    except Unreadable as error:
        raise QueryError(f"mix {shown(text)}: {error}.", hint="Write it like standard=70,economy=30.") from error
    exponent = share.as_tuple().exponent
    if not (share.is_finite() and 0 < share <= _WHOLE and isinstance(exponent, int) and exponent >= -_MAX_DECIMALS):
        raise QueryError(
            f"mix {shown(text)} gives tier {shown(tier)} {shown(percent)} %; use more than 0 and at most 100, with at "
            f"most {_MAX_DECIMALS} decimals."
        )
    return share


def check_mixes(mixes: Sequence[Mix], models: set[str], find: Callable[[str], Savings | None]) -> Savings:
    """Look up what the tiers of some mixes save on the one model of the usage, given by fingerprint.

    Raises:
        QueryError: The usage is of several models with different measurements, or a tier was not measured.
    """
    found = {model: _savings(mixes, model, find) for model in sorted(models) or [""]}
    first, *others = found.values()
    if any(other != first for other in others):
        raise QueryError(
            f"this usage is of {len(found)} models, whose tiers save different shares.",
            hint="Name one measurement for all with --mix-from FILE.",
        )
    return first


def _savings(mixes: Sequence[Mix], model: str, find: Callable[[str], Savings | None]) -> Savings:
    exact = TierSaving(tier=EXACT, saved=Decimal(0), source="full depth by definition")
    measured = {EXACT: exact, **(find(model) or {})}
    for tier in (tier for mix in mixes for tier in mix.shares):
        if tier not in measured:
            raise QueryError(
                f"nothing was measured of tier {shown(tier)} for model {model[:12]}…; measured: "
                f"{', '.join(sorted(measured, key=tier_order))}.",
                hint="Name a measured tier, or the output of `polar evaluate --json` with --mix-from.",
            )
    return measured


def as_share(value: float) -> Decimal:
    """A measured share with 6 decimals."""
    return Decimal(f"{value:.{_SHARE_DECIMALS}f}")


def evaluated_savings(file: Path) -> Savings:
    """Read what tiers save from the file that `polar evaluate --json` writes; over all of its prompts.

    Raises:
        QueryError: The file cannot be read, or is not an evaluation.
    """
    try:
        whole = parse_object(read_bytes(file))["sets"][0]
        source = f"{int(whole['prompts']):,} prompts of {file.name}"
        routed = (
            (_TIER.fullmatch(system["name"]), float(system["flops_saved"]["total"]))
            for system in whole["systems"]
            if system["role"] == "router"
        )
        return {
            match[1]: TierSaving(tier=match[1], saved=as_share(saved), source=source)
            for match, saved in routed
            if match
        }
    except OSError as error:
        raise QueryError(f"{str(file)!r} cannot be read ({error.strerror}).", hint="Check its path.") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise QueryError(
            f"{str(file)!r} is not an evaluation ({type(error).__name__}: {error}).",
            hint="Write one with `polar evaluate --data FILE --json > evaluation.json`.",
        ) from error


@dataclass
class MixBasis:
    """Collects, for one choice of price books, what mixes are worked out from."""

    book: PriceBook | None
    """The book that rates every request; None for the one that the report rates it by."""
    entries: dict[tuple[str, int], tuple[PriceBook, PriceEntry]] = field(default_factory=dict)
    """By tenant and entry."""
    counts: dict[tuple[str, int], Counts] = field(default_factory=dict)
    """Charged usage by tenant and entry; `flops`: at full depth."""
    unrated: int = 0
    """Requests without a price."""
    models: set[str] = field(default_factory=set)
    """Fingerprints."""
    identity_flops: int = 0
    """All requests, free and unrated ones included."""

    def add(self, stored: StoredUsage, rated_by: PriceBook) -> None:
        """Take in one request, and the book that the report rates it by."""
        record, book = stored.record, self.book or rated_by
        if record.identity_flops:
            self.models.add(record.model_fingerprint)
        self.identity_flops += record.identity_flops
        entry = book.entry_at(record.started_at, record.tenant)
        if entry is None:
            self.unrated += 1
        elif record.outcome not in book.free_outcomes:
            key = (record.tenant, id(entry))  # which `entries` keeps alive
            self.entries[key] = (book, entry)
            used = Counts(1, record.identity_flops, record.tokens.input, record.tokens.output)
            self.counts[key] = self.counts.get(key, Counts()) + used

    def charges(self, mix: Mix, savings: Savings, decimals: int) -> dict[str, Decimal]:
        """Charge each tenant for its requests, dealt out to the tiers of a mix."""
        exact: defaultdict[str, int] = defaultdict(int)
        for key, (book, entry) in self.entries.items():
            exact[key[0]] += sum(_parts(mix, savings, book, entry, self.counts[key]))
        step = _PERCENT * int(10 ** (EXACT_SCALE - decimals))
        return {tenant: quotient(amount, step, decimals) for tenant, amount in exact.items()}

    def compute_units(self, mix: Mix, savings: Savings) -> Decimal:
        """The compute that a mix would have executed. Unit: CU."""
        flops = sum(
            _executed(self.identity_flops, savings[tier].saved) * to_scaled(share, _MAX_DECIMALS)
            for tier, share in mix.shares.items()
        )
        return COMPUTE.quantity(divide_half_even(flops, _PERCENT))


def _parts(mix: Mix, savings: Savings, book: PriceBook, entry: PriceEntry, counts: Counts) -> Iterator[int]:
    """The cost of each tier's part. Unit: 10^-30 of the currency, times hundredths of a percent."""
    for tier, share in mix.shares.items():
        multiplier = entry.multiplier(tier)
        if multiplier is None:
            raise QueryError(
                f"price book {book.id!r} of {entry.effective_from.date().isoformat()} has no price for tier {tier!r}.",
                hint=f"Use its tiers: {', '.join(entry.tiers) or 'none'}.",
            )
        executed = replace(counts, flops=_executed(counts.flops, savings[tier].saved))
        yield sum(line.exact for line in charge_lines(executed, entry, multiplier)) * to_scaled(share, _MAX_DECIMALS)


def _executed(identity: int, saved: Decimal) -> int:
    whole = 10**_SHARE_DECIMALS
    return divide_half_even(identity * (whole - to_scaled(saved, _SHARE_DECIMALS)), whole)
