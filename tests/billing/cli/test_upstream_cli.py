"""`polar audit-upstream`: what workers of vLLM counted, beside what the ledger has of them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.errors import QueryError, StoreNotFoundError, UpstreamAuditError
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_sdk.usage import WORKER_TAG, Outcome, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typer.testing import Result

    from polar_billing.ledger.ledger import Ledger

WHOLE, LIGHT = 6 * 10 - 9 + 6 * 3, 6 * 3 + 3 * 7 - 2 + 6 * 3
"""Tokens by layers of 10 tokens and 4 of an answer: at full depth, and where 7 of the 10 are filled from layer 3 on."""
WASTED = {"replayed": 40, "rejected": 12, "unread": 9, "late": 6}


class Workers:
    """Servers with the metrics of a vLLM that runs programs."""

    def __init__(self) -> None:
        self.keys = list[str | None]()
        workers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                workers.keys.append(self.headers["authorization"])
                content = workers.text.encode() if self.path == "/v1/polar/metrics" else b""
                self.send_response(200 if content else 404)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.say()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def say(self, executed: int = 2 * WHOLE + LIGHT, running: int = 0, cut: int = 0, worker: str = "w1") -> None:
        """Count what was needed, and what was wasted beside it."""
        kinds = {"executed": executed + sum(WASTED.values()), **WASTED, "cut": cut, "left": 5, "filled": 21}
        lines = [f'polar_upstream_layer_tokens_total{{worker="{worker}",kind="{k}"}} {n}' for k, n in kinds.items()]
        running_line = f'polar_upstream_requests_running{{worker="{worker}"}} {running}'
        self.text = "\n".join(["# TYPE polar_upstream_layer_tokens_total counter", *lines, running_line, ""])


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def stored(ledger: Ledger) -> Ledger:
    """Three records of the worker, one of which fills, one that was sent nothing, and one of another worker."""
    tokens = TokenUsage(input=10, output=4)
    with Meter(ledger) as meter:
        for program, worker in (("0-5", "w1"), ("0-5", "w1"), ("0-2 (3-5:2)", "w1"), ("0-5", "w2")):
            meter.emit(usage_record(program=program, tokens=tokens, tags={WORKER_TAG: worker}))
        nothing = usage_record(tags={WORKER_TAG: "w1"}, outcome=Outcome.CANCELLED)
        meter.emit(nothing.model_copy(update={"tokens": TokenUsage(input=10)}))
        meter.emit(usage_record())
    return ledger


@pytest.mark.usefixtures("stored")
def test_what_ran_is_what_was_billed_and_what_was_wasted(
    ok: Callable[..., str], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_BACKEND_KEY", "secret")
    (one,) = json.loads(ok("audit-upstream", workers.url, "--json"))["audits"]
    assert (one["requests"], one["needed"], one["unsent"], one["closes"]) == (4, 2 * WHOLE + LIGHT, 0, True)
    assert one["counts"]["executed"] == one["needed"] + sum(WASTED.values())
    assert workers.keys == ["Bearer secret"]
    shown = ok("audit-upstream", f"{workers.url}/v1/")
    assert all(f"{number:,}" in shown for number in (one["needed"], *WASTED.values(), one["counts"]["executed"]))


@pytest.mark.usefixtures("stored")
def test_tokens_that_a_client_left_without_are_at_most_those_of_answers_that_were_cut(
    ok: Callable[..., str], polar: Callable[..., Result], workers: Workers
) -> None:
    workers.say(2 * WHOLE + LIGHT + 30, cut=WHOLE)
    (one,) = json.loads(ok("audit-upstream", workers.url, "--json"))["audits"]
    assert (one["unsent"], one["closes"]) == (30, True)
    workers.say(2 * WHOLE + LIGHT + 30, cut=29)
    assert isinstance(polar("audit-upstream", workers.url).exception, UpstreamAuditError)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("counted", "part"),
    [
        ({"executed": 2 * WHOLE + LIGHT + 1}, "1 tokens by layers were executed"),
        ({"executed": 2 * WHOLE + LIGHT - 1}, "1 tokens by layers were billed"),
        ({"running": 3}, "3 requests run"),
        ({"worker": "w3"}, "are in no record"),
    ],
)
def test_what_does_not_add_up_is_a_line_and_an_exit_code(
    polar: Callable[..., Result], workers: Workers, counted: dict[str, Any], part: str
) -> None:
    workers.say(**counted)
    result = polar("audit-upstream", workers.url, "--json")
    assert isinstance(result.exception, UpstreamAuditError)
    assert result.exception.exit_code == 1
    assert part in str(result.exception)
    assert workers.url in str(result.exception)
    assert json.loads(result.stdout)["audits"][0]["closes"] is False


def test_servers_that_count_nothing_are_named(polar: Callable[..., Result], workers: Workers, tmp_path: Path) -> None:
    def refused(*arguments: str, kind: type[Exception] = QueryError) -> str:
        result = polar("audit-upstream", *arguments)
        assert isinstance(result.exception, kind)
        assert result.stdout == ""
        return str(result.exception)

    assert "'not a url'" in refused("not a url")
    assert "'ftp://a'" in refused("ftp://a")
    assert "http://127.0.0.1:1" in refused("http://127.0.0.1:1")
    assert "404" in refused(f"{workers.url}/else")
    missing = tmp_path / "none.sqlite3"
    assert str(missing) in refused(workers.url, "--ledger", str(missing), kind=StoreNotFoundError)
    for text in ("", "polar_upstream_requests_running 7\n", workers.text.replace("late", "later")):
        workers.text = text or "\n"
        assert workers.url in refused(workers.url)
    workers.say()
    own = workers.text
    workers.say(worker="w2")
    workers.text += own
    assert "several workers" in refused(workers.url)
