"""Floors over HTTP: by API key, also before tiers that another server computes, and what the answer says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from polar_sdk import ListSink, PolarModel
from polar_sdk.programs.floors import Floor
from tests.integrations.server.conftest import bearer, chat_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.access.keys import ApiKeys
    from tests.integrations.server.conftest import RecordingSink, Served


@pytest.mark.parametrize("relayed", [False, True])
def test_the_key_of_a_floor_gets_no_tier_below_it(
    serve: Callable[..., Served], keys: ApiKeys, sink: RecordingSink, tiny: PolarModel, relayed: bool
) -> None:
    made, text = keys.create("clinic", "ward")
    _, other = keys.create("shop", "till")
    floor = Floor(name="ward é", floor="exact", keys=(made.key_id,))
    policy = tiny.policy.model_copy(update={"floors": (floor,)})
    settings: dict[str, Any] = {"engine": PolarModel(tiny.loaded, policy=policy, sink=sink), "keys": keys}
    if relayed:
        upstream = serve(engine=PolarModel(tiny.loaded, policy=tiny.policy, sink=ListSink()))
        settings["backends"] = {"economy": [upstream.url]}
    served = serve(**settings)

    def ask(key: str, **fields: Any) -> tuple[dict[str, str], Any]:
        status, headers, body = served.call("POST", "/v1/chat/completions", chat_body(**fields), bearer(key))
        assert status == 200, body
        return headers, body["polar"]

    for fields, asked in (
        ({"model": "tiny:economy"}, "economy"),
        ({"compute": "economy", "tags": {"team": "x"}}, "economy"),
        ({"program": "0 3-5"}, "0 3-5"),
        ({}, "standard"),
    ):
        headers, polar = ask(text, **fields)
        assert (headers["x-polar-floor"], headers["x-polar-tier"]) == ("ward%20%C3%A9", "exact")
        assert (polar["program"], polar["tier"], polar["floor"], polar["raised_from"]) == (
            "0-5",
            "exact",
            "ward é",
            asked,
        )
    if not relayed:  # an upstream of the whole model is not the one of economy
        headers, polar = ask(other, model="tiny:economy")
        assert polar["program"] == "0 3-5" and "floor" not in polar and "x-polar-floor" not in headers
