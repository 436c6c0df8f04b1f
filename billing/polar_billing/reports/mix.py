"""A mix of tiers, in percent of the requests, and what each of its tiers was measured to save.

The savings come from an evaluation of other prompts than those that were charged; whoever hands them in says which.
Knows no usage and no prices.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from polar_billing.errors import QueryError
from polar_billing.prices.entries import tier_order
from polar_billing.values.money import plain
from polar_sdk.reading import Unreadable, parse_decimal, parse_object, read_bytes, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

EXACT: Final = "exact"
"""The tier that always runs full depth, so that nothing has to be measured of it."""
_WHOLE: Final = 100
_MAX_DECIMALS: Final = 2
SHARE_DECIMALS: Final = 6
_ROUTER: Final = re.compile(r"router \((.+)\)")


class TierSaving(BaseModel):
    """What a tier saves."""

    model_config = ConfigDict(frozen=True)

    tier: str
    saved: Decimal
    """Share of full depth's FLOPs, 6 decimals; negative where the tier costs more."""
    source: str
    """Where it was measured, in words."""


class Mix(BaseModel):
    """Which share of the requests takes which tier."""

    model_config = ConfigDict(frozen=True)

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


def savings_of(mixes: Iterable[Mix], model: str, find: Callable[[str], Savings | None]) -> Savings:
    """What the tiers of some mixes save on a model.

    Args:
        mixes: Which tiers.
        model: Fingerprint of the model.
        find: From a model's fingerprint to what was measured.

    Raises:
        QueryError: A tier was not measured.
    """
    found = find(model) or {}
    exact = TierSaving(tier=EXACT, saved=Decimal(0), source="full depth by definition")
    measured = {EXACT: exact, **found}
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
    return Decimal(f"{value:.{SHARE_DECIMALS}f}")


def evaluated_savings(file: Path) -> Savings:
    """What tiers save, from the file that `polar evaluate --json` writes; over all of its prompts.

    Raises:
        QueryError: The file cannot be read, or is not such a file.
    """
    try:
        whole = parse_object(read_bytes(file))["sets"][0]
        prompts = int(whole["prompts"])
        found = {}
        for system in whole["systems"]:
            if system["role"] == "router" and (match := _ROUTER.fullmatch(system["name"])):
                saved = as_share(float(system["flops_saved"]["total"]))
                source = f"{prompts:,} prompts of {file.name}"
                found[match[1]] = TierSaving(tier=match[1], saved=saved, source=source)
    except OSError as error:
        raise QueryError(f"{str(file)!r} cannot be read ({error.strerror}).", hint="Check its path.") from error
    except (ValueError, TypeError, LookupError, OverflowError, AttributeError, ArithmeticError) as error:
        raise QueryError(
            f"{str(file)!r} is not an evaluation ({type(error).__name__}: {error}).",
            hint="Write one with `polar evaluate --data FILE --json > evaluation.json`.",
        ) from error
    return found
