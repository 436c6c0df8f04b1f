"""The models on offer: one id per model and tier, and the promise of each.

`NAME` is the model with its default tier, `NAME:economy` and the like name one. Knows a policy and a router, no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from polar_sdk.programs.program import Program
from polar_sdk.router.learned import AtSetting, LearnedRouter
from polar_sdk.usage import Offer
from polar_server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk import PolarModel


@dataclass(frozen=True)
class Catalog:
    """The models of one engine.

    Attributes:
        engine: What answers.
        names: Its ids without a tier.
        elsewhere: The programs of tiers that other servers compute.
    """

    engine: PolarModel
    names: tuple[str, ...]
    elsewhere: Mapping[str, Program] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(datetime.now(UTC).timestamp()))

    @property
    def name(self) -> str:
        """The first of its ids."""
        return self.names[0]

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that a request may name: the engine's, and those that other servers compute."""
        return tuple(dict.fromkeys([*self.engine.tiers, *self.elsewhere]))

    def ids(self) -> list[str]:
        """Every id that a request may name."""
        return [each for name in self.names for each in (name, *(f"{name}:{tier}" for tier in self.tiers))]

    def tier_of(self, model: str) -> str | None:
        """The tier that an id names, or None.

        Raises:
            ApiError: There is no such model: 404.
        """
        if model in self.names:
            return None
        base, _, tier = model.rpartition(":")
        if base in self.names and tier in self.tiers:
            return tier
        raise self.missing(model)

    def missing(self, model: str) -> ApiError:
        """The refusal of an id that does not exist, or not for this caller."""
        return ApiError(
            f"the model {model[:100]!r} does not exist; GET /v1/models lists what does.",
            status=404,
            code="model_not_found",
            param="model",
        )

    @property
    def default_tier(self) -> str | None:
        """The tier of a request that names none, where there is one."""
        tier: str | None = self._offer(None)["tier"]
        return tier

    def may_name(self, model: str, models: Sequence[str], tiers: Sequence[str]) -> bool:
        """Whether a caller that is bound to some models or tiers may name an id; empty = any."""
        tier = self.tier_of(model)
        base = model if tier is None else model.rpartition(":")[0]
        may_model = not models or model in models or base in models
        return may_model and (not tiers or (tier or self.default_tier) in tiers)

    def entry(self, model: str) -> dict[str, Any]:
        """One model, as `GET /v1/models/ID` shows it.

        Raises:
            ApiError: There is no such model: 404.
        """
        return {
            "id": model,
            "object": "model",
            "created": self.created,
            "owned_by": "polar",
            "polar": self._offer(self.tier_of(model)),
        }

    def offer(self, tier: str, read: int, written: int) -> Offer:
        """The most that a tier uses for numbers of tokens; without a program where a router chooses one.

        Raises:
            RouterError: The tier's promise does not hold for what would run.
        """
        engine, cost = self.engine, self.engine.decoder.cost
        named: str | None = tier
        if tier in self.elsewhere:
            program = self.elsewhere[tier]
        elif isinstance(engine.router, LearnedRouter):
            served = engine.router.serving(tier)
            named = served.tier
            if isinstance(served.router, AtSetting):
                router = engine.router
                most = max(
                    cost.request(program, read, written, router=router.network.flops).total
                    for program in router.programs
                )
                return Offer(tier=named, program="", flops_bound=most)
            program = Program.identity(engine.depth)
        else:
            named, program = engine.policy.program_for(tier, engine.depth)
        return Offer(tier=named, program=program.text, flops_bound=cost.request(program, read, written).total)

    def _offer(self, tier: str | None) -> dict[str, Any]:
        engine = self.engine
        offer: dict[str, Any] = {"tier": tier, "program": None, "certified": False, "promise": None}
        learned = engine.router if isinstance(engine.router, LearnedRouter) else None
        name = tier or ("" if learned is None else learned.facts.default_tier)
        if name in self.elsewhere:
            offer |= {"tier": name, "program": self.elsewhere[name].text}
        elif learned is not None:
            certificate = learned.certificate if learned.certified else None
            promise = None if certificate is None else certificate.tiers.get(name)
            offer |= {"tier": name, "certified": promise is not None, "promise": promise and promise.text}
        elif tier is not None or engine.router is None:
            named, program = engine.policy.program_for(tier, engine.depth)
            offer |= {"tier": named, "program": program.text}
        return {**offer, "context_window": engine.context_window}
