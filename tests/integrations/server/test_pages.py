"""The operations page over HTTP: where it is, who may see it, what a browser may do, and what the engine says."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from polar_billing.dashboard.page import Dashboard
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_server.access import stores
from polar_server.access.keys import KeyGuard
from polar_server.http.pages import build_pages, find_pages
from polar_server.telemetry.live import LiveEngine
from tests.integrations.server.test_disconnects import endless, read_events, send_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.applications import Starlette

    from polar_billing.access.keys import ApiKeys
    from polar_billing.ledger.ledger import Ledger
    from tests.integrations.server.conftest import RecordingSink, Served


OPEN = KeyGuard(None, "never")


async def get(app: Starlette, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8001") as client:
        return await client.get(path, headers=headers)


def basic(key: str, name: str = "anyone") -> str:
    return f"Basic {base64.b64encode(f'{name}:{key}'.encode()).decode()}"


@pytest.fixture
def page(ledger: Ledger) -> Dashboard:
    return Dashboard(ledger)


async def test_the_page_and_its_files_are_there(page: Dashboard, ledger: Ledger) -> None:
    Meter(ledger).emit(usage_record())
    app = build_pages(page, OPEN)
    answer = await get(app, "/polar/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
        (address,) = re.findall(rf'"({re.escape(name)}\?[0-9a-f]+)"', answer.text)
        file = await get(app, f"/polar/{address}")
        assert file.headers["content-type"] == f"{kind}; charset=utf-8"
        assert "immutable" in file.headers["cache-control"]
    assert "Verified." in (await get(app, "/polar/requests/1")).text
    assert (await get(app, "/polar/requests/2")).status_code == 404


async def test_short_addresses_lead_to_the_page(page: Dashboard) -> None:
    for path in ("/", "/polar"):
        answer = await get(build_pages(page, OPEN), path)
        assert (answer.status_code, answer.headers["location"]) == (307, "./polar/")


async def test_a_browser_may_run_and_load_nothing_else(page: Dashboard) -> None:
    app = build_pages(page, OPEN)
    for path in ("/polar/", "/polar/page.js", "/polar/nowhere", "/polar/requests/1"):
        headers = (await get(app, path)).headers
        rules = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
        assert rules.pop("default-src") == rules.pop("base-uri") == "'none'"
        assert rules.pop("form-action") == rules.pop("frame-ancestors") == "'none'"
        assert set(rules.values()) == {"'self'"}
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"


async def test_names_of_this_machine_are_answered_and_one_that_was_made_to_lead_here_is_not(
    page: Dashboard, keys: ApiKeys
) -> None:
    """A page of that name could read ours in its visitor's browser; with keys, it would have to know one."""
    app = build_pages(page, OPEN)
    for host in ("localhost", "localhost:8001", "127.0.0.1", "127.8.8.8:80", "[::1]:8001"):
        assert (await get(app, "/polar/page.js", host=host)).status_code == 200
    foreign = ["example.org", "127.0.0.1.example.org", "localhost.example.org:80", "10.0.0.5:8001", "localhost@x.org"]
    for host in foreign:
        answer = await get(app, "/polar/page.js", host=host)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    _, text = keys.create("acme", "operator", scopes=("dashboard",))
    guarded = await get(
        build_pages(page, KeyGuard(keys)), "/polar/page.js", host="example.org", authorization=basic(text)
    )
    assert guarded.status_code == 200


async def test_keys_open_it_by_their_scope_alone(page: Dashboard, keys: ApiKeys) -> None:
    app = build_pages(page, KeyGuard(keys))
    _, opens = keys.create("acme", "operator", scopes=("dashboard",))
    _, other = keys.create("acme", "reader", scopes=("infer", "usage:read", "metrics"))
    for path in ("/polar/", "/polar/page.js", "/polar/requests/1", "/polar"):
        refused = await get(app, path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == 'Basic realm="PoLar", charset="UTF-8"'
        assert (await get(app, path, authorization=basic(other))).status_code == 403
        for header in (basic(opens), basic(opens, ""), f"Bearer {opens}"):
            assert (await get(app, path, authorization=header)).status_code in {200, 307, 404}
    for header in ("Basic", "Basic !", "Basic " + base64.b64encode(opens.encode()).decode(), basic(opens[:-1]), "x"):
        assert (await get(app, "/polar/", authorization=header)).status_code == 401


async def test_it_only_reads(page: Dashboard) -> None:
    app = build_pages(page, OPEN)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            for path in ("/polar/", "/polar/requests/1", "/polar"):
                assert (await client.request(method, path)).status_code == 405
        assert (await client.head("/polar/")).status_code == 200


def test_a_server_shows_its_engine(serve: Callable[..., Served], sink: RecordingSink, ledger: Ledger) -> None:
    served = serve(pages=Dashboard(ledger))
    assert "Serving" in served.call("GET", "/polar/")[2]
    before = served.server.engine.scheduler.sampled_tokens  # all servers of these tests share it
    served.chat(max_tokens=5)
    assert served.server.engine.scheduler.sampled_tokens == before + 5
    with send_request(served, endless(served, stream=True)) as connection:
        read_events(connection, 3)
        look = served.server.live.look()
        assert (look.running, look.waiting, look.answers, look.draining) == (1, 0, 1, False)
        assert look.pages_used > 0
        assert look.unrecorded == 0
    sink.wait_for(2)
    status, headers, text = served.call("GET", "/polar/")
    assert status == 200
    assert "content-security-policy" in headers
    assert "of 32" in text
    assert 'polar_http_requests_total{path="/polar",status="200"} 2.0' in served.call("GET", "/metrics")[2]


def test_a_server_without_the_page_has_no_such_path(served: Served) -> None:
    assert served.call("GET", "/polar/")[0] == 404


def test_the_keys_of_a_server_are_those_of_its_page(
    serve: Callable[..., Served], ledger: Ledger, keys: ApiKeys
) -> None:
    served = serve(pages=Dashboard(ledger), keys=keys)
    _, text = keys.create("acme", "operator", scopes=("dashboard",))
    assert served.call("GET", "/polar/")[0] == 401
    assert served.call("GET", "/polar/", headers={"authorization": basic(text)})[0] == 200
    status, headers, _ = served.call("GET", "/v1/models", headers={"authorization": basic(text)})
    assert (status, headers["www-authenticate"]) == (401, "Bearer")


def test_tokens_per_second_are_those_of_the_last_seconds(served: Served) -> None:
    clock = [0.0]
    server = served.server
    live = LiveEngine(server.engine, "tiny", server.answers, server.sink, clock=lambda: clock[0])
    scheduler = server.engine.scheduler

    def look(seconds: float, tokens: int) -> float | None:
        clock[0] += seconds
        scheduler._passes.sampled_tokens += tokens
        return live.look().tokens_per_second

    assert look(0, 0) is None
    assert look(2, 100) == 50
    assert look(2, 300) == 100
    assert [look(4, 0), look(1, 0)] == [50, 0]
    assert look(3600, 7200) == 2


def test_the_page_is_found_by_its_entry_point(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_pages(None, "Europe/Berlin")
    assert isinstance(found, Dashboard)
    assert found.zone == "Europe/Berlin"
    monkeypatch.setattr(stores, "entry_points", lambda **_: [])
    with pytest.raises(ImportError, match="billing,report"):
        find_pages(None)


def test_the_page_needs_no_torch() -> None:
    modules = "polar_server.http.pages, polar_server.deployment.uvicorn_server, polar_billing.dashboard.page"
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "False\n"
    )
