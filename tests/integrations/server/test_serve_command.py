"""`polar serve` and `polar dashboard` as processes: what they refuse before they load anything, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.access.keys import ApiKeys
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_sdk.errors import InvalidRequestError, PolarError
from polar_sdk.testing import tiny_llama, tiny_tokenizer
from polar_server import cli
from polar_server.deployment.launch import Launch
from tests.integrations.server.conftest import JSON

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVE = "import typer; from polar_server.cli import register; from polar_sdk.cli.main import _Group; \
app = typer.Typer(cls=_Group); app.callback()(lambda: None); register(app); app()"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the tiny model."""
    folder = tmp_path / "tiny"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def serving(*arguments: str, command: str = "serve") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, command, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Serving "):
            return line.split()[-1]
        if line.startswith("Operations page on "):
            return line.split()[3].rstrip(";")
    raise AssertionError("it did not start")


def ask(url: str, headers: dict[str, str] | None = None) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), {**JSON, **(headers or {})})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_an_open_bind_asks_for_keys_meters_and_ends_on_sigterm(model: Path, ledger_url: str) -> None:
    with Ledger(ledger_url) as ledger:
        _, text = ApiKeys(ledger).create("globex", "search")
    with serving("--model", str(model), "--name", "tiny", "--port", "0", "--host", "0.0.0.0") as process:
        url = url_of(process).replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(url)
        answer = ask(url, {"authorization": f"Bearer {text}"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with Ledger(ledger_url) as ledger:
        (stored,) = ledger.read(Selection(ALL_TENANTS))
    assert stored.record.request_id == answer["polar"]["receipt"]
    assert stored.record.tenant == answer["polar"]["tenant"] == "globex"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the loggers of this process alone."""
    monkeypatch.setattr("polar_server.deployment.launch.log_as_json", lambda: None)


@pytest.mark.usefixtures("quiet", "ledger_url")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "polar key create"),
        ({"host": "0.0.0.0", "require_keys": False}, "--no-require-keys"),
        ({"host": "0.0.0.0", "no_ledger": True}, "--no-ledger"),
        ({"require_keys": True}, "polar key create"),
        ({"backend": ["http://a:8000"]}, "TIER=URL"),
        ({"write_config": Path("-")}, "--ray"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        cli.serve(model="no/such/model", **options)


def test_the_dashboard_asks_for_keys_where_others_can_reach_it_and_ends_on_sigterm(ledger_url: str) -> None:
    with Ledger(ledger_url) as ledger:
        Meter(ledger).emit(usage_record(tenant="initech", started_at=datetime.now(UTC)))
        _, text = ApiKeys(ledger).create("acme", "operator", scopes=("dashboard",))
    with serving("--port", "0", "--host", "0.0.0.0", command="dashboard") as process:
        url = url_of(process).replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url, timeout=60)
        request = urllib.request.Request(url, headers={"authorization": f"Bearer {text}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            page = answer.read().decode()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert "operator" in page
    assert "initech" in page
    assert "No engine runs behind this page" in page


def test_the_start_says_what_is_not_enforced(ledger_url: str) -> None:
    with serving("--port", "0", command="dashboard") as process:
        url = url_of(process)
        assert process.stderr is not None
        assert "--require-keys" in process.stderr.readline()
        urllib.request.urlopen(url, timeout=60).close()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(url, headers={"x-forwarded-for": "10.0.0.5"}), timeout=60)


@pytest.mark.parametrize(
    ("options", "rule"),
    [({}, "forwarded"), ({"require_keys": False}, "never"), ({"host": "::1", "no_ledger": True}, "forwarded")],
)
def test_calls_that_need_a_key(ledger_url: str, options: dict[str, Any], rule: str) -> None:
    stores = Launch(**options).stores()
    assert (stores["require_keys"], "keys" in stores) == (rule, "no_ledger" not in options)


def test_a_webhook_is_opened_with_the_stores_or_refused(ledger_url: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef", encoding="utf-8")
    hook: dict[str, Any] = {"alert_url": "https://example.com/hook", "alert_secret": str(tmp_path / "secret")}
    assert "alerts" in Launch(**hook).stores()
    wrong: list[dict[str, Any]] = [
        {"alert_url": hook["alert_url"]},
        {"alert_secret": hook["alert_secret"]},
        {**hook, "no_ledger": True},
        {**hook, "alert_url": "http://example.com/hook"},
        {**hook, "alert_secret": str(tmp_path / "none")},
    ]
    for options in wrong:
        with pytest.raises(PolarError):
            Launch(**options).stores()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "--scope dashboard"),
        ({"host": "0.0.0.0", "require_keys": False}, "--no-require-keys"),
        ({"require_keys": True}, "--scope dashboard"),
        ({"zone": "Europe/Nowhere"}, "Europe/Nowhere"),
        ({"ledger": "/nowhere/at/all/ledger.sqlite3"}, "/nowhere/at/all"),
    ],
)
def test_the_dashboard_says_what_is_wrong_before_it_starts(ledger_url: str, options: dict[str, Any], said: str) -> None:
    with Ledger(ledger_url) as ledger:
        ApiKeys(ledger).create("acme", "search")
    with pytest.raises(PolarError, match=said):
        cli.dashboard(**options)


def test_a_port_in_use_is_one_line_and_the_callers_mistake(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ("--port", str(port), "--model", str(model), "--no-ledger")
        with serving(*arguments) as process:
            _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"--port {port}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("texts", "share"),
    [((), None), (("0.02",), 0.02), (("economy=0.05", "standard=0"), {"economy": 0.05, "standard": 0.0})],
)
def test_shares_of_audits(texts: tuple[str, ...], share: Any) -> None:
    assert Launch(audit_share=texts).shares() == share


@pytest.mark.parametrize("texts", [("many",), ("economy=",), ("0.1", "economy=0.2")])
def test_shares_of_audits_that_cannot_be_are_refused_before_anything_loads(texts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="--audit-share"):
        Launch(audit_share=texts)
