"""Before compute: ask the sink whether each request may run, and serve the offer that it chooses.

A sink with budgets may refuse a request or take a cheaper program of the policy. Knows no money and no budget: it makes
offers (program, tier, max FLOPs) and obeys the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from polar_sdk.router.base import fixed_router
from polar_sdk.serving.drafts import most_wasted
from polar_sdk.usage import Offer, UsageBound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.program import Program
    from polar_sdk.serving.request import Request
    from polar_sdk.usage import UsageSink


DOWNGRADED_TAG: Final = "polar.downgraded_from"
"""Tag of the usage record of a request that was served cheaper than requested: the requested tier, or else program."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """A program that may serve a request. Unit of `flops`: FLOPs, at the longest answer, the router included."""

    tier: str | None
    program: Program
    flops: int
    drafts: int
    """FLOPs that drafts may execute beyond that."""


def admit(
    requests: Sequence[Request], cost: CostModel, sink: UsageSink, reserved: Callable[[Request], None]
) -> list[Request]:
    """Reserve for every request, or for none: where one is refused, the caller releases the others.

    Args:
        requests: What would run together.
        cost: FLOPs of programs on this model.
        sink: Who decides.
        reserved: Called with each request that the sink holds something for.

    Returns:
        The requests as they are to be served, in the same order.

    Raises:
        BudgetExceededError: A budget has no room for one of them.
        SinkError: The sink cannot decide.
    """
    admitted: list[Request] = []
    for request in requests:
        choices = _choices(request, cost)
        bound = _bound(request, choices)
        chosen = sink.reserve(bound)
        reserved(request)
        admitted.append(request if chosen == 0 else _served(request, choices[chosen], cost.depth))
    return admitted


def bound_of(request: Request, cost: CostModel) -> UsageBound:
    """The maximum that a request can use: as what it asks for, and as each tier of the policy that costs less."""
    return _bound(request, _choices(request, cost))


def _choices(request: Request, cost: CostModel) -> list[_Choice]:
    """The requested program, then every tier of the policy that costs less, the most expensive first."""

    def choice(tier: str | None, program: Program) -> _Choice:
        scored = request.prompt_logprobs is not None
        used = cost.request(
            program, len(request.tokens), request.max_tokens, router=request.router_flops, scored=scored
        )
        drafts = request.speculate != "off" and most_wasted(cost, program, len(request.tokens), request.max_tokens)
        return _Choice(tier, program, used.total, int(drafts))

    requested = choice(request.tier, request.program)
    tiers = [choice(tier, program) for tier, program in request.tiers.items()]
    cheaper = [tier for tier in tiers if tier.flops < requested.flops]
    return [requested, *sorted(cheaper, key=lambda tier: -tier.flops)]


def _bound(request: Request, choices: Sequence[_Choice]) -> UsageBound:
    return UsageBound(
        request_id=request.request_id,
        id_is_new=request.id_is_new,
        tenant=request.tenant,
        tags=dict(request.tags),
        tokens_input=len(request.tokens),
        tokens_output_max=request.max_tokens,
        offers=tuple(
            Offer(tier=choice.tier, program=choice.program.text, flops_bound=choice.flops, drafts_bound=choice.drafts)
            for choice in choices
        ),
        at=request.started_at,
    )


def _served(request: Request, choice: _Choice, depth: int) -> Request:
    """The request on another program; the FLOPs that its router executed stay."""
    requested = request.tier if request.tier is not None else request.program.text
    fixed = fixed_router(choice.program, depth)
    return replace(
        request,
        tier=choice.tier,
        router=fixed.kind,
        router_version=fixed.version,
        program=choice.program,
        promises=(),
        tags={**request.tags, DOWNGRADED_TAG: requested},
    )
