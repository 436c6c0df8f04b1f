"""The order tiers are listed in. Knows no price."""

from __future__ import annotations

from typing import Final

_TIERS: Final = ("economy", "standard", "premium", "exact")


def tier_order(tier: str | None) -> tuple[int, str]:
    """Sort key of a tier: from the cheapest of the usual ones up, others by name, none last."""
    if tier is None:
        return (len(_TIERS) + 1, "")
    return (_TIERS.index(tier), "") if tier in _TIERS else (len(_TIERS), tier)
