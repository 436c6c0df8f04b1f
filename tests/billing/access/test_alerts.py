"""The webhook: told of each change of a promise's state, signed, until it has taken it, whatever it does meanwhile."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, update

from polar_billing.access import alerts as alerts_module
from polar_billing.access.alerts import Alerts, Webhook
from polar_billing.errors import AccessError
from polar_billing.ledger.audits import Audits
from polar_billing.ledger.clock import database_time
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.schema import alert_table
from polar_billing.proof.verify import verify_ledger
from polar_billing.testing import audit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Connection

SECRET = b"0123456789abcdef"


class Receiver:
    """A webhook that answers what it is told to, and keeps what it hears."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.statuses: list[int] = []
        """Answers to the next calls; 200 afterwards, and 0 = it hangs."""
        self.heard: list[tuple[str, bytes]] = []
        self.released = threading.Event()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            one.heard.append((self.headers["Polar-Signature"], body))
            status = one.statuses.pop(0) if one.statuses else 200
            if not status:
                one.released.wait(20)
                return
            self.send_response(status)
            self.send_header("location", one.url)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    one = Receiver(f"http://127.0.0.1:{server.server_port}/hook?x=1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield one
    finally:
        one.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    return file


@pytest.fixture
def at_risk(store: Ledger) -> Ledger:
    """A ledger with a promise at risk, and one in force."""
    lost = [audit(lost=True) for _ in range(12)]
    Audits(store, "polar").store([*lost, audit(promise="cd" * 32)])
    return store


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], None]:
    """Sets how far the database's clock is ahead."""
    by = [timedelta()]

    def later(connection: Connection, *, writes: bool) -> datetime:
        return database_time(connection, writes=writes) + by[0]

    monkeypatch.setattr(alerts_module, "database_time", later)

    def set_ahead(delta: timedelta) -> None:
        by[0] = delta

    return set_ahead


def test_a_change_is_told_once_signed_and_says_what_happened(at_risk: Ledger, receiver: Receiver, secret: Path) -> None:
    alerts = Alerts(at_risk, Webhook.of(receiver.url, secret))
    assert [alerts.deliver() for _ in range(3)] == [1, 0, 0]
    ((signed, body),) = receiver.heard
    fields = dict(part.split("=", 1) for part in signed.split(","))
    assert abs(int(fields["t"]) - time.time()) < 60
    expected = hmac.new(SECRET, fields["t"].encode() + b"." + body, hashlib.sha256).hexdigest()
    assert fields["v1"] == expected
    said = json.loads(body)
    assert (said["tier"], said["state"], said["promise"]) == ("premium", "at risk", "ab" * 32)
    assert 0 < said["losses"] <= said["audits"] <= 12
    assert verify_ledger(at_risk).sound


@pytest.mark.parametrize("answer", [500, 302, 404])
def test_what_is_not_taken_is_tried_again_later_each_time(
    at_risk: Ledger, receiver: Receiver, secret: Path, answer: int, ahead: Callable[[timedelta], None]
) -> None:
    receiver.statuses = [answer] * 3
    alerts = Alerts(at_risk, Webhook.of(receiver.url, secret))
    waits = (0, 2, 6, 14, 3_600)  # after each wait it has the next answer, and nothing sooner
    for told, wait in enumerate(waits):
        if told:
            ahead(timedelta(seconds=wait - 1.5))
            assert alerts.deliver() == 0
        ahead(timedelta(seconds=wait + 1))
        assert alerts.deliver() == (told == 3)
        assert len(receiver.heard) == min(told + 1, 4)
    assert len({body for _, body in receiver.heard}) == 1


def test_one_that_never_takes_it_is_given_up(
    at_risk: Ledger, receiver: Receiver, secret: Path, ahead: Callable[[timedelta], None]
) -> None:
    receiver.statuses = [503] * 100
    alerts = Alerts(at_risk, Webhook.of(receiver.url, secret))
    for hour in range(60):
        ahead(timedelta(hours=2 * hour))
        alerts.deliver()
    assert 15 < len(receiver.heard) < 40
    with at_risk.snapshot() as connection:
        assert [(row.sent, row.answer) for row in connection.execute(select(alert_table))] == [(0, "it answered 503")]


