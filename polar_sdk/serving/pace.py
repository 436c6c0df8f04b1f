"""Pace: how much work the rows of tenants that ask for much may add to each token of the others.

Rows that decode together share a pass, which takes the longer the more they are. So that a tenant with many rows does
not slow one with few down to a fraction of its speed, each tenant has a balance. In every round it earns what the
others that decode need for one token, `pace` times, and pays for what it executes; while it owes, it sits rounds out.
Who decodes alone earns without limit. Pure: tenants and FLOPs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

PROMPT_DISCOUNT: Final = 3
"""A FLOP of a prompt counts this many times less than one of decoding, which takes that much longer."""
_BURST_TOKENS: Final = 768
"""What a tenant may run ahead, in tokens decoded: a prompt of 2,304 tokens, or 24 passes of 32 rows."""


class Pace:
    """Balances of the tenants whose rows run. Unit: FLOPs of decoding, divided by the tenant's weight.

    Args:
        token: FLOPs of decoding one token at full depth.
    """

    def __init__(self, token: int) -> None:
        self._burst = float(_BURST_TOKENS * token)
        self._balances: dict[str, float] = {}

    def begin(self, tenants: Mapping[str, float], pace: float) -> None:
        """A round begins.

        Args:
            tenants: Those with rows that can go on, and what their rows that decode need for one token each, divided by
                the tenant's weight; 0 if they only have prompts.
            pace: What the others may add to a token, in such tokens, all together.
        """
        balances: dict[str, float] = {}
        for tenant in tenants:
            others = [need for other, need in tenants.items() if other != tenant and need]
            if others:
                earned = min(others) * max(1.0, pace / (len(tenants) - 1))
                balances[tenant] = min(self._balances.get(tenant, self._burst) + earned, self._burst)
            else:
                balances[tenant] = self._burst
        self._balances = balances

    def may_run(self, tenant: str) -> bool:
        """Whether a tenant owes nothing."""
        return self._balances.get(tenant, self._burst) > 0

    def pay(self, tenant: str, work: float) -> None:
        """Count what was executed for a tenant, divided by its weight; of prompts, divided by `PROMPT_DISCOUNT`."""
        if tenant in self._balances:
            self._balances[tenant] -= work
