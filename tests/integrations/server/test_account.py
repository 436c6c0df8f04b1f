"""`/v1/polar/…`: prices before anything runs, a tenant's usage and receipts, and nothing of anybody else's."""

from __future__ import annotations

import json
import random
import string
import urllib.parse
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.access.accounts import Accounts
from polar_billing.metering.meter import Meter
from polar_billing.proof.receipts import check_receipt
from polar_sdk import PolarModel
from tests.integrations.server.conftest import RecordingSink, bearer, chat_body
from tests.sdk.router import conftest as router_conftest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polar_billing.access.keys import ApiKeys
    from polar_billing.ledger.ledger import Ledger
    from polar_sdk.router.menu import MenuRouter
    from tests.integrations.server.conftest import Served

model, router, certified = router_conftest.model, router_conftest.router, router_conftest.certified
TIERS = ["economy", "standard", "premium", "exact"]


@pytest.fixture
def billed(serve: Callable[..., Served], ledger: Ledger, keys: ApiKeys) -> Iterator[Served]:
    """A server with keys that meters into a ledger."""
    with Meter(ledger, durability="spool") as meter:
        yield serve(sink=meter, keys=keys, accounts=Accounts(ledger))


def key_of(keys: ApiKeys, tenant: str, *scopes: str, **bounds: Any) -> dict[str, str]:
    return bearer(keys.create(tenant, "k", scopes=scopes or ("infer", "usage:read"), **bounds)[1])


def chat(served: Served, headers: dict[str, str], **fields: Any) -> dict[str, Any]:
    status, _, body = served.call("POST", "/v1/chat/completions", chat_body(**fields), headers)
    assert status == 200, body
    answer: dict[str, Any] = body
    return answer


# -- quotes ------------------------------------------------------------------------------------------------------------


def test_a_quote_is_the_most_that_the_request_then_costs(billed: Served, keys: ApiKeys, ledger: Ledger) -> None:
    headers = key_of(keys, "acme")
    body = chat_body(max_tokens=7, n=2, temperature=1, logit_bias={"256": -100})
    status, _, quoted = billed.call("POST", "/v1/polar/quote", body, headers)
    assert (status, quoted["object"]) == (200, "polar.quote")
    assert [offer["tier"] for offer in quoted["tiers"]] == TIERS
    assert [offer["model"] for offer in quoted["tiers"]] == [f"tiny:{tier}" for tier in TIERS]
    assert quoted["requested"] == {**quoted["tiers"][1], "model": "tiny"}
    assert list(Accounts(ledger).usage("acme")["rows"]) == [], "nothing ran"
    for offer in quoted["tiers"]:
        answer = chat(billed, headers, **{**body, "model": offer["model"]})
        assert answer["polar"]["program"] == offer["program"]
        assert answer["usage"]["completion_tokens"] == offer["max_output_tokens"] == 14
        # The second choice may share the start of its prompt; without that, what ran is what was quoted.
        assert answer["polar"]["flops"] <= offer["max_flops"]
        assert Decimal(answer["cost_details"]["amount"]) <= Decimal(offer["max_cost"])
        assert answer["cost_details"]["currency"] == offer["currency"]
        assert answer["cost_details"]["price_book"] == offer["price_book"]


def test_a_quote_is_exact_for_one_answer_of_full_length(billed: Served, keys: ApiKeys) -> None:
    headers = key_of(keys, "acme")
    body = chat_body(max_tokens=7, logit_bias={"256": -100})
    _, _, quoted = billed.call("POST", "/v1/polar/quote", body, headers)
    _, _, numbers = billed.call("GET", "/v1/polar/quote?input_tokens=4&max_tokens=7", headers=headers)
    answer = chat(billed, headers, **body)
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["polar"]["flops"] == quoted["requested"]["max_flops"]
    assert answer["cost_details"]["amount"] == quoted["requested"]["max_cost"]
    assert numbers["tiers"] == quoted["tiers"]
    assert numbers["requested"] is None
    assert billed.call("HEAD", "/v1/polar/quote?input_tokens=4&max_tokens=7", headers=headers)[0] == 200


def test_a_quote_holds_and_records_nothing(served: Served, sink: RecordingSink) -> None:
    _, _, body = served.call("POST", "/v1/polar/quote", {"model": "tiny", "prompt": ["ab", "c"], "program": "0-2 4-5"})
    assert (body["prompts"], body["choices"]) == (2, 2)
    assert body["requested"]["program"] == "0-2 4-5"
    assert body["requested"]["input_tokens"] == 3
    assert body["requested"]["max_output_tokens"] == 32
    assert body["requested"]["max_cost"] is None, "this sink has no prices"
    assert sink.records == []
    assert not sink.asked.acquire(blocking=False)


