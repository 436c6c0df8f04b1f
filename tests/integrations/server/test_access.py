"""Keys over HTTP: who may ask, in whose name, how much; and calls that come twice."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from polar_billing.access.accounts import Accounts
from polar_billing.access.keys import SCOPES
from polar_billing.access.rates import Rates
from polar_billing.access.replies import Replies
from polar_billing.dashboard.page import Dashboard
from polar_billing.errors import StoreLockedError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import Selection
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record
from polar_server import Settings, build
from polar_server.access import keys as access
from polar_server.access.stores import MemoryReplies, find_access
from tests.integrations.server.conftest import JSON, WAIT_S, RecordingSink, bearer, chat_body
from tests.integrations.server.test_disconnects import endless, read_events, send_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from polar_billing.access.keys import ApiKeys
    from polar_server.access.stores import ReplyStore
    from tests.integrations.server.conftest import Served


@pytest.fixture
def guarded(serve: Callable[..., Served], keys: ApiKeys) -> Served:
    """A server that asks for keys."""
    return serve(keys=keys)


def ask(served: Served, text: str, **fields: Any) -> tuple[int, dict[str, str], Any]:
    return served.call("POST", "/v1/chat/completions", chat_body(**fields), bearer(text))


def test_a_key_says_who_is_billed(guarded: Served, keys: ApiKeys, sink: RecordingSink) -> None:
    made, text = keys.create("globex", "search", tags={"team": "a", "user": "ann"})
    assert ask(guarded, text, user="bob", tags={"team": "b", "place": "x"})[0] == 200
    (record,) = sink.records
    assert record.tenant == "globex"
    assert record.tags == {"team": "a", "user": "ann", "place": "x", "key": made.key_id}


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer x",
        "Basic cGs6",
        "Bearer pk_aaaaaaaa_" + "a" * 43,
        "Bearer pk_aaaaaaaa_" + "a" * 5_000,
        "Bearer pk_aaaaaaaa_'; DROP TABLE polar_usage; --" + "a" * 20,
    ],
)
def test_without_a_good_key_nothing_is_told(guarded: Served, sink: RecordingSink, header: str | None) -> None:
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/nowhere")):
        headers = {} if header is None else {"authorization": header}
        status, found, body = guarded.call(method, path, chat_body() if method == "POST" else None, headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert found["www-authenticate"] == "Bearer"
    assert guarded.call("GET", "/health")[0] == guarded.call("GET", "/ready")[0] == 200
    assert sink.records == []


def test_the_secret_of_another_key_opens_nothing(guarded: Served, keys: ApiKeys) -> None:
    one, other = keys.create("acme", "one"), keys.create("acme", "other")
    mixed = f"pk_{one[0].key_id}_{other[1].split('_', 2)[2]}"
    assert ask(guarded, mixed)[0] == 401


def test_a_revoked_key_is_refused_within_five_seconds(guarded: Served, keys: ApiKeys) -> None:
    guard = guarded.server.guard
    now = [0.0]
    guard.clock = lambda: now[0]
    made, text = keys.create("acme", "search")
    assert ask(guarded, text)[0] == 200
    keys.revoke(made.key_id)
    now[0] = access.FRESH_S
    status, _, body = ask(guarded, text)
    assert (status, "revoked" in body["error"]["message"]) == (401, True)
    assert access.FRESH_S <= 5


def test_a_key_counts_also_where_none_is_needed(
    serve: Callable[..., Served], keys: ApiKeys, sink: RecordingSink
) -> None:
    served = serve(keys=keys, require_keys="forwarded")
    made, text = keys.create("globex", "search", tiers=("economy",))
    revoked, old = keys.create("globex", "old")
    keys.revoke(revoked.key_id)
    assert ask(served, text, model="tiny:economy")[2]["polar"]["tenant"] == "globex"
    assert ask(served, text, model="tiny:exact")[0] == 404
    assert ask(served, keys.create("globex", "figures", scopes=("metrics",))[1])[0] == 403
    for wrong in (f"pk_{made.key_id}_{'a' * 43}", f"pk_nothing0_{'a' * 43}", text[:-1], old, "sk-invented", "x"):
        assert ask(served, wrong)[2]["error"]["code"] == "invalid_api_key"
        assert ask(serve(), wrong)[0] == 401, "where there are no keys, none is valid"
    assert len(sink.records) == 1
    for none in ("none", "EMPTY", ""):
        assert ask(served, none)[2]["polar"]["tenant"] == "acme"
    assert served.chat()["polar"]["tenant"] == "acme"


def test_a_call_through_a_proxy_needs_a_key(serve: Callable[..., Served], keys: ApiKeys) -> None:
    served, never = serve(keys=keys, require_keys="forwarded"), serve(keys=keys, require_keys="never")
    _, text = keys.create("globex", "search")
    for marks in (
        {"x-forwarded-for": "10.0.0.5"},
        {"X-Forwarded-Proto": "https"},
        {"forwarded": "for=10.0.0.5"},
        {"via": "1.1 proxy"},
        {"x-real-ip": "127.0.0.1"},
        {"host": "models.example.org"},
    ):
        assert served.call("POST", "/v1/chat/completions", chat_body(), marks)[0] == 401
        assert served.call("POST", "/v1/chat/completions", chat_body(), {**marks, **bearer(text)})[0] == 200
        assert never.call("GET", "/v1/models", headers=marks)[0] == 200
        assert never.call("GET", "/v1/models", headers={**marks, **bearer(text[:-1])})[0] == 401


@pytest.mark.parametrize(("peer", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.5", 401), ("unknown", 401)])
async def test_a_call_from_another_machine_needs_a_key(served: Served, keys: ApiKeys, peer: str, status: int) -> None:
    app = build(Settings(engine=served.server.engine, keys=keys, require_keys="forwarded"))
    transport = httpx.ASGITransport(app, client=(peer, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.get("/v1/models")).status_code == status


@pytest.mark.parametrize("mounted", [True, False])
async def test_every_path_needs_its_scope_wherever_the_app_is(
    served: Served, keys: ApiKeys, ledger: Ledger, mounted: bool
) -> None:
    stores: dict[str, Any] = {"keys": keys, "pages": Dashboard(ledger), "accounts": Accounts(ledger)}
    app = build(Settings(engine=served.server.engine, **stores))
    outer = Starlette(routes=[Mount("/ai/v1", app)])
    transport = httpx.ASGITransport(outer) if mounted else httpx.ASGITransport(app, root_path="/ai/v1")
    scopes = {"infer": keys.create("acme", "infer")[1], "all": keys.create("acme", "all", scopes=SCOPES)[1]}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost/ai/v1") as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models", headers=bearer(scopes["infer"]))).status_code == 200
        for path in ("/metrics", "/v1/polar/usage", "/v1/polar/receipts/x", "/polar/", "/polar/requests/1"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=bearer(scopes["infer"]))).status_code == 403
            assert (await client.get(path, headers=bearer(scopes["all"]))).status_code in {200, 404}


def test_both_keys_work_while_a_rotation_overlaps(guarded: Served, keys: ApiKeys) -> None:
    made, old = keys.create("acme", "search")
    _, new = keys.rotate(made.key_id, timedelta(hours=1))
    assert [ask(guarded, text)[0] for text in (old, new)] == [200, 200]


def test_a_key_is_held_to_its_models_tiers_and_length(guarded: Served, keys: ApiKeys, sink: RecordingSink) -> None:
    _, text = keys.create("acme", "cheap", tiers=("economy",), max_tokens=5)
    _, _, listed = guarded.call("GET", "/v1/models", headers=bearer(text))
    assert [model["id"] for model in listed["data"]] == ["tiny:economy"]
    assert guarded.call("GET", "/v1/models/tiny:exact", headers=bearer(text))[0] == 404
    assert ask(guarded, text, model="tiny:exact", max_tokens=5)[0] == 404
    assert ask(guarded, text, compute="exact", max_tokens=5)[0] == 403
    assert ask(guarded, text, max_tokens=5)[0] == 403, "the default tier is standard"
    assert ask(guarded, text, program="0-5", max_tokens=5)[0] == 403
    assert ask(guarded, text, compute="economy", max_tokens=6)[0] == 400
    assert sink.records == []
    body = {**chat_body(model="tiny:economy"), "max_tokens": None}
    assert guarded.call("POST", "/v1/chat/completions", body, bearer(text))[2]["usage"]["completion_tokens"] == 5
    _, other = keys.create("acme", "other", models=("elsewhere",))
    assert ask(guarded, other)[0] == 404


def test_limits_are_asked_before_a_body_is_read(guarded: Served, keys: ApiKeys) -> None:
    _, text = keys.create("acme", "few", requests_per_minute=2)
    wrong = b'{"messages": ' + b"[" * 60_000
    for path, status in (
        ("chat/completions", 400),
        ("polar/quote", 400),
        ("chat/completions", 429),
        ("responses", 429),
    ):
        assert guarded.call("POST", f"/v1/{path}", wrong, bearer(text))[0] == status
    _, text = keys.create("acme", "one at a time", parallel=1)
    for body, status in ((wrong, 400), (chat_body(), 200)) * 2:
        deadline = time.monotonic() + WAIT_S
        while (found := guarded.call("POST", "/v1/chat/completions", body, bearer(text))[0]) == 429:
            assert time.monotonic() < deadline, "the one before counts for ever"
        assert found == status


@pytest.fixture
def replicas(serve: Callable[..., Served], keys: ApiKeys, ledger_url: str) -> Iterator[tuple[Served, Served]]:
    """Two servers with limits in one ledger, as two processes have them."""
    with Ledger(ledger_url) as one, Ledger(ledger_url) as other:
        yield serve(keys=keys, rates=Rates(one)), serve(keys=keys, rates=Rates(other))


def test_replicas_share_requests_and_tokens_per_minute(replicas: tuple[Served, Served], keys: ApiKeys) -> None:
    one, other = replicas
    _, text = keys.create("acme", "slow", requests_per_minute=2)
    found = [ask(served, text) for served in (one, other, one, other)]
    assert [status for status, _, _ in found] == [200, 200, 429, 429]
    assert [limits["x-ratelimit-remaining-requests"] for _, limits, _ in found[:2]] == ["1", "0"]
    assert found[0][1]["x-ratelimit-limit-requests"] == "2"
    assert found[3][2]["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(found[3][1]["retry-after"]) <= 30
    assert 0 < int(found[3][1]["retry-after-ms"]) <= 30_000
    _, talkative = keys.create("acme", "talkative", tokens_per_minute=10)
    assert ask(one, talkative)[0] == 200
    deadline = time.monotonic() + WAIT_S
    while ask(other, talkative, max_tokens=1)[0] != 429:  # the tokens of an answer are told a moment after it
        assert time.monotonic() < deadline


def test_replicas_share_answers_at_a_time(replicas: tuple[Served, Served], keys: ApiKeys, sink: RecordingSink) -> None:
    one, other = replicas
    _, text = keys.create("acme", "one at a time", parallel=1)
    sink.gate.clear()
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(ask(one, text)[0]))
    asking.start()
    assert sink.asked.acquire(timeout=20)
    assert [ask(other, text)[0], ask(one, text)[0]] == [429, 429]
    sink.gate.set()
    asking.join()
    assert found == [200]
    deadline = time.monotonic() + WAIT_S
    while ask(other, text)[0] != 200:
        assert time.monotonic() < deadline


def test_limits_that_cannot_be_read_let_nobody_in(
    serve: Callable[..., Served], keys: ApiKeys, sink: RecordingSink
) -> None:
    class Away:
        calls = 0

        def update(self, asking: Sequence[Any], used: Sequence[Any], running: Mapping[str, int]) -> Sequence[Any]:
            self.calls += 1
            raise StoreLockedError("the ledger is locked.")

    store = Away()
    served = serve(keys=keys, rates=store)
    _, free = keys.create("acme", "free")
    _, text = keys.create("acme", "bound", parallel=1)
    status, _, body = ask(served, text)
    assert (status, body["error"]["code"], sink.records) == (503, "metering_unavailable", [])
    assert (ask(served, free)[0], store.calls) == (200, 1), "a key without limits needs no store"


# -- calls that come twice ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "ledger"])
def replies(request: pytest.FixtureRequest) -> ReplyStore:
    return MemoryReplies() if request.param == "memory" else Replies(request.getfixturevalue("ledger"))


def post(served: Served, key: str, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
    connection = served.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {**JSON, "idempotency-key": key})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, {name.lower(): value for name, value in answer.getheaders()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_comes_twice_is_billed_once(
    serve: Callable[..., Served], sink: RecordingSink, replies: ReplyStore, stream: bool
) -> None:
    served = serve(replies=replies)
    body = chat_body(stream=stream, temperature=1)
    (one, first, headers), (two, second, again) = post(served, "k1", body), post(served, "k1", body)
    assert (one, two, first) == (200, 200, second)
    assert again["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in headers
    for name in ("x-request-id", "content-type", "x-polar-program"):
        assert again[name] == headers[name]
    assert len(sink.records) == 1
    other, _, refused = post(served, "k1", chat_body(stream=stream, max_tokens=9))
    assert (other, refused["x-should-retry"]) == (409, "false")
    assert post(served, "k2", body)[1] != first
    assert len(sink.records) == 2


def test_an_answer_is_given_again_to_the_same_key_only(
    serve: Callable[..., Served], sink: RecordingSink, replies: ReplyStore, keys: ApiKeys
) -> None:
    served = serve(keys=keys, replies=replies)
    one, other = keys.create("acme", "one")[1], keys.create("acme", "other")[1]

    def ask_again(text: str) -> str | None:
        header = {"idempotency-key": "k", **bearer(text)}
        status, headers, _ = served.call("POST", "/v1/chat/completions", chat_body(temperature=1), header)
        assert status == 200
        return headers.get("idempotent-replayed")

    assert [ask_again(text) for text in (one, other, one, other)] == [None, None, "true", "true"]
    assert len(sink.records) == 2


def test_a_call_that_is_being_answered_may_come_again_later(
    serve: Callable[..., Served], sink: RecordingSink, replies: ReplyStore
) -> None:
    served = serve(replies=replies)
    sink.gate.clear()
    found: list[bytes] = []
    asking = threading.Thread(target=lambda: found.append(post(served, "k", chat_body())[1]))
    asking.start()
    assert sink.asked.acquire(timeout=20)
    status, _, headers = post(served, "k", chat_body())
    assert (status, headers["x-should-retry"]) == (409, "true")
    sink.gate.set()
    asking.join()
    assert post(served, "k", chat_body())[1] == found[0]
    assert len(sink.records) == 1


def test_a_client_that_was_cut_off_gets_its_answer_later(
    serve: Callable[..., Served], sink: RecordingSink, replies: ReplyStore
) -> None:
    served = serve(replies=replies)
    body = endless(served, stream=True, max_tokens=30)
    with send_request(served, body, {"idempotency-key": "k"}) as connection:
        read_events(connection, 4)
    assert sink.wait_for(1)[0].outcome == "completed"
    status, content = 409, b""
    while status == 409:  # it is kept a moment after it is recorded
        status, content, _ = post(served, "k", body)
    assert content.endswith(b"data: [DONE]\n\n")
    assert content.count(b'"content":"A"') == 30
    assert len(sink.records) == 1


def test_replicas_answer_what_another_one_was_asked(
    serve: Callable[..., Served], sink: RecordingSink, ledger_url: str
) -> None:
    with Ledger(ledger_url) as ledger, Ledger(ledger_url) as other:
        one, two = serve(replies=Replies(ledger)), serve(replies=Replies(other))
        body = chat_body(temperature=1)
        _, first, _ = post(one, "k", body)
        _, second, headers = post(two, "k", body)
        assert (second, headers["idempotent-replayed"]) == (first, "true")
        assert len(sink.records) == 1
        with send_request(one, endless(one, stream=True), {"idempotency-key": "long"}) as connection:
            read_events(connection, 4)
            status, _, headers = post(two, "long", endless(one, stream=True))
            assert (status, headers["x-should-retry"]) == (409, "true")


def test_a_call_that_failed_may_be_tried_again(
    serve: Callable[..., Served], sink: RecordingSink, replies: ReplyStore
) -> None:
    served = serve(replies=replies)
    assert post(served, "k", chat_body(program="0-99"))[0] == 400
    assert post(served, "k", chat_body())[0] == 200
    assert len(sink.records) == 1


class AwayReplies(MemoryReplies):
    """A store that keeps nothing until it is back."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()
        self.tried = threading.Semaphore(0)
        """Released once per reply that it was to keep."""

    def keep(self, tenant: str, key: str, answer: bytes) -> bool:
        self.tried.release()
        return self.back.is_set() and super().keep(tenant, key, answer)