def test_one_that_hangs_or_is_not_there_keeps_nobody_waiting(
    at_risk: Ledger, receiver: Receiver, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts_module, "_PATIENCE_S", 0.3)
    receiver.statuses = [0]
    alerts = Alerts(at_risk, Webhook.of(receiver.url, secret))
    assert alerts.deliver() == 0
    receiver.released.set()
    with receiving() as gone:
        pass
    hook = Webhook.of(gone.url, secret)
    assert "refused" in str(hook.call(b"{}"))
    replica = Alerts(at_risk, hook, every_s=0.01)
    replica.start()
    Audits(at_risk, "polar").store([audit()])  # goes on meanwhile
    replica.close()


def test_replicas_deliver_together_what_one_that_was_killed_left(
    at_risk: Ledger, receiver: Receiver, secret: Path, ahead: Callable[[timedelta], None]
) -> None:
    url = at_risk.url.render_as_string(hide_password=False)
    ledgers = [Ledger(url) for _ in range(4)]
    replicas = [Alerts(ledger, Webhook.of(receiver.url, secret), every_s=0.02) for ledger in ledgers]
    with at_risk.snapshot() as connection:
        (first,) = alerts_module._due(connection)
    assert replicas[0]._claim(first.seq)  # and is killed before it has called
    for one in replicas[1:]:
        one.start()
    time.sleep(0.5)
    assert receiver.heard == []
    ahead(timedelta(seconds=40))
    deadline = time.monotonic() + 20
    while not receiver.heard and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    assert len(receiver.heard) == 1
    for one in replicas:
        one.close()
    for ledger in ledgers:
        ledger.close()


def test_a_state_that_ends_is_told_as_well(ledger: Ledger, receiver: Receiver, secret: Path) -> None:
    Audits(ledger, "polar").store([audit()])
    alerts = Alerts(ledger, Webhook.of(receiver.url, secret))
    assert alerts.deliver() == 0  # a promise that begins in force is no news
    Audits(ledger, "polar").store([audit(lost=True) for _ in range(12)])
    assert alerts.deliver() == 1
    with ledger.transaction() as connection:
        connection.execute(update(alert_table).values(sent=0, due_at=datetime(2026, 1, 1).astimezone()))
    assert alerts.deliver() == 1  # the same change again has the same id
    first, second = (json.loads(body)["id"] for _, body in receiver.heard)
    assert first == second


def test_a_process_tells_that_its_prompts_are_unusual_and_usual_again(
    ledger: Ledger, receiver: Receiver, secret: Path
) -> None:
    state = [False]
    receiver.statuses = [503, 200, 200]
    alerts = Alerts(ledger, Webhook.of(receiver.url, secret), every_s=3600)
    alerts.start(lambda: state[0])
    try:
        assert alerts.notify() == 0, "usual prompts are no news"
        state[0] = True
        assert [alerts.notify(), alerts.notify()] == [0, 0], "it was not taken, and is not due again"
        time.sleep(2.1)
        assert [alerts.notify(), alerts.notify()] == [1, 0]
        state[0] = False
        assert alerts.notify() == 1
    finally:
        alerts.close()
    first, again, last = (json.loads(body) for _, body in receiver.heard)
    assert first == again
    assert first["id"] != last["id"]
    assert [(one["kind"], one["state"]) for one in (first, last)] == [
        ("prompts.state_changed", "unusual"),
        ("prompts.state_changed", "usual"),
    ]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "ftp://127.0.0.1/",
        "https://",
        "https://user:pw@example.com/",
        "http://127.0.0.1.example.com/",
        "https://example.com:99999/",
        "https://example.com/a b\n",
        "nonsense",
    ],
)
def test_urls_that_would_send_it_in_the_open_are_refused(url: str, secret: Path) -> None:
    with pytest.raises(AccessError):
        Webhook.of(url, secret)


@pytest.mark.parametrize("content", [None, b"", b"short\n"])
def test_a_secret_that_proves_nothing_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(AccessError):
        Webhook.of("https://example.com/", tmp_path / "key")


@pytest.mark.parametrize(
    "url", ["https://example.com/x?y=1", "http://127.0.0.1:80/", "http://[::1]/", "http://localhost/"]
)
def test_https_and_this_machine_are_accepted(url: str, secret: Path) -> None:
    assert Webhook.of(url, secret).secret == SECRET