def test_a_quote_shows_what_the_key_may_use(billed: Served, keys: ApiKeys) -> None:
    headers = key_of(keys, "acme", tiers=("economy",), requests_per_minute=3)
    _, found, quoted = billed.call("POST", "/v1/polar/quote", chat_body(model="tiny:economy"), headers)
    assert [offer["tier"] for offer in quoted["tiers"]] == ["economy"]
    assert found["x-ratelimit-remaining-requests"] == "2"
    assert billed.call("POST", "/v1/polar/quote", chat_body(model="tiny:exact"), headers)[0] == 404
    assert billed.call("POST", "/v1/polar/quote", chat_body(model="tiny:economy"), headers)[0] == 200
    assert billed.call("POST", "/v1/polar/quote", chat_body(model="tiny:economy"), headers)[0] == 429


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "input_tokens"),
        ("input_tokens=0&max_tokens=1", "input_tokens"),
        ("input_tokens=1&max_tokens=x", "max_tokens"),
        ("input_tokens=1&max_tokens=%C2%B2", "max_tokens"),
        ("input_tokens=1&input_tokens=2&max_tokens=1", "input_tokens"),
        ("input_tokens=1&max_tokens=1&tier=exact", "tier"),
        ("input_tokens=4096&max_tokens=4096", None),
        ("&".join(f"a{place}=1" for place in range(30)), None),
        ("input_tokens=%ff", None),
    ],
)
def test_a_quote_of_wrong_numbers_is_refused(refusing: Served, query: str, param: str | None) -> None:
    status, _, body = refusing.call("GET", f"/v1/polar/quote?{query}")
    assert (status, body["error"]["param"]) == (400, param)


def test_what_would_be_refused_has_no_quote(refusing: Served) -> None:
    odd = {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}
    for fields in ({"temperature": 9}, {"response_format": odd}):
        status, _, body = refusing.call("POST", "/v1/polar/quote", chat_body(**fields))
        assert (status, body["error"]["param"]) == (400, next(iter(fields)))


def test_a_learned_router_quotes_the_program_that_it_chooses(
    serve: Callable[..., Served], sink: RecordingSink, model: PolarModel, certified: MenuRouter
) -> None:
    served = serve(engine=PolarModel(model.loaded, router=certified, sink=sink, tenant="acme"))
    body = chat_body(logit_bias={"256": -100})
    _, _, quoted = served.call("POST", "/v1/polar/quote", body)
    assert [offer["tier"] for offer in quoted["tiers"]] == ["economy", "standard", "exact"]
    _, _, numbers = served.call("GET", "/v1/polar/quote?input_tokens=4&max_tokens=8")
    for offer, most in zip(quoted["tiers"], numbers["tiers"], strict=True):
        answer = served.chat(**{**body, "model": offer["model"]})
        assert answer["polar"]["program"] == offer["program"]
        assert answer["polar"]["flops"] == offer["max_flops"] <= most["max_flops"]


# -- usage -------------------------------------------------------------------------------------------------------------


def test_usage_is_that_of_the_tenant_by_tier(billed: Served, keys: ApiKeys, ledger: Ledger) -> None:
    acme, globex = key_of(keys, "acme"), key_of(keys, "globex")
    answers = [chat(billed, acme, model=f"tiny:{tier}") for tier in ("economy", "economy", "exact")]
    chat(billed, globex)
    billed.server.sink.inner.flush()  # type: ignore[attr-defined]
    status, _, usage = billed.call("GET", "/v1/polar/usage", headers=acme)
    assert (status, usage["object"], usage["tenant"]) == (200, "polar.usage", "acme")
    economy, exact = usage["rows"]
    assert (economy["group"], economy["requests"]) == ({"tier": "economy"}, 2)
    assert (exact["group"], exact["requests"]) == ({"tier": "exact"}, 1)
    spent = sum(Decimal(row["cost"]) for row in usage["rows"])
    assert spent == sum(Decimal(answer["cost_details"]["amount"]) for answer in answers)
    assert sum(row["flops"] for row in usage["rows"]) == sum(answer["polar"]["flops"] for answer in answers)
    now = datetime.now(UTC)
    assert usage["since"] == f"{now:%Y-%m}-01T00:00:00+00:00"
    _, _, daily = billed.call("GET", f"/v1/polar/usage?by=day,outcome&month={now:%Y-%m}&zone=UTC", headers=acme)
    assert daily["rows"][0]["group"] == {"day": f"{now:%Y-%m-%d}", "outcome": "completed"}
    _, _, none = billed.call("GET", "/v1/polar/usage?since=2020-01-01&until=2020-02-01&currency=EUR", headers=acme)
    assert none["rows"] == []