def asking(served: Served, replies: AwayReplies, body: dict[str, Any]) -> tuple[threading.Thread, list[Any]]:
    """A call whose answer is computed and cannot be kept; and what it gets in the end."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(post(served, "k", body)))
    thread.start()
    for _ in range(2):
        assert replies.tried.acquire(timeout=WAIT_S)
    return thread, found


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_billed_when_it_is_kept(
    serve: Callable[..., Served], sink: RecordingSink, ledger_url: str, stream: bool
) -> None:
    """A server killed before that has billed nothing as completed, and the call may be computed again."""
    replies = AwayReplies()
    with Meter(ledger_url) as meter:
        served = serve(replies=replies, sink=meter)
        thread, found = asking(served, replies, chat_body(n=2, stream=stream))
        assert list(meter.ledger.read(Selection("acme"))) == []
        assert len(served.server.sink.due) == 2
        assert (post(served, "k", chat_body(n=2, stream=stream))[0], found) == (409, [])
        replies.back.set()
        thread.join()
        stored = list(meter.ledger.read(Selection("acme")))
        assert [one.record.outcome for one in stored] == ["completed"] * 2
        assert served.server.sink.due == frozenset()
        ((status, content, _),) = found
        assert (status, post(served, "k", chat_body(n=2, stream=stream))[1]) == (200, content)
        said = json.loads(content.split(b"\n\n")[-3].removeprefix(b"data: ")) if stream else json.loads(content)
        assert Decimal(said["cost_details"]["amount"]) == sum(one.cost or 0 for one in stored)


def test_a_server_that_ends_waits_for_no_store(serve: Callable[..., Served], sink: RecordingSink) -> None:
    replies = AwayReplies()
    served = serve(replies=replies)
    thread, found = asking(served, replies, chat_body())
    served.close()
    thread.join()
    assert ([status for status, _, _ in found], len(sink.records)) == ([200], 1)


def test_what_cannot_be_stored_stays_due(serve: Callable[..., Served], sink: RecordingSink) -> None:
    replies, emit = AwayReplies(), sink.emit
    served = serve(replies=replies)

    def full(record: Any) -> Any:
        raise OSError(28, "No space left on device")

    sink.emit = full  # type: ignore[method-assign]
    thread, found = asking(served, replies, chat_body())
    replies.back.set()
    thread.join()
    assert ([status for status, _, _ in found], len(served.server.sink.due)) == ([200], 1)
    sink.emit = emit  # type: ignore[method-assign]
    served.close()
    assert (len(sink.records), served.server.sink.due) == (1, frozenset())


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_of_no_use_is_refused(served: Served, key: str) -> None:
    status, content, _ = post(served, key, chat_body())
    assert (status, json.loads(content)["error"]["param"]) == (400, "idempotency-key")


def test_the_stores_are_found_by_their_entry_point(ledger_url: str) -> None:
    found = find_access(ledger_url)
    assert found.keys.find("nothing0") is None
    assert found.accounts.receipt("acme", "nothing") is None
    assert found.replies.claim("acme", "k", "f" * 64) == ("claimed", None)
    assert found.rates.update([], [], {}) == []
    found.replies.close()


def test_holds_are_renewed_and_answers_marked(serve: Callable[..., Served], ledger_url: str) -> None:
    """The sink that the server puts around the meter passes on that a request has begun, how to end it, and marks."""
    watched: list[str] = []

    class Watching(Meter):
        def watch(self, tenant: str, request_id: str, end: Callable[[Exception], None]) -> None:
            super().watch(tenant, request_id, end)
            watched.append(request_id)

    with Watching(ledger_url) as meter:
        served = serve(sink=meter)
        assert meter.spool is not None
        served.chat()
        assert watched == [one.record.request_id for one in meter.ledger.read(Selection("acme"))]
        assert served.server.sink.wants_marks
        served.server.sink.mark(usage_record("killed"))
        assert len(list(meter.spool.folder.glob("*.marks"))) == 1
