"""`/v1/polar/…`: what a request would cost, what the caller's tenant has used, and its receipts.

A quote makes the request, routes it, and drops it: no answer is computed, and nothing is held or recorded. Usage and
receipts are read from the ledger, only for the tenant of the key; another tenant's receipt does not exist.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

from polar_sdk.errors import ContextWindowError, PolarError, ProgramError, RouterError, ToleranceError, UnknownTierError
from polar_sdk.frameworks.cost import total_cost
from polar_sdk.reading import shown
from polar_sdk.serving.threads import run_in_thread
from polar_sdk.usage import UsageBound, new_request_id
from polar_server.errors import ApiError
from polar_server.http.exchange import Exchange, read_body
from polar_server.openai.chat import ChatBody
from polar_server.openai.completions import TextBody
from polar_server.openai.fields import invalid, read
from polar_server.openai.responses import ResponseBody

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starlette.types import Receive, Scope

    from polar_sdk.usage import Receipt
    from polar_server.access.stores import AccountStore
    from polar_server.answers import Ask
    from polar_server.openai.calls import Call, CallBody, Caller
    from polar_server.server import Server

_MAX_PARAMETERS: Final = 20
USAGE: Final = ("by", "month", "since", "until", "zone", "currency")
NUMBERS: Final = ("input_tokens", "max_tokens")
_BODIES: Final[Mapping[str, type[CallBody]]] = {"messages": ChatBody, "input": ResponseBody, "prompt": TextBody}
"""The field by which the body of an API is known."""
_PAUSES_S: Final = (0.0, 0.05, 0.2, 0.75)
"""How long a receipt is waited for: a record is in the ledger a moment after its answer. Unit: seconds."""
_NOT_OFFERED: Final = (RouterError, ProgramError, ToleranceError, UnknownTierError)


class Quote:
    """`/v1/polar/quote`: `POST` with the body of a completion, or `GET` with numbers of tokens."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The maximum that a request would cost, by every tier.

        Raises:
            ApiError: It would be refused.
        """
        exchange = Exchange.of(scope)
        if exchange.method == "POST":
            quoted = await self._of_body(exchange, receive)
        else:
            quoted = self._by_numbers(_parameters(scope, NUMBERS), exchange)
        return {"object": "polar.quote", **quoted}

    async def _of_body(self, exchange: Exchange, receive: Receive) -> dict[str, Any]:
        server, settings = self._server, self._server.settings

        def checked(content: dict[str, Any]) -> Call:
            model = next((model for name, model in _BODIES.items() if name in content), ChatBody)
            body, _ = read(content, model, lenient=settings.lenient)
            return body.call(server.rules(exchange))

        async with server.counted(exchange):  # a router may run layers
            call = await read_body(exchange, receive, settings.max_body, checked)
            return await run_in_thread(lambda _: self._quoted(call, server.caller(exchange)), None)

    def _quoted(self, call: Call, caller: Caller) -> dict[str, Any]:
        def as_tier(tier: str) -> list[UsageBound]:
            return self._bounds(
                [(prompt, {**options, "compute": tier, "program": None}) for prompt, options in call.asks]
            )

        try:
            requested = self._offer(call.model, self._bounds(call.asks))
        except PolarError as error:
            raise call.blamed(error) from error
        return {
            "requested": requested,
            "tiers": self._tiers(caller, as_tier),
            "prompts": call.prompts,
            "choices": len(call.asks),
        }

    def _by_numbers(self, asked: Mapping[str, str], exchange: Exchange) -> dict[str, Any]:
        window = self._server.engine.context_window
        read, written = (_number(asked, name, window) for name in NUMBERS)
        if read + written > window:
            raise ContextWindowError(f"{read} + {written} tokens are more than the context window of {window}.")

        def as_tier(tier: str) -> list[UsageBound]:
            offer = self._server.catalog.offer(tier, read, written)
            bound = UsageBound(
                request_id=new_request_id(),
                tenant=self._server.tenant(exchange),
                tokens_input=read,
                tokens_output_max=written,
                offers=(offer,),
                at=datetime.now(UTC),
            )
            return [bound]

        tiers = self._tiers(self._server.caller(exchange), as_tier)
        return {"requested": None, "tiers": tiers, "prompts": 1, "choices": 1}

    def _tiers(self, caller: Caller, bounds_of: Callable[[str], Sequence[UsageBound]]) -> list[dict[str, Any]]:
        """Every tier that the caller may use."""
        catalog, tiers = self._server.catalog, []
        for tier in catalog.tiers:
            model = f"{catalog.name}:{tier}"
            if not catalog.may_name(model, caller.models, caller.tiers):
                continue
            try:
                tiers.append(self._offer(model, bounds_of(tier)))
            except _NOT_OFFERED as error:
                tiers.append({"model": model, "tier": tier, "unavailable": str(error)})
        return tiers

    def _bounds(self, asks: Sequence[Ask]) -> list[UsageBound]:
        return [self._server.tiers.bound(prompt, **options) for prompt, options in asks]

    def _offer(self, model: str, bounds: Sequence[UsageBound]) -> dict[str, Any]:
        """The maximum that all choices use and cost together."""
        prices = [self._server.sink.quote(bound)[0] for bound in bounds]
        offers = [bound.offers[0] for bound in bounds]
        flops = sum(offer.flops_bound for offer in offers)
        programs = list(dict.fromkeys(offer.program for offer in offers))
        return {
            "model": model,
            "tier": offers[0].tier,
            "program": (programs[0] or None) if len(programs) == 1 else None,
            "input_tokens": sum(bound.tokens_input for bound in bounds),
            "max_output_tokens": sum(bound.tokens_output_max for bound in bounds),
            "max_flops": flops,
            "max_cu": f"{Decimal(flops).scaleb(-12):f}",
            **_price(prices),
        }


def _price(prices: Sequence[Receipt | None]) -> dict[str, Any]:
    """The sum of several prices; unknown where one of them is."""
    known = [price for price in prices if price is not None]
    total, first = total_cost(prices), known[0] if known else {}
    return {
        "max_cost": None if total is None else f"{total:f}",
        "currency": first.get("currency"),
        "price_book": first.get("price_book"),
        "unrated": next((price["unrated"] for price in known if price.get("unrated")), None),
    }


async def usage(server: Server, scope: Scope, _: Receive) -> dict[str, Any]:
    """`GET /v1/polar/usage`: usage and spend of the caller's tenant.

    Raises:
        ApiError: A parameter is wrong, or no ledger is kept.
    """
    accounts, tenant = _accounts(server), server.tenant(Exchange.of(scope))
    asked: dict[str, Any] = _parameters(scope, USAGE)
    if "by" in asked:
        asked["by"] = [name for name in asked["by"].split(",") if name]
        if "tenant" in asked["by"]:
            raise invalid("by", "there is one tenant only, the caller's; choose tier, model, day or month.")
    try:
        found = await asyncio.to_thread(partial(accounts.usage, tenant, **asked))
    except PolarError as error:
        if isinstance(error, ValueError):
            raise ApiError(str(error)) from error
        raise
    return {"object": "polar.usage", **found}


async def receipt(server: Server, scope: Scope, _: Receive) -> dict[str, Any]:
    """`GET /v1/polar/receipts/{id}`: one request of the caller's tenant.

    Raises:
        ApiError: The tenant has no such request, or no ledger is kept.
    """
    accounts, tenant = _accounts(server), server.tenant(Exchange.of(scope))
    request_id = scope["path_params"]["id"]
    for pause in _PAUSES_S:
        await asyncio.sleep(pause)
        found = await asyncio.to_thread(accounts.receipt, tenant, request_id)
        if found is not None:
            return found
    message = f"there is no receipt {request_id[:100]!r}; the id is `polar.receipt` of an answer, or x-request-id."
    raise ApiError(message, status=404, code="receipt_not_found")


def _accounts(server: Server) -> AccountStore:
    if server.settings.accounts is None:
        raise ApiError("this server keeps no ledger.", status=404, code="no_ledger")
    return server.settings.accounts


def _number(asked: Mapping[str, str], name: str, most: int) -> int:
    written = asked.get(name, "")
    number = int(written) if written.isascii() and written.isdigit() and len(written) < 10 else 0
    if not 1 <= number <= most:
        raise invalid(name, f"{shown(written)} is not a number of tokens; use 1 to {most}.")
    return number


def _parameters(scope: Scope, known: Sequence[str]) -> dict[str, str]:
    """The query, each name once."""
    try:
        listed = parse_qsl(
            scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MAX_PARAMETERS,
        )
    except ValueError as error:
        raise ApiError(f"the query cannot be read, or has more than {_MAX_PARAMETERS} parameters.") from error
    names = [name for name, _ in listed]
    for name, value in listed:
        if name not in known:
            raise invalid(name[:64], f"there is no such parameter; use {', '.join(known)}.")
        if names.count(name) > 1 or not value or len(value) > 200:
            raise invalid(name, "give it once, with a value of 1 to 200 characters.")
    return dict(listed)