@pytest.mark.parametrize(
    "query",
    [
        "by=tenant",
        "by=tier&by=day",
        "month=2026-11&since=2026-11-01",
        "since=2026-11-02&until=2026-11-01",
        "zone=Mars/Base",
        "tenant=globex",
        "month=",
        f"zone={'x' * 300}",
        "since=0001-01-01T00:00:00%2B23:00",
        "by=tag:%00",
    ],
)
def test_a_wrong_question_is_refused(billed: Served, keys: ApiKeys, query: str) -> None:
    status, _, body = billed.call("GET", f"/v1/polar/usage?{query}", headers=key_of(keys, "acme"))
    if query == "by=tag:%00":  # a tag that no request can have
        assert (status, body["rows"]) == (200, [])
    else:
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")
        assert "--" not in body["error"]["message"], "hints of the command line do not help here"


# -- receipts ----------------------------------------------------------------------------------------------------------


def test_a_receipt_is_the_one_of_the_command_and_proves_itself(billed: Served, keys: ApiKeys, ledger: Ledger) -> None:
    headers = key_of(keys, "acme")
    answer = chat(billed, headers)
    status, _, receipt = billed.call("GET", f"/v1/polar/receipts/{answer['polar']['receipt']}", headers=headers)
    assert status == 200
    assert receipt["request_id"] == answer["polar"]["receipt"]
    assert receipt["cost"] == answer["cost_details"]["amount"]
    with ledger.snapshot() as connection:
        assert check_receipt(connection, receipt).wrong is None


def test_a_foreign_receipt_does_not_exist(
    billed: Served, keys: ApiKeys, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_server.endpoints.account._PAUSES_S", (0.0,))
    acme, globex = key_of(keys, "acme"), key_of(keys, "globex")
    own = chat(billed, acme)["polar"]["receipt"]
    billed.server.sink.inner.flush()  # type: ignore[attr-defined]
    assert billed.call("GET", f"/v1/polar/receipts/{own}", headers=acme)[0] == 200
    randomly = random.Random(1)
    near = [own, own.upper(), f"{own} ", f"{own}/", f"{own}%00", f"../{own}", "acme/" + own, "%ff", "%2e%2e", own + "%"]
    missing = None
    strange = ("".join(randomly.choices(string.printable, k=20)) for _ in range(60))
    for tried in [*near, *map(urllib.parse.quote, strange)]:
        path = f"/v1/polar/receipts/{tried.replace(' ', '%20')}"
        status, _, body = billed.call("GET", path, headers=globex)
        assert status == 404
        assert body["error"]["code"] == "receipt_not_found" or "%0A" in tried, "no path has a line break"
        said = json.dumps(body).replace(json.dumps(own)[1:-1], "")
        assert "acme" not in said or "acme" in tried
        missing = missing or body["error"]["message"].replace(own, "ID")
    other = billed.call("GET", "/v1/polar/receipts/0193e1a2", headers=globex)[2]["error"]["message"]
    assert missing == other.replace("0193e1a2", "ID"), "whether it exists cannot be told"


# -- scopes ------------------------------------------------------------------------------------------------------------


def test_each_path_needs_its_scope(billed: Served, keys: ApiKeys) -> None:
    infer, reads = key_of(keys, "acme", "infer"), key_of(keys, "acme", "usage:read")
    receipt = chat(billed, infer)["polar"]["receipt"]
    for path in ("/v1/polar/usage", f"/v1/polar/receipts/{receipt}"):
        assert billed.call("GET", path)[0] == 401
        assert billed.call("GET", path, headers=infer)[2]["error"]["code"] == "insufficient_scope"
        assert billed.call("GET", path, headers=reads)[0] == 200
    assert billed.call("POST", "/v1/polar/quote", chat_body(), reads)[0] == 403
    assert billed.call("POST", "/v1/polar/quote", chat_body(), infer)[0] == 200


def test_without_a_ledger_there_is_nothing_to_tell(refusing: Served) -> None:
    for path in ("/v1/polar/usage", "/v1/polar/receipts/x"):
        status, _, body = refusing.call("GET", path)
        assert (status, body["error"]["code"]) == (404, "no_ledger")


def test_a_ledger_that_is_still_empty_has_no_usage(serve: Callable[..., Served], ledger_url: str) -> None:
    served = serve(accounts=Accounts(ledger_url))
    status, _, body = served.call("GET", "/v1/polar/usage")
    assert (status, body["rows"], body["tenant"]) == (200, [], "acme")
